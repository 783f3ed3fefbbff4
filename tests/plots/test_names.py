"""Names are drawn as they are: none is a formula, and a wrong formula stops no figure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pytest
from conftest import ROOT
from matplotlib.text import Text

from mikv.plots import curve_figure, curve_grid, risk_grid, save_depth_maps
from mikv.plots.style import look
from mikv.results import read_results

NAME = r"$\frac$ [bold]<b>"


def drawn(figure: Any) -> str:
    """All that a figure writes; drawing it raises where a formula is wrong."""
    figure.canvas.draw()
    texts = [text._preprocess_math(text.get_text()) for text in figure.findobj(Text)]
    return "\n".join(text for text, formula in texts if not formula)


def test_policies_that_the_project_does_not_know_look_different_from_each_other() -> None:
    """Within one figure of strangers, and from those that it knows."""
    looks = {look(name) for name in ("mikv", "h2o", "blocks", "jury", "pyramid", "ladder")}
    assert len(looks) == 6
    assert look("blocks") == look("blocks")


def test_a_curve() -> None:
    rows = read_results(ROOT / "results" / "reference" / "recall-linerecall").summary
    named = [{**row, "model": f"model {NAME}", "task": f"task {NAME}", "metric": f"metric {NAME}"} for row in rows]
    text = drawn(curve_figure([{**row, "label": f"label {NAME}", "policy": f"policy {NAME}"} for row in named]))
    assert all(f"{kind} {NAME}" in text for kind in ("model", "task", "metric", "label", "policy"))


def test_grids() -> None:
    row = {"size_percent": 20, "value": 0.5, "ci95": None, "lower_is_better": False, "n": 8}
    names = {kind: f"{kind} {NAME}" for kind in ("model", "task", "measure", "policy")}
    text = drawn(curve_grid([row | names], f"title {NAME}"))
    assert all(name in text for name in (*names.values(), f"title {NAME}"))
    rates = [{"risk": f"risk {NAME}", "size": 20, "rate": 0.5, "low": None, "high": None, "n": 8}]
    full, other = (rates[0] | {"policy": policy} for policy in ("full", f"policy {NAME}"))
    text = drawn(risk_grid([full, other], "title"))
    assert f"risk {NAME}" in text
    assert f"policy {NAME}" in text


def test_depth_maps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    monkeypatch.setattr(plt, "close", found.append)  # keep the figure
    save_depth_maps(tmp_path / "depth.png", {f"label {NAME}": [{"lines": 10, "depth": 0.5, "score": 1.0}]}, f"title {NAME}")
    text = drawn(found[0])
    assert f"label {NAME}" in text
    assert f"title {NAME}" in text


@pytest.fixture(autouse=True)
def close() -> Any:
    yield
    plt.close("all")
