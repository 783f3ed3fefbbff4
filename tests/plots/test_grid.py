"""The grid of curves: a panel per model and task, and in it what the rows say."""

from __future__ import annotations

from typing import Any

import matplotlib
import pytest

matplotlib.use("Agg")

from mikv.plots import curve_grid, dot_grid


def row(policy: str, size: float, value: float, **more: Any) -> dict[str, Any]:
    ci95 = None if value == 0 else [value / 2, min(1.0, 2 * value)]
    head = {"model": "tiny", "task": "digits", "measure": "accuracy", "lower_is_better": False, "n": 8}
    return head | {"policy": policy, "size_percent": size, "value": value, "ci95": ci95} | more


ROWS = [
    row("full", 100, 0.9),
    row("mikv", 40, 0.5),
    row("mikv", 30, 0.6),
    row("mikv", 20, 0.2),
    row("h2o", 25, 0.1),
    row("full", 100, 0.9, task="letters"),
    row("full", 100, 0.9, task="letters", n=4),
]


def lines(ax: Any, style: str) -> list[list[list[float]]]:
    return [[list(map(float, axis)) for axis in line.get_data()] for line in ax.lines if line.get_drawstyle() == style]


def test_the_line_of_a_policy_is_the_best_within_so_many_bytes() -> None:
    figure = curve_grid(ROWS, "title")
    ax, other = figure.axes
    assert (ax.get_title(), other.get_title()) == ("tiny · digits (n = 8)", "tiny · letters (n = 4, 8)")
    full, mikv, h2o = lines(ax, "steps-post")
    assert mikv == [[20, 30, 104], [0.2, 0.6, 0.6]]
    assert h2o == [[25, 104], [0.1, 0.1]]
    assert full == [[0, 104], [0.9, 0.9]]  # a level
    (front,) = [line for line in ax.lines if line.get_linestyle() == "--"]
    assert [list(map(float, axis)) for axis in front.get_data()] == [[20, 30, 100], [0.2, 0.6, 0.9]]


def test_a_divergence_is_logarithmic_and_leaves_out_what_is_0() -> None:
    rows = [row("full", 100, 0.0), row("mikv", 30, 0.01), row("h2o", 20, 1.0)]
    figure = curve_grid([{**r, "measure": "kl", "lower_is_better": True} for r in rows], "title")
    (ax,) = figure.axes
    assert ax.get_yscale() == "log"
    assert ax.get_ylabel() == "kl, nats per token, lower is better"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["mikv", "h2o", "Pareto front"]


def test_panels_may_come_in_the_order_of_the_rows() -> None:
    """So many side by side, none for a pair of model and task that there is not; of the axis what is asked for."""
    rows = [*ROWS, row("full", 100, 0.9, model="small", task="letters")]
    figure = curve_grid(rows, "title", columns=2, sizes=(10, 50))
    titles = [ax.get_title().split(" (")[0] for ax in figure.axes if ax.axison]
    assert titles == ["tiny · digits", "tiny · letters", "small · letters"]
    assert figure.axes[0].get_xlim() == (10, 50)
    assert [bool(ax.get_xlabel()) for ax in figure.axes if ax.axison] == [False, True, True]  # the lowest of each column
    assert len({ax.get_subplotspec().rowspan.start for ax in figure.axes}) == 2


def test_ways_stand_in_lines_with_the_first_ones_level() -> None:
    ways = [
        row("a", 20, value, group=group, name=name)
        for group, name, value in (("g", "x", 0.5), ("g", "y", 0.2), ("h", "z", 0.4))
    ]
    other = row("a", 20, 0.3, task="letters", group="g", name="y")  # a panel that lacks some of them
    figure = dot_grid([*ways, other], "title")
    ax, second = figure.axes
    assert [label.get_text() for label in ax.get_yticklabels()] == ["x", "y", "z"]
    points = [[float(x) for x in line.get_data()[0]] for line in ax.lines if line.get_marker() == "o"]
    assert points == [[0.5], [0.2], [0.4]]
    assert [list(line.get_xdata()) for line in ax.lines if line.get_linestyle() == "--"] == [[0.5, 0.5], [0.4, 0.4]]
    assert [list(line.get_ydata()) for line in second.lines if line.get_marker() == "o"] == [[1]]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["g", "h"]
    (spread,) = [c.get_segments() for c in ax.collections[:1]]
    assert [float(x) for x in spread[0][:, 0]] == [0.25, 1.0]


def test_labels_lie_on_nothing() -> None:
    """Legend, axis labels and panels share no pixel."""
    figure = curve_grid(ROWS, "title")
    figure.canvas.draw()
    boxes = [figure.legends[0].get_window_extent(), *(ax.get_tightbbox() for ax in figure.axes)]
    for i, box in enumerate(boxes):
        for other in boxes[i + 1 :]:
            assert not box.overlaps(other)


@pytest.fixture(autouse=True)
def close() -> Any:
    yield
    import matplotlib.pyplot as plt

    plt.close("all")
