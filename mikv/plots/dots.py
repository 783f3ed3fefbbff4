"""Values of several ways to do a thing, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mikv.plots.style import literal

Row = Mapping[str, Any]

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")


def dot_grid(rows: Sequence[Row], title: str) -> Any:
    """A figure with a panel per model and task, in each a line per way: its value with the 95 % interval.

    rows: model, task, group, name (of the way), measure, value, ci95 (two numbers or None), n, lower_is_better. Ways of a group
    have one colour, and the level of its first one is a dashed line. Divergences are drawn on a logarithmic scale.
    """
    import matplotlib.pyplot as plt

    ways = list(dict.fromkeys((row["group"], row["name"]) for row in rows))
    groups = list(dict.fromkeys(group for group, _ in ways))
    panels = list(dict.fromkeys((row["model"], row["task"]) for row in rows))
    wide = min(2, len(panels))
    high = -(-len(panels) // wide)
    figure, axes = plt.subplots(
        high, wide, figsize=(2.4 + 3.8 * wide, 1.2 + (0.5 + 0.24 * len(ways)) * high), squeeze=False, sharey=True,
        layout="constrained",
    )  # fmt: skip
    for ax, panel in zip(axes.flat, panels, strict=False):
        mine = {(row["group"], row["name"]): row for row in rows if (row["model"], row["task"]) == panel}
        for place, way in enumerate(ways):
            if way in mine:
                first = all(group != way[0] for group, _ in ways[:place])
                _dot(ax, mine[way], place, _COLOURS[groups.index(way[0]) % len(_COLOURS)], first)
        one = next(iter(mine.values()))
        if one["measure"] == "kl":
            ax.set_xscale("log")
            ax.xaxis.set_major_formatter("{x:g}")
            ax.xaxis.set_minor_formatter("{x:g}")
        ax.set_title(literal(f"{panel[0]} · {panel[1]} (n = {one['n']})"), fontsize=9)
        ax.set_xlabel(literal(one["measure"] + (", lower is better" if one["lower_is_better"] else "")), fontsize=8)
        ax.tick_params(axis="x", which="both", labelsize=7)
        ax.grid(True, axis="x", which="both", linewidth=0.3)
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    for ax in axes[:, 0]:
        ax.set_yticks(range(len(ways)), [literal(name) for _, name in ways], fontsize=8)
        ax.set_ylim(len(ways) - 0.5, -0.5)
    handles = {label: handle for ax in axes.flat for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), fontsize=8, frameon=False)
    figure.suptitle(literal(title), fontsize=11)
    return figure


def _dot(ax: Any, row: Row, place: int, colour: str, first: bool) -> None:
    low, high = row["ci95"] or (row["value"], row["value"])
    if row["measure"] == "kl":  # a logarithmic scale has no 0
        low = max(low, row["value"] / 10)
    error = [[max(0.0, row["value"] - low)], [max(0.0, high - row["value"])]]
    ax.errorbar([row["value"]], [place], xerr=error, fmt="o", color=colour, capsize=2, elinewidth=0.8, markersize=5)
    if first:
        ax.axvline(row["value"], color=colour, linestyle="--", linewidth=0.8, zorder=1, label=literal(row["group"]))
