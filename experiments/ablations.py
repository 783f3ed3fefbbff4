"""What each choice that the paper leaves open is worth, one at a time around MiKV 20 % 16/2.

python -m experiments.ablations model=smollm2-recall
python -m experiments.ablations model=smollm2-135m task=fidelity
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from experiments.base import ADJUSTED, adjusted, arguments, compare, run, show
from mikv.cli import explained, quiet
from mikv.results import Results

BASE = "mikv 20% 16/2"
CHOICES = {
    "recent=": "share of the budget for the most recent tokens (default 0.5)",
    "no balancer": "outlier-aware balancer",
    "low_group": "channels per scale (default head_dim / 2)",
    "budget=": "budget of a share of the prompt, not of what was seen",
    "recent_only": "importance: recency",
    "random": "importance: random",
}


def table(results: Results, base: str = BASE, choices: Mapping[str, str] = CHOICES, only: Collection[str] | None = None) -> Any:
    """Each variant against the base (a label), sample by sample. choices: what a part of a label stands for; only: labels that
    are shown, None = all."""
    from rich.table import Table

    first = results.summary[0]
    shown = Table(
        title=f"Ablations around {base}\n{first['model']} · {first['task']} · n = {first['n']}",
        caption=f"{first['metric']} with 95 % interval; change from {base}: paired; {ADJUSTED}; kl: to the full cache on its "
        "own answers; size: bytes counted from stored tensors",
    )
    for name in ("choice", "policy"):
        shown.add_column(name)
    for name in (first["metric"], "change", "p", "kl", "size %"):
        shown.add_column(name, justify="right", no_wrap=True)
    rows = [row for row in results.summary if only is None or row["label"] in only]
    labels = [row["label"] for row in rows if row["label"] not in (base, "full")]
    changes = {label: change for label in labels if (change := compare(results, label, base)) is not None}
    tests = adjusted({label: change.p for label, change in changes.items()})
    for row in rows:
        label = row["label"]
        change = changes.get(label)
        shown.add_row(
            "" if label == base else next((text for sign, text in choices.items() if sign in label), ""),
            label,
            _number(f"{row['value']:.3g}", row["ci95"], ".3g"),
            "" if change is None else _number(f"{change.difference:+.2g}", change.ci95, "+.2g"),
            f"{tests[label]:.2g}" if label in tests else "",
            f"{row['kl']:.2g}" if "kl" in row else "",
            f"{row['size_percent']:.1f}",
        )
    return shown


def _number(value: str, bounds: Sequence[float] | None, form: str) -> str:
    """'0.48 [0.38, 0.58]'."""
    return value if bounds is None else f"{value} \\[{bounds[0]:{form}}, {bounds[1]:{form}}]"


if __name__ == "__main__":
    quiet()
    with explained():
        show(table(run("ablations", *arguments())))
