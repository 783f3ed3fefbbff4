"""Scores: fp32, deterministic, blind to the future and to batch mates."""

from __future__ import annotations

import pytest
import torch
from conftest import engine, tokens
from torch import Tensor

from mikv.budget import Amounts
from mikv.cache.policy_store import Change, Received
from mikv.importance.base import Context, Importance
from mikv.importance.scores import Accumulated, ColumnSums, Late, Noise, PerQuery
from mikv.policy import Policy
from mikv.quant.tier import Tier


def test_ten_thousand_small_increments_still_count() -> None:
    """fp16 sums swallow them (trap T24)."""
    scores, mass = torch.full((1, 1, 1, 1), 4000.0), torch.full((1, 1, 1, 1), 0.1)
    for _ in range(10_000):
        scores = Accumulated().update(scores, mass, torch.ones(1, 1, 1, 1))
    assert scores.dtype == torch.float32
    assert abs(scores.item() - 5000) < 1


def test_padding_never_counts() -> None:
    """Column sums of a left-padded row are those of the row alone, and padding has none (trap T22)."""
    observer = Accumulated().observer
    run = engine()
    together = run.prefill([tokens(40), tokens(25, seed=1)], {observer}).banks[0]
    alone = run.prefill([tokens(25, seed=1)], {observer}).banks[0]
    assert torch.allclose(together.observed[observer][:, 1:, :, 15:], alone.observed[observer], atol=1e-4)
    assert (together.observed[observer][:, 1, :, :15] == 0).all()
    assert torch.allclose(together.query_absmax[:, 1:], alone.query_absmax, atol=1e-5)
    assert torch.allclose(together.query_squares[:, 1:], alone.query_squares, rtol=1e-4)


def test_column_sums_add_up_to_the_number_of_queries() -> None:
    observer = Accumulated().observer
    run = engine()
    sums = run.prefill([tokens(33)], {observer}).banks[0].observed[observer]
    group = run.geometry.query_heads // run.geometry.kv_heads
    assert torch.allclose(sums.sum(dim=-1), torch.full(sums.shape[:3], 33.0 * group), rtol=1e-4)


def context(layers: torch.Tensor, prompts: list[int], positions: torch.Tensor) -> Context:
    """Of positions [L, B, H, T]; what noise does not look at is empty."""
    none = torch.zeros(0)
    return Context(layers, len(layers), torch.tensor(prompts), positions, none, none, none, none, none)


def noise(rows: list[int], positions: torch.Tensor, seed: int = 0, layers: int = 3, heads: int = 2) -> torch.Tensor:
    shape = (layers, len(rows), heads, positions.shape[-1])
    return Noise(seed).score(context(torch.arange(layers), rows, positions[None, :, None].expand(shape)))


def test_noise_is_uniform_and_differs_by_everything_it_belongs_to() -> None:
    scores = noise([11, 12], torch.arange(5000).expand(2, -1))
    assert scores.shape == (3, 2, 2, 5000)
    assert 0 <= scores.min() < 0.001
    assert 0.999 < scores.max() < 1
    assert abs(scores.mean() - 0.5) < 0.01
    flat = scores.flatten(0, 2)
    correlation = torch.corrcoef(flat) - torch.eye(len(flat))
    assert correlation.abs().max() < 0.06  # 12 independent rows of 5000
    assert not torch.equal(scores, noise([11, 12], torch.arange(5000).expand(2, -1), seed=1))


def test_noise_is_the_same_alone_in_a_batch_and_on_entry() -> None:
    alone = noise([7], torch.arange(10)[None])
    batch = noise([3, 7], torch.stack((torch.arange(14), torch.arange(-4, 10))))
    assert torch.equal(alone[:, 0], batch[:, 1, :, 4:])
    entry = Noise().score(context(torch.arange(3), [7], torch.full((3, 1, 2, 1), 9)))
    assert torch.equal(entry, alone[..., 9:])


def test_random_importance_differs_between_prompts() -> None:
    """Otherwise the floor line would be one draw, not many."""
    run = engine()
    rows = run.prefill([tokens(20), tokens(20, seed=1)]).prompts
    assert rows[0] != rows[1]
    assert run.prefill([tokens(20, seed=1)]).prompts[0] == rows[1]


def all_kept(score: Importance) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Scores of a prompt of 30 and of 12 more tokens, positions alike, and the steps' attention, of a cache that keeps all."""
    run = engine()
    policy = Policy("all", "all", (Tier(16), Tier(2)), Amounts((1.0,)), score)
    state = run.prefill([tokens(30)], policy.observers)
    cache = run.compress(state, [policy])
    (store,) = cache.banks[0].stores
    masses, step = [], store.step

    def watched(keys: Tensor, values: Tensor, received: Received, active: Tensor) -> list[Change]:
        assert received.newest is not None
        held = received.tiers[0]
        assert held is not None
        masses.append(torch.cat((held[..., : int(store.tiers[0].count[0, 0, 0])], received.newest[..., None]), dim=-1))
        return step(keys, values, received, active)

    store.step = watched  # type: ignore[method-assign]
    for new in range(12):
        run.step(cache, torch.tensor([new]), torch.tensor([30 + new]), torch.tensor([True]))
    used = int(store.tiers[0].count[0, 0, 0])
    scores = store.tiers[0].scores()
    assert scores is not None
    return scores[..., :used], store.tiers[0].positions()[..., :used], masses


def test_attention_per_query_is_what_was_received_over_the_queries_that_could_see_the_token() -> None:
    total, positions, _ = all_kept(Accumulated())
    mean, same, _ = all_kept(PerQuery())
    assert torch.equal(positions, same)
    assert positions[0, 0, 0].tolist() == list(range(42))
    assert torch.allclose(mean, total / (42 - positions), rtol=1e-4, atol=1e-6)


def test_late_attention_is_that_of_the_prompts_last_queries_and_fades() -> None:
    score = Late(last=8)
    found, _, masses = all_kept(score)
    run = engine()
    wanted = run.prefill([tokens(30)], {ColumnSums(8)}).banks[0].observed[ColumnSums(8)]
    for mass in masses:
        wanted = torch.cat((wanted, torch.zeros_like(wanted[..., :1])), dim=-1) * (1 - 1 / 8) + mass
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-6)
    group = run.geometry.query_heads // run.geometry.kv_heads
    assert wanted.sum(dim=-1).max() < group * 8.001  # about as much as eight queries give
    with pytest.raises(ValueError, match="sees nothing"):
        Late(last=0)
