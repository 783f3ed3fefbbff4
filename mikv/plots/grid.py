"""A measure against bytes for all models and tasks at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

from mikv.metrics.pareto import pareto_front
from mikv.plots.style import literal, look

Row = Mapping[str, Any]


def curve_grid(
    rows: Sequence[Row], title: str, columns: int | None = None, sizes: tuple[float, float] = (0, 104), bands: bool = True
) -> Any:
    """A figure with a row of panels per model, a column per task.

    rows: model, task, policy, size_percent, measure (its name), value, ci95 (two numbers or None), n, lower_is_better; of one
    model and task all rows have the same measure. A divergence is drawn on a logarithmic scale, without those that are 0.

    A marker is a policy's point; its line is the best that the policy reaches within so many bytes, with the 95 % interval of
    that point as a band. The dashed line is the Pareto front of all.

    columns: panels in the order of rows instead, so many side by side; sizes: what is shown of the axis, in per cent; bands:
    false = intervals at the points, for more policies than bands can be told apart.
    """
    import matplotlib.pyplot as plt
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    models, tasks = (list(dict.fromkeys(row[name] for row in rows)) for name in ("model", "task"))
    panels = [(model, task) for model in models for task in tasks]
    if columns is not None:
        panels = list(dict.fromkeys((row["model"], row["task"]) for row in rows))
    wide = columns or len(tasks)
    high = -(-len(panels) // wide)
    figure, axes = plt.subplots(
        high,
        wide,
        figsize=(1.0 + 4.6 * wide, 1.3 + 3.4 * high),
        squeeze=False,
        layout=ConstrainedLayoutEngine(wspace=0.06, hspace=0.06),
    )
    for ax, panel in zip_longest(axes.flat, panels):
        mine = [row for row in rows if (row["model"], row["task"]) == panel]
        if mine:
            _panel(ax, mine, sizes, bands)
            n = ", ".join(map(str, sorted({row["n"] for row in mine})))  # several where runs of a task are put together
            ax.set_title(literal(f"{panel[0]} · {panel[1]} (n = {n})"), fontsize=10)
        else:
            ax.set_axis_off()
    for column in axes.T:  # under the lowest panel of each
        ax = [one for one in column if one.axison][-1] if any(one.axison for one in column) else column[-1]
        ax.set_xlabel("cache size, % of the 16-bit cache's bytes")
    figure.suptitle(literal(title), fontsize=11)
    handles = {label: handle for ax in axes.flat for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=(4 if len(handles) < 9 else 3) * wide,
        fontsize=9,
        frameon=False,
    )
    return figure


def _panel(ax: Any, rows: Sequence[Row], sizes: tuple[float, float], bands: bool) -> None:
    first = rows[0]
    if first["measure"] == "kl":
        rows = [row for row in rows if row["value"] > 0]
        ax.set_yscale("log", nonpositive="clip")
    for name in dict.fromkeys(row["policy"] for row in rows):
        _policy(ax, name, [row for row in rows if row["policy"] == name], bands)
    front = [rows[i] for i in _front(rows)]
    ax.plot(
        [row["size_percent"] for row in front], [row["value"] for row in front],
        "--", color="#555555", linewidth=1, zorder=1, label="Pareto front",
    )  # fmt: skip
    ax.set_xlim(*sizes)
    if all(0 <= row["value"] <= 1 for row in rows) and not first["lower_is_better"]:
        ax.set_ylim(-0.04, 1.04)
    unit = ", nats per token" if first["measure"] in ("kl", "nll_change") else ""
    better = ", lower is better" if first["lower_is_better"] else ""
    ax.set_ylabel(literal(first["measure"].replace("_", " ") + unit + better))
    ax.grid(True, linewidth=0.3)


def _policy(ax: Any, name: str, rows: Sequence[Row], bands: bool) -> None:
    colour, marker = look(name)
    ax.plot(
        [row["size_percent"] for row in rows], [row["value"] for row in rows],
        marker, color=colour, markersize=9 if marker == "*" else 6, label=literal(name), zorder=3,
    )  # fmt: skip
    if not bands and name != "full":
        _intervals(ax, colour, rows)
        return
    best = [rows[i] for i in _front(rows)]
    sizes = [*(row["size_percent"] for row in best), 104]
    if name == "full":  # a level to compare with, not a point to reach
        sizes[0] = 0
    value = [row["value"] for row in best]
    low, high = zip(*(row["ci95"] or (row["value"], row["value"]) for row in best), strict=True)
    ax.plot(sizes, [*value, value[-1]], drawstyle="steps-post", color=colour, linewidth=1.2, alpha=0.8, zorder=2)
    ax.fill_between(sizes, [*low, low[-1]], [*high, high[-1]], step="post", color=colour, alpha=0.12, linewidth=0, zorder=1)


def _intervals(ax: Any, colour: str, rows: Sequence[Row]) -> None:
    """A policy's points, joined in the order of their sizes, and the interval of each."""
    rows = sorted(rows, key=lambda row: row["size_percent"])
    sizes, values = [row["size_percent"] for row in rows], [row["value"] for row in rows]
    bounds = [row["ci95"] or (row["value"], row["value"]) for row in rows]
    ax.plot(sizes, values, color=colour, linewidth=0.9, alpha=0.7, zorder=2)
    ax.vlines(sizes, [low for low, _ in bounds], [high for _, high in bounds], color=colour, linewidth=0.7, alpha=0.5, zorder=1)


def _front(rows: Sequence[Row]) -> list[int]:
    return pareto_front([r["size_percent"] for r in rows], [r["value"] for r in rows], rows[0]["lower_is_better"])
