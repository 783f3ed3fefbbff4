"""The records of a run: append-only, one line per (policy, sample), keyed by a hash of everything that changes the outcome.

    results/runs/<name>/config.yaml      the resolved configuration
                        run.json         identity (what is hashed), git commit, package versions, device
                        samples.jsonl    one line per policy and sample, flushed as it is produced
                        summary.jsonl    one line per policy, replaced as a whole when the run ends
                        curve.png        the plot
                        .claim.N         who is writing, or was last

A finished key is never computed again; a killed run goes on where it stopped; a folder has one writer at a time.
"""

from mikv.records.claim import Claim
from mikv.records.files import VERSION, RecordError, Row, read_rows, to_line, write_atomically
from mikv.records.folder import RunFolder

__all__ = ["VERSION", "Claim", "RecordError", "Row", "RunFolder", "read_rows", "to_line", "write_atomically"]
