"""Depth maps: which samples a cell stands for."""

from __future__ import annotations

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from mikv.plots.depth import depth_map


def test_a_cell_is_the_mean_of_the_samples_of_its_size_and_nearest_depth() -> None:
    """Asked lines of 10 and of 20 stand at other depths: 2 of 9 and 5 of 19 are both a quarter."""
    found = [(10, 2 / 9, 1.0), (10, 2 / 9, 0.0), (20, 5 / 19, 1.0), (20, 0.0, 0.0), (20, 1.0, 0.0)]
    samples = [{"lines": lines, "depth": depth, "score": score} for lines, depth, score in found]
    figure, ax = plt.subplots()
    image = depth_map(ax, samples)
    cells = image.get_array().filled(-1).tolist()
    assert [label.get_text() for label in ax.get_xticklabels()] == ["10", "20"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["0.00", "0.25", "1.00"]
    assert cells == [[-1, 0.0], [0.5, 1.0], [-1, 0.0]]
    assert {text.get_text() for text in ax.texts} == {"0.00", "0.50", "1.00"}
    plt.close(figure)
