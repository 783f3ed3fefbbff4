"""Figures of one run, from its summary and samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mikv.plots.style import look

Row = dict[str, Any]


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
        colour = look(row["policy"])[0]
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
    figure, ax = _pyplot().subplots(figsize=(8, 5), dpi=150)
    curve(ax, rows)
    ax.set_title(f"{rows[0]['model']} on {rows[0]['task']}, n = {rows[0]['n']}", fontsize=10)
    figure.tight_layout()
    return _save(figure, file)


def depth_map(ax: Any, samples: Sequence[Row]) -> Any:
    """Mean score by the number of lines in the context and the depth of the line that is asked for (0 = first, 1 = last),
    of one policy's samples; each cell says its value. Returns the image, for a colour bar."""
    lines = sorted({row["lines"] for row in samples})
    depths = sorted({row["depth"] for row in samples})
    cells = [[[row["score"] for row in samples if (row["lines"], row["depth"]) == (n, d)] for n in lines] for d in depths]
    means = [[sum(cell) / len(cell) if cell else float("nan") for cell in row] for row in cells]
    image = ax.imshow(means, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    for y, row in enumerate(means):
        for x, mean in enumerate(row):
            if mean == mean:  # not NaN
                ax.text(x, y, f"{mean:.2f}", ha="center", va="center", fontsize=7, color="white" if mean < 0.6 else "black")
    ax.set_xticks(range(len(lines)), [str(n) for n in lines])
    ax.set_yticks(range(len(depths)), [f"{d:.2f}" for d in depths])
    return image


def save_depth_maps(file: Path, by_policy: Mapping[str, Sequence[Row]], title: str) -> Path:
    """Draw a `depth_map` for each policy (by label) into one PNG, all on the same scale of colours."""
    columns = min(4, len(by_policy))
    lines = -(-len(by_policy) // columns)
    figure, axes = _pyplot().subplots(
        lines, columns, figsize=(1.6 + 2.8 * columns, 0.9 + 2.2 * lines), dpi=150, squeeze=False, sharex=True, sharey=True,
        layout="constrained",
    )  # fmt: skip
    for ax, (label, samples) in zip(axes.flat, by_policy.items(), strict=False):
        image = depth_map(ax, samples)
        ax.set_title(label, fontsize=8)
    for ax in axes.flat[len(by_policy) :]:
        ax.set_visible(False)
    figure.supxlabel("lines in the context", fontsize=9)
    figure.supylabel("depth of the asked line (0 = first, 1 = last)", fontsize=9)
    figure.suptitle(title, fontsize=10)
    figure.colorbar(image, ax=axes, label="accuracy", shrink=0.8)
    return _save(figure, file)


def risk_lines(ax: Any, rows: Sequence[Row]) -> None:
    """One risk: its rate (with 95 % interval) against the counted size of the cache, a line per policy; the full cache's
    rate is a level to compare with. Rows: policy, size (per cent), rate, low, high."""
    for name in dict.fromkeys(row["policy"] for row in rows):
        mine = sorted((row for row in rows if row["policy"] == name), key=lambda row: row["size"])
        colour, marker = look(name)
        rate = [row["rate"] for row in mine]
        if name == "full":
            ax.axhline(rate[0], color=colour, linestyle="--", linewidth=1, label=name)
            ax.axhspan(mine[0]["low"], mine[0]["high"], color=colour, alpha=0.08, linewidth=0)
            continue
        ax.errorbar(
            [row["size"] for row in mine],
            rate,
            yerr=[[row["rate"] - row["low"] for row in mine], [row["high"] - row["rate"] for row in mine]],
            fmt=f"{marker}-", color=colour, elinewidth=0.8, capsize=2, markersize=5, linewidth=1.2, label=name, alpha=0.9,
        )  # fmt: skip
    ax.set_ylim(-0.03, 1.03)
    ax.grid(True, linewidth=0.3)


def save_risks(file: Path, rows: Sequence[Row], title: str) -> Path:
    """Draw `risk_lines` for each `risk` into one PNG."""
    names = list(dict.fromkeys(row["risk"] for row in rows))
    columns = min(4, len(names))
    lines = -(-len(names) // columns)
    figure, axes = _pyplot().subplots(
        lines, columns, figsize=(0.8 + 3 * columns, 1.4 + 2.3 * lines), dpi=150, squeeze=False, sharex=True, sharey=True,
        layout="constrained",
    )  # fmt: skip
    for ax, name in zip(axes.flat, names, strict=False):
        mine = [row for row in rows if row["risk"] == name]
        risk_lines(ax, mine)
        ax.set_title(f"{name.replace('_', ' ')} (n = {mine[0]['n']})", fontsize=8)
    for ax in axes.flat[len(names) :]:
        ax.set_visible(False)
    figure.supxlabel("cache size, % of the 16-bit cache (bytes counted from stored tensors)", fontsize=9)
    figure.supylabel("rate, lower is better (bars: 95 % interval)", fontsize=9)
    handles = {label: handle for ax in axes.flat for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=len(handles), fontsize=8, title=title)
    return _save(figure, file)


def _pyplot() -> Any:
    """pyplot without a screen."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _save(figure: Any, file: Path) -> Path:
    figure.savefig(file)
    _pyplot().close(figure)
    return file
