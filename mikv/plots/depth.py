"""Score by the length of a context and the place of what is asked for in it: a map per policy of one run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mikv.plots.style import literal, pyplot, save

Row = dict[str, Any]


def placed(samples: Mapping[str, Sequence[Row]]) -> dict[str, list[Row]]:
    """Of each policy's samples (by label) those that know their lines and depth; empty where all have equally many lines."""
    found = {label: [row for row in rows if "lines" in row and "depth" in row] for label, rows in samples.items()}
    first = next(iter(found.values()))
    return found if len({row["lines"] for row in first}) > 1 else {}


def depth_map(ax: Any, samples: Sequence[Row]) -> Any:
    """Mean score by the number of lines in the context and the depth of the line that is asked for (0 = first, 1 = last),
    of one policy's samples; each cell says its value. Returns the image, for a colour bar."""
    lines = sorted({row["lines"] for row in samples})
    depths = sorted({_bin(row["depth"]) for row in samples})
    cells = [[[row["score"] for row in samples if (row["lines"], _bin(row["depth"])) == (n, d)] for n in lines] for d in depths]
    means = [[sum(cell) / len(cell) if cell else float("nan") for cell in row] for row in cells]
    image = ax.imshow(means, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    for y, row in enumerate(means):
        for x, mean in enumerate(row):
            if mean == mean:  # not NaN
                ax.text(x, y, f"{mean:.2f}", ha="center", va="center", fontsize=7, color="white" if mean < 0.6 else "black")
    ax.set_xticks(range(len(lines)), [str(n) for n in lines])
    ax.set_yticks(range(len(depths)), [f"{d:.2f}" for d in depths])
    return image


def _bin(depth: float) -> float:
    """The nearest of five depths: the line in the middle of 20 stands at 0.47 or 0.53."""
    return round(4 * depth) / 4


def save_depth_maps(file: Path, by_policy: Mapping[str, Sequence[Row]], title: str) -> None:
    """Draw a `depth_map` for each policy (by label) into one PNG, all on the same scale of colours."""
    columns = min(4, len(by_policy))
    lines = -(-len(by_policy) // columns)
    figure, axes = pyplot().subplots(
        lines, columns, figsize=(1.6 + 2.8 * columns, 0.9 + 2.2 * lines), dpi=150, squeeze=False, sharex=True, sharey=True,
        layout="constrained",
    )  # fmt: skip
    for ax, (label, samples) in zip(axes.flat, by_policy.items(), strict=False):
        image = depth_map(ax, samples)
        ax.set_title(literal(label), fontsize=8)
    for ax in axes.flat[len(by_policy) :]:
        ax.set_visible(False)
    figure.supxlabel("lines in the context", fontsize=9)
    figure.supylabel("depth of the asked line (0 = first, 1 = last)", fontsize=9)
    figure.suptitle(literal(title), fontsize=10)
    figure.colorbar(image, ax=axes, label="accuracy", shrink=0.8)
    save(figure, file)
