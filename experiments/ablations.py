"""What each choice that the paper leaves open is worth, one at a time around MiKV 20 % 16/2.

python -m experiments.ablations model=smollm2-recall
python -m experiments.ablations model=smollm2-135m task=fidelity
"""

from __future__ import annotations

import sys
from typing import Any

from experiments.base import Results, compare, run, show
from mikv.cli import explained, quiet
from mikv.metrics.statistics import Paired

BASE = "mikv 20% 16/2"
CHOICES = {
    "recent=": "share of the budget for the most recent tokens (default 0.5)",
    "no balancer": "outlier-aware balancer",
    "low_group": "channels per scale (default head_dim / 2)",
    "budget=": "budget of a share of the prompt, not of what was seen",
    "recent_only": "importance: recency",
    "random": "importance: random",
}


def table(results: Results) -> Any:
    """Each variant against the base, sample by sample."""
    from rich.table import Table

    first = results.summary[0]
    shown = Table(
        title=f"Ablations around {BASE}\n{first['model']} · {first['task']} · n = {first['n']}",
        caption=f"{first['metric']} with 95 % interval; change from {BASE}: paired, bootstrap; p: McNemar, exact; kl: to the "
        "full cache on its own answers; size: bytes counted from stored tensors",
    )
    for name in ("choice", "policy"):
        shown.add_column(name)
    for name in (first["metric"], "change", "p", "kl", "size %"):
        shown.add_column(name, justify="right", no_wrap=True)
    for row in results.summary:
        what = next((text for sign, text in CHOICES.items() if sign in row["label"]), "")
        change = None if row["label"] in (BASE, "full") else compare(results, row["label"], BASE)
        bounds = row["ci95"] or (row["value"], row["value"])
        shown.add_row(
            what,
            row["label"],
            f"{row['value']:.3g} \\[{bounds[0]:.3g}, {bounds[1]:.3g}]",
            "" if change is None else _change(change),
            "" if change is None or change.p is None else f"{change.p:.2g}",
            f"{row['kl']:.2g}" if "kl" in row else "",
            f"{row['size_percent']:.1f}",
        )
    return shown


def _change(change: Paired) -> str:
    low, high = change.ci95 or (change.difference, change.difference)
    return f"{change.difference:+.2g} \\[{low:+.2g}, {high:+.2g}]"


if __name__ == "__main__":
    quiet()
    with explained():
        show(table(run("ablations", *sys.argv[1:])))
