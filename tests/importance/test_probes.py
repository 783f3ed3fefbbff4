"""Salience from probe queries: what its definition says, the same in any batch, and never of a shared prefix alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from conftest import engine, tokens
from torch import Tensor

from mikv.importance.probes import Probes, Salience
from mikv.importance.scores import ColumnSums
from mikv.types import Geometry, Lengths


class Everything:
    """Keeps the probabilities [L, B, H, G, T, T] of a prompt."""

    def __init__(self, geometry: Geometry, lengths: Lengths) -> None:
        group, batch = geometry.query_heads // geometry.kv_heads, len(lengths.tokens)
        self.probs = torch.zeros(geometry.layers, batch, geometry.kv_heads, group, lengths.width, lengths.width)

    def block(self, layer: int, probs: Tensor, first: int, real_queries: Tensor) -> None:  # noqa: ARG002
        self.probs[layer, :, :, :, first : first + probs.shape[3], : probs.shape[4]] = probs

    def result(self) -> Tensor:
        return self.probs


@dataclass(frozen=True)
class Watch(ColumnSums):
    def start(self, geometry: Geometry, lengths: Lengths, device: torch.device) -> Any:  # noqa: ARG002
        return Everything(geometry, lengths)


@pytest.mark.parametrize(("share", "seed"), [(0.1, 0), (0.5, 3), (1, 1)])
@pytest.mark.parametrize("length", [47, 130, 600])
def test_salience_is_the_probes_attention_over_the_probes_that_can_see_a_token(share: float, seed: int, length: int) -> None:
    watch, probes = Watch(), Probes(share=share, seed=seed)
    by_length = Probes(share=share, per="length", seed=seed)
    observed = engine().prefill([tokens(length)], {watch, probes, by_length}).banks[0].observed
    weights = probes.weights(length).tolist()
    layer, head = 1, 0
    probs = observed[watch][layer, 0, head].tolist()
    sums, able = [0.0] * length, [0.0] * length
    for query, weight in enumerate(weights):
        for key in range(query + 1 if weight else 0):
            sums[key] += weight * sum(of_head[query][key] for of_head in probs)
            able[key] += weight
    wanted = torch.tensor([total / number for total, number in zip(sums, able, strict=True)])
    torch.testing.assert_close(observed[probes][layer, 0, head], wanted, rtol=1e-4, atol=1e-7)
    # the official division; times T / n, which changes no rank and keeps it a mean
    wanted = torch.tensor([total / (length - i) * length / sum(weights) for i, total in enumerate(sums)])
    torch.testing.assert_close(observed[by_length][layer, 0, head], wanted, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("length", [0, 1, 2, 19, 20, 21, 100, 640])
def test_half_of_the_probes_are_the_last_queries_and_as_many_are_drawn_among_the_others(length: int) -> None:
    weights = Probes().weights(length)
    last = length - int(length - 0.05 * length)  # as the official code cuts
    assert (weights[length - last :] == 1).all()
    assert weights.sum() == last + int(0.05 * length)
    assert torch.equal(weights, weights.round())


def test_draws_spread_over_the_prompt_and_differ_by_seed() -> None:
    drawn = torch.stack([Probes(seed=seed).weights(4000)[:3800] for seed in range(20)])
    assert not torch.equal(drawn[0], drawn[1])
    parts = drawn.unflatten(-1, (10, 380)).sum(dim=(0, 2))
    assert parts.sum() == 20 * 200
    assert (parts - 400).abs().max() < 80  # four deviations


@pytest.mark.parametrize("per", ["probes", "length"])
def test_a_prompt_alone_and_in_a_batch_has_the_same_salience_and_padding_none(per: str) -> None:
    observer, run = Probes(per=per), engine()
    together = run.prefill([tokens(60), tokens(33, seed=1)], {observer}).banks[0].observed[observer]
    alone = run.prefill([tokens(33, seed=1)], {observer}).banks[0].observed[observer]
    torch.testing.assert_close(together[:, 1:, :, 27:], alone, rtol=1e-4, atol=1e-6)
    assert (together[:, 1, :, :27] == 0).all()


def test_a_shared_prefix_hides_no_probe() -> None:
    """Which queries of a prefix are probes is known with the whole prompt."""
    observer, run = Probes(), engine()
    contexts = [tokens(40) + tokens(rest, seed=rest) for rest in (5, 12)]
    whole = run.prefill(contexts, {observer}).banks[0].observed[observer]
    shared = run.prefill(contexts, {observer}, shared=40).banks[0].observed[observer]
    torch.testing.assert_close(shared, whole, rtol=1e-4, atol=1e-6)


def test_while_decoding_it_is_the_running_mean() -> None:
    score, masses = Salience(), torch.rand(6, generator=torch.Generator().manual_seed(0))
    now = torch.zeros(1)
    for queries, mass in enumerate(masses, start=1):
        now = score.update(now, mass, torch.tensor([queries]))
    torch.testing.assert_close(now[0], masses.mean())
    assert score.observer == Probes()
    assert Salience(0.2, "length", 3).observer == Probes(share=0.2, per="length", seed=3)


@pytest.mark.parametrize(("share", "per"), [(0, "probes"), (1.1, "probes"), (True, "probes"), (0.1, "all")])
def test_what_are_no_probes_is_refused(share: float, per: str) -> None:
    with pytest.raises(ValueError, match=r"probes=|per="):
        Salience(share, per)
