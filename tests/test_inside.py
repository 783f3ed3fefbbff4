"""What is shown of a cache is what the store holds."""

from __future__ import annotations

import numpy as np
import pytest

from mikv.config import compose, policy
from mikv.inside import Inside, look_inside, unbalanced
from mikv.models.load import load


@pytest.fixture(scope="module")
def views() -> dict[str, Inside]:
    run = compose("model=tiny-random", "task.lines=2", "task.limit=1")
    work = run.open()
    loaded = load(run.model)
    (request,) = work.encode(work.units()[0], loaded).requests
    mikv = policy("mikv", {"low.bits": 3})
    panel = {"mikv": mikv, "unbalanced": unbalanced(mikv), "h2o": policy("h2o"), "full": policy("full")}
    return dict(zip(panel, look_inside(loaded, request, list(panel.values())), strict=True))


def test_bits_are_those_of_the_tiers_within_their_budget(views: dict[str, Inside]) -> None:
    for name, low in (("mikv", 3), ("h2o", 0), ("full", 16)):
        bits = views[name].bits
        tokens = bits.shape[2]
        assert len(views[name].tokens) == tokens
        assert set(np.unique(bits)) == {16, low}
        if name != "full":
            assert ((bits == 16).sum(axis=2) == tokens // 5).all()
            recent = tokens // 5 // 2
            assert (bits[:, :, tokens - recent :] == 16).all()


def test_the_important_tokens_are_in_the_first_tier(views: dict[str, Inside]) -> None:
    view = views["mikv"]
    assert view.importance is not None
    tokens = view.bits.shape[2]
    old = tokens - tokens // 5 // 2
    for importance, bits in zip(view.importance.reshape(-1, tokens), view.bits.reshape(-1, tokens), strict=True):
        kept = bits[:old] == 16
        assert importance[:old][kept].min() >= importance[:old][~kept].max()
    assert views["full"].importance is None


def test_balanced_queries_and_keys_are_equally_large(views: dict[str, Inside]) -> None:
    view = views["mikv"]
    assert view.query_absmax / view.balancer == pytest.approx(view.key_absmax * view.balancer, rel=0.01)  # stored in 16 bits
    assert (views["unbalanced"].balancer == 1).all()
    assert views["unbalanced"].label.endswith("no balancer")


def test_errors_are_those_of_the_lower_tier(views: dict[str, Inside]) -> None:
    """16 bits of a float32 model round a little; three bits at most half a step of 7 in a group's range."""
    assert 0 < views["full"].key_error.max() < 0.01
    for view in (views["mikv"], views["unbalanced"]):
        assert view.key_error.shape == view.key_absmax.shape
        assert view.key_error.max() > 0.01 * view.key_absmax.max()
    unbalanced = views["unbalanced"]
    range_of_group = 2 * unbalanced.key_absmax.reshape(*unbalanced.key_absmax.shape[:2], 2, -1).max(axis=-1)
    assert (unbalanced.key_error.reshape(*range_of_group.shape, -1) <= 1.01 * range_of_group[..., None] / 14).all()
    # values are not balanced, so the balancer changes nothing about them
    assert views["mikv"].value_error == pytest.approx(views["unbalanced"].value_error)
