"""Figures: functions of summary rows. Axes in, axes out; no file is read here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]

# One colour and marker a policy, the same in every figure (Okabe and Ito's palette, safe for colour-blind readers).
_STYLE = {
    "full": ("#000000", "*"),
    "mikv": ("#0072B2", "o"),
    "h2o": ("#D55E00", "s"),
    "streaming_llm": ("#E69F00", "D"),
    "uniform": ("#009E73", "^"),
    "random": ("#999999", "v"),
    "recent_only": ("#CC79A7", "P"),
}
_OTHER = ("#56B4E9", "X")


def curve(ax: Any, rows: Sequence[Row]) -> Any:
    """Score (with its 95 % interval) against the counted size of the cache, a point per policy.

    A divergence spans orders of magnitude: it is drawn on a logarithmic scale, without the full cache, whose own is 0.
    """
    logarithmic = rows[0]["metric"] == "kl" and any(row["value"] > 0 for row in rows)
    if logarithmic:
        rows = [row for row in rows if row["value"] > 0]
        ax.set_yscale("log", nonpositive="clip")
    for name in dict.fromkeys(row["policy"] for row in rows):
        mine = sorted((row for row in rows if row["policy"] == name), key=lambda row: row["size_percent"])
        colour, marker = _STYLE.get(name, _OTHER)
        value = [row["value"] for row in mine]
        bounds = [row["ci95"] or (row["value"], row["value"]) for row in mine]
        ax.errorbar(
            [row["size_percent"] for row in mine],
            value,
            yerr=[
                [v - low for v, (low, _) in zip(value, bounds, strict=True)],
                [high - v for v, (_, high) in zip(value, bounds, strict=True)],
            ],
            fmt=marker, color=colour, ecolor=colour, elinewidth=0.8, capsize=2, markersize=7, label=name, alpha=0.9,
        )  # fmt: skip
    ax.set_xlabel("cache size, % of the 16-bit cache (bytes counted from stored tensors)")
    better = ", lower is better" if rows[0]["lower_is_better"] else ""
    ax.set_ylabel(f"{rows[0]['metric']}{better} (bars: 95 % interval)")
    ax.set_xlim(0, 108)
    if all(0 <= row["value"] <= 1 for row in rows) and not rows[0]["lower_is_better"]:
        ax.set_ylim(-0.04, 1.12)
    else:
        ax.margins(y=0.15)
    ax.grid(True, linewidth=0.3)
    ax.legend(loc="upper right" if rows[0]["lower_is_better"] else "lower right", frameon=True, fontsize=8)
    _annotate(ax, rows)  # last: it needs the final limits
    return ax


def _annotate(ax: Any, rows: Sequence[Row]) -> None:
    """A label beside each point, moved where it would lie on another label or point."""
    from adjustText import adjust_text

    texts = []
    for row in rows:
        short = row["label"].replace(row["policy"], "").strip() or row["policy"]
        colour = _STYLE.get(row["policy"], _OTHER)[0]
        # a little up and right of the point, in pixels: the scale may be logarithmic
        place = ax.transData.inverted().transform(ax.transData.transform((row["size_percent"], row["value"])) + 9)
        texts.append(ax.text(*place, short, fontsize=7, color=colour))
    adjust_text(
        texts,
        x=[row["size_percent"] for row in rows],
        y=[row["value"] for row in rows],
        ax=ax,
        arrowprops={"arrowstyle": "-", "color": "#888888", "linewidth": 0.5},
        expand=(1.15, 1.5),
    )


def save_curve(file: Path, rows: Sequence[Row]) -> Path:
    """Draw `curve` into a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(8, 5), dpi=150)
    curve(ax, rows)
    ax.set_title(f"{rows[0]['model']} on {rows[0]['task']}, n = {rows[0]['n']}", fontsize=10)
    figure.tight_layout()
    figure.savefig(file)
    plt.close(figure)
    return file
