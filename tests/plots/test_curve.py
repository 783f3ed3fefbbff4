"""The figure of a run: labels beside their points, on nothing else."""

from __future__ import annotations

import itertools

import matplotlib.pyplot as plt
import pytest
from conftest import ROOT

from mikv.plots import curve_figure
from mikv.results import read_results

REFERENCE = ROOT / "results" / "reference"


@pytest.mark.parametrize("name", sorted(file.parent.name for file in REFERENCE.glob("*/summary.jsonl")))
def test_labels_lie_on_no_other_label_and_on_no_point(name: str) -> None:
    rows = read_results(REFERENCE / name).summary
    figure = curve_figure(rows)
    (ax,) = figure.axes
    figure.canvas.draw()
    labels = [text.get_window_extent() for text in ax.texts]
    points = [ax.transData.transform((row["size_percent"], row["value"])) for row in rows if row["value"] > 0]
    plt.close(figure)
    divergence = ax.get_yscale() == "log"
    crowded = name.startswith(("field-", "importance-"))  # of these no more than have room; the run's table has them all
    assert len(labels) == len(rows) - divergence or (crowded and len(labels) >= 2)
    assert ("full" in [text.get_text() for text in ax.texts]) != divergence  # its own is 0
    assert not [pair for pair in itertools.combinations(labels, 2) if pair[0].overlaps(pair[1])]
    assert not [label for label in labels if any(label.contains(*point) for point in points)]
