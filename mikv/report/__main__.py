"""python -m mikv.report RUN... [-o FILE]      RUN: a run's folder, as in results/runs/NAME or results/reference/NAME."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mikv.records import RecordError, write_atomically
from mikv.report.content import content
from mikv.report.page import page
from mikv.results import ResultsError, read_results


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mikv.report",
        description="Write one HTML page about runs: curves, a table, the samples that flipped. It needs no network.",
    )
    parser.add_argument("run", nargs="+", type=Path, help="folder of a run that has ended, such as results/runs/NAME")
    parser.add_argument("-o", "--output", type=Path, help="the page; default: report.html in the (first) run's folder")
    options = parser.parse_args(arguments)
    output = options.output or options.run[0] / "report.html"
    try:
        runs = [read_results(folder) for folder in dict.fromkeys(options.run)]
        title = " · ".join(dict.fromkeys(f"{run.summary[0]['model']} {run.summary[0]['task']}" for run in runs))
        write_atomically(output, page(content(runs), f"mikv: {title}"))
    except (ResultsError, RecordError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {output} can't be written ({error.strerror}); choose another file with -o FILE", file=sys.stderr)
        return 2
    print(f"report   {output}   ({output.stat().st_size / 1000:.0f} kB; open it in a browser)")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
