"""What is importance worth, with a good code below it? MiKV's question, asked at equal bytes: tables and a figure.

    python run.py panel=importance model=smollm2-135m task=fidelity
    python -m experiments.importance                  every run of panel=importance under results/runs
    python -m experiments.importance RUN_FOLDER ...   these runs
    python -m experiments.importance --run model=smollm2-135m        run what is missing of both texts first

All tiers have our own policy's code. At each of two sizes the better tier's tokens are chosen in several ways; or there is no
such tier, and its bytes are spent on key bits of the heads that need them most. Changes are paired, sample by sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from experiments.ablations import table
from experiments.base import folders, show
from experiments.front import TASKS, points
from mikv.cli import explained
from mikv.plots import dot_grid
from mikv.results import read_results

WAYS = {
    "17 % of the bytes": {
        "whiten 2": "2 %: attention of late",
        "whiten 2 2% accumulated 8": "2 %: accumulated attention",
        "whiten 2 2% per_query 8": "2 %: attention per query",
        "whiten 2 2% recency 8": "2 %: the latest tokens",
        "whiten 2 2% random 8": "2 %: random tokens",
        "whiten 2+0.3 none important": "none; 0.3 more key bits",
    },
    "21 % of the bytes": {
        "whiten 2 10% late 8": "10 %: attention of late",
        "whiten 2 10% accumulated 8": "10 %: accumulated attention",
        "whiten 2 10% random 8": "10 %: random tokens",
        "whiten 2+1.25": "2 %, 1.25 more key bits",
        "whiten 2+1.55 none important": "none; 1.55 more key bits",
    },
}
"""By size: labels of conf/panel/importance.yaml, and what they stand for; the first is what the others are compared with."""


def main(arguments: Sequence[str] | None = None) -> None:
    import matplotlib

    matplotlib.use("Agg")
    with explained():
        runs, out = folders("importance", "importance", TASKS, arguments)
        rows = points(runs)
        results = [read_results(folder) for folder in runs]
    tables: list[Any] = []
    for one in results:
        for size, ways in WAYS.items():
            base, *others = ways
            tables.append(table(one, base, {label: ways[label] for label in others}, ways))
            tables[-1].title = f"{size}\n{one.name} · n = {one.summary[0]['n']}"
    show(*tables)
    named = [
        {**row, "group": size, "name": name}
        for size, ways in WAYS.items()
        for label, name in ways.items()
        for row in rows
        if row["label"] == label
    ]
    file = out / "importance.png"
    dot_grid(named, "What importance is worth at equal bytes").savefig(file, dpi=150)
    print(f"figure   {file}")


if __name__ == "__main__":
    main()
