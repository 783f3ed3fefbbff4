"""Keep what notebooks and the report need of runs in a small folder that can be committed.

    python scripts/keep_results.py results/runs/NAME ...          into results/reference/NAME

Kept: the summary, the samples that flipped (with the full cache's answers beside them), and what was run, without the machine.
With --summaries no sample: what models say to harmful requests, and published data in answers, is not to be handed on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # run from anywhere in a checkout

from mikv.records import RecordError, to_line, to_lines, write_atomically
from mikv.results import Results, ResultsError, flips, panel_of, read_results

# What of an environment says something of the machine alone, and nothing of the numbers.
_OF_THE_MACHINE = ("system", "processors", "driver")
REFERENCE = Path(__file__).parents[1] / "results" / "reference"


def keep(results: Results, panel: str | None, folder: Path, samples: bool = True) -> None:
    """Write the small folder; what was there before is replaced."""
    environments = (
        json.dumps({"id": name, **{field: of for field, of in one.items() if field not in _OF_THE_MACHINE}}) + "\n"
        for name, one in results.environments.items()
    )
    rows = {row["key"]: row for pair in flips(results) for row in pair}
    folder.mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        file.unlink()
    texts = {"environments.jsonl": "".join(environments), "summary.jsonl": to_lines(results.summary)}
    if samples:
        texts["samples.jsonl"] = "".join(map(to_line, rows.values()))
    for name, text in texts.items():
        write_atomically(folder / name, text)
    about = {"identity": results.about["identity"], "panel": panel, "kept": "flips" if samples else "summary"}
    # the samples that a summary could be counted from again are not all there: `records check` compares these
    about["sha256"] = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
    write_atomically(folder / "run.json", json.dumps(about, indent=2) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run", nargs="+", type=Path, help="folder of a run that has ended")
    parser.add_argument("--into", type=Path, default=REFERENCE, help="folder of the kept results (default: results/reference)")
    parser.add_argument("--summaries", action="store_true", help="keep no samples")
    options = parser.parse_args(arguments)
    try:
        for run in options.run:
            results = read_results(run)
            keep(results, panel_of(run), options.into / results.name, not options.summaries)
            size = sum(file.stat().st_size for file in (options.into / results.name).iterdir())
            print(f"{options.into / results.name}: {len(results.summary)} policies, {size / 1000:.0f} kB")
    except (ResultsError, RecordError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
