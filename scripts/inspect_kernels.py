"""Compile the kernels for real models without a GPU, take them apart, and hold them to their gates.

    python scripts/inspect_kernels.py                       # all targets; a table each; exits with 1 if a gate is missed
    python scripts/inspect_kernels.py --targets sm_90 --json kernels.json

Figures are static: registers per thread, shared memory per program, spills, and of the hot loop (a packing kernel: of the
whole program) the instructions per token, how wide it loads, and the bytes it asks for per token beside those it must read.
They are exact, and say nothing of how near a GPU comes to them.

Gates, on sm_90: no spill; in the decode kernels' hot loop no conversion between integers and floating point, and all codes
loaded by asynchronous copies of 16 bytes; at head_dim 128 at most so many instructions per token.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # run from anywhere in a checkout

TARGETS = ("sm_80", "sm_90", "gfx942")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", default=",".join(TARGETS), help="comma-separated, of " + ", ".join(TARGETS))
    parser.add_argument("--json", type=Path, help="also write the rows there")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilers at a time")
    args = parser.parse_args()
    targets = args.targets.split(",")
    if unknown := set(targets) - set(TARGETS):
        parser.error(f"unknown target {', '.join(sorted(unknown))}; choose from {', '.join(TARGETS)}")

    from mikv.kernels.inspection import failures, inspect, variants

    work = [(number, target) for target, number in product(targets, range(len(variants())))]
    with ProcessPoolExecutor(args.jobs) as pool:
        rows = list(pool.map(inspect, work))
    for target in targets:
        print_table(target, [row for row in rows if row["target"] == target])
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    missed = [f"{row['target']} {row['kernel']} {row['model']}: {what}" for row in rows for what in failures(row)]
    print("\n".join(["gates missed:", *missed]) if missed else "all gates are met")
    return 1 if missed else 0


def print_table(target: str, rows: list[dict[str, Any]]) -> None:
    columns = {
        "kernel": "kernel",
        "model": "model",
        "registers": "registers",
        "shared": "shared B",
        "spills": "spills",
        "conversions": "conv.",
        "loads": "loads in the loop",
        "per_unit": "per token",
        "gate": "gate",
        "bytes_asked": "B asked",
        "bytes_least": "B least",
    }
    cells = [list(columns.values())]
    cells += [["" if row[name] is None else _text(row[name]) for name in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    print(f"\n{target}")
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _text(value: Any) -> str:
    return f"{value:.1f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
