"""The records of a run: append-only, one line per (policy, sample), keyed by a hash of everything that changes the outcome.

    results/runs/<name>/config.yaml      the resolved configuration
                        run.json         identity: what is hashed into keys, besides policy and sample
                        environments.jsonl  one line per process that made records: commit, versions, device; rows name theirs
                        samples.jsonl    one line per policy and sample, flushed as it is produced
                        summary.jsonl    one line per policy, of all samples that are there; replaced as a whole when a run ends
                        curve.png        the plot
                        .claim.N         who is writing, or was last

A finished key is never computed again; a killed run goes on where it stopped; a folder has one writer at a time.
"""

from mikv.records.claim import Claim
from mikv.records.files import VERSION, RecordError, Row, read_rows, to_line, to_lines, write_atomically
from mikv.records.folder import RunFolder, check_identity, read_environments, read_samples

__all__ = [
    "VERSION",
    "Claim",
    "RecordError",
    "Row",
    "RunFolder",
    "check_identity",
    "read_environments",
    "read_rows",
    "read_samples",
    "to_line",
    "to_lines",
    "write_atomically",
]
