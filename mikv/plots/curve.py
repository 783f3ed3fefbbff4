"""Score against size: a point per policy of one run."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mikv.metrics.pareto import pareto_front
from mikv.plots.style import literal, look, pyplot, save

Row = dict[str, Any]

_ROOM = 30  # labels, at most
# How strongly labels push each other away, and how far in one step, in pixels; one after the other until no label lies on
# another: no single choice suits all figures.
_PUSHES = ((0.8, 10), (0.4, 20), (0.2, 20), (0.1, 10), (0.3, 30), (1.2, 20), (2.0, 10), (0.5, 5))


def curve_figure(rows: Sequence[Row]) -> Any:
    """Score (with its 95 % interval) against the counted size of the cache, a point per policy with its label, of the summary
    of a run. The caller saves and closes it."""
    figure, ax = pyplot().subplots(figsize=(8, 5), dpi=150)
    ax.set_title(literal(f"{rows[0]['model']} on {rows[0]['task']}, n = {rows[0]['n']}"), fontsize=10)
    if rows[0]["metric"] == "kl" and any(row["value"] > 0 for row in rows):
        # a divergence spans orders of magnitude; the full cache's own is 0 and has no place there
        rows = [row for row in rows if row["value"] > 0]
        ax.set_yscale("log", nonpositive="clip")
    _points(ax, rows)
    figure.tight_layout()
    _annotate(ax, rows)  # last: it needs the final limits and layout
    return figure


def _points(ax: Any, rows: Sequence[Row]) -> None:
    for name in dict.fromkeys(row["policy"] for row in rows):
        mine = sorted((row for row in rows if row["policy"] == name), key=lambda row: row["size_percent"])
        colour, marker = look(name)
        value = [row["value"] for row in mine]
        bounds = [row["ci95"] or (row["value"], row["value"]) for row in mine]
        ax.errorbar(
            [row["size_percent"] for row in mine],
            value,
            yerr=[
                [v - low for v, (low, _) in zip(value, bounds, strict=True)],
                [high - v for v, (_, high) in zip(value, bounds, strict=True)],
            ],
            fmt=marker, color=colour, ecolor=colour, elinewidth=0.8, capsize=2, markersize=7, label=literal(name), alpha=0.9,
        )  # fmt: skip
    ax.set_xlabel("cache size, % of the 16-bit cache (bytes counted from stored tensors)")
    better = ", lower is better" if rows[0]["lower_is_better"] else ""
    ax.set_ylabel(literal(f"{rows[0]['metric']}{better} (bars: 95 % interval)"))
    ax.set_xlim(0, 108)
    if all(0 <= row["value"] <= 1 for row in rows) and not rows[0]["lower_is_better"]:
        ax.set_ylim(-0.04, 1.12)
    else:
        ax.margins(y=0.15)
    ax.grid(True, linewidth=0.3)
    ax.legend(loc="upper right" if rows[0]["lower_is_better"] else "lower right", frameon=True, fontsize=8)


def _annotate(ax: Any, rows: Sequence[Row]) -> None:
    """A label beside each point, moved where it would lie on another label or point; of more points than have room those on
    the Pareto front, and where there is no way to place all of these, as many as can be. The run's table has them all."""
    points = [ax.transData.transform((row["size_percent"], row["value"])) for row in rows]
    named = list(range(len(rows)))
    if len(rows) > _ROOM:
        values = [row["value"] for row in rows]
        named = pareto_front([row["size_percent"] for row in rows], values, rows[0]["lower_is_better"])
        named = sorted({*named, *(place for place, row in enumerate(rows) if row["policy"] == "full")})
    # a little up and right of the point, in pixels: the scale may be logarithmic
    starts = {place: ax.transData.inverted().transform(points[place] + 9) for place in named}
    texts = {
        place: ax.text(*start, literal(_short(rows[place])), fontsize=7, color=look(rows[place]["policy"])[0])
        for place, start in starts.items()
    }
    pushes: Sequence[tuple[float, int]] = _PUSHES
    while not _placed(ax, rows, texts, starts, points, pushes):
        pushes = _PUSHES[:2]
        crowded = max(texts, key=lambda place: _on_others(texts, place, points))
        texts.pop(crowded).remove()


def _placed(
    ax: Any,
    rows: Sequence[Row],
    texts: dict[int, Any],
    starts: dict[int, Any],
    points: Sequence[Any],
    pushes: Sequence[tuple[float, int]],
) -> bool:
    """Move labels, with one push after the other, until none lies on another or on a point; whether that was reached."""
    from adjustText import adjust_text

    for force, step in pushes:
        for place, text in texts.items():
            text.set(position=starts[place], ha="left", va="baseline")  # the library centres them
        _, arrows = adjust_text(
            list(texts.values()),
            x=[row["size_percent"] for row in rows],
            y=[row["value"] for row in rows],
            ax=ax,
            arrowprops={"arrowstyle": "-", "color": "#888888", "linewidth": 0.5},
            expand=(1.15, 1.5),
            force_text=(force, 1.5 * force),
            force_static=(force / 2, force),
            max_move=(step, step),
            iter_lim=300,  # the library's own limit is one of time: a busy machine would draw another figure
        )
        if not collisions(list(texts.values()), points):
            return True
        for arrow in arrows:
            arrow.remove()
    return False


def _on_others(texts: dict[int, Any], place: int, points: Sequence[Any]) -> int:
    """How many labels and points a label lies on."""
    box = texts[place].get_window_extent()
    others = sum(box.overlaps(text.get_window_extent()) for other, text in texts.items() if other != place)
    return others + sum(bool(box.contains(*point)) for point in points)


def _short(row: Row) -> str:
    """The label without what the legend says."""
    return str(row["label"].replace(row["policy"], "").strip() or row["policy"])


def collisions(texts: Sequence[Any], points: Sequence[Any]) -> int:
    """How many pairs of labels, and of a label and a point (in pixels), lie on each other."""
    boxes = [text.get_window_extent() for text in texts]
    pairs = sum(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    return pairs + sum(bool(box.contains(*point)) for box in boxes for point in points)


def save_curve(file: Path, rows: Sequence[Row]) -> None:
    """Draw `curve_figure` into a PNG."""
    save(curve_figure(rows), file)
