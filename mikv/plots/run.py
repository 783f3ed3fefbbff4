"""The figures of a run's folder: each is drawn where the run has what it shows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mikv.plots import curve, depth

Row = dict[str, Any]


def figures(summary: Sequence[Row], samples: Mapping[str, Sequence[Row]]) -> Iterator[tuple[str, str, Callable[[Path], None]]]:
    """What there is to draw: its kind, its file's name, and how.

    summary: a row per policy; samples: each policy's records, by label, the full cache's first.
    """
    yield "plot", "curve.png", partial(curve.save_curve, rows=summary)
    if placed := depth.placed(samples):
        title = f"{summary[0]['model']} on {summary[0]['task']}, n = {len(next(iter(placed.values())))}"
        yield "map", "depth.png", partial(depth.save_depth_maps, by_policy=placed, title=title)


def save_figures(folder: Path, summary: Sequence[Row], samples: Mapping[str, Sequence[Row]]) -> Iterator[tuple[str, Path]]:
    """Draw the figures of a folder whose summary has been written, and say of each its kind and file; one that is newer than
    the summary is left as it is, and one that can't be written is a note."""
    written = (folder / "summary.jsonl").stat().st_mtime
    for kind, name, draw in figures(summary, samples):
        file = folder / name
        try:
            if not file.exists() or file.stat().st_mtime < written:
                draw(file)
            yield kind, file
        except OSError as error:
            print(f"note: {file} can't be drawn ({error.strerror})")
