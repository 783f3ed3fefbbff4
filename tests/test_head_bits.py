"""Key bits by head: the bits that are given away, where they go, and what is stored then."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from conftest import NO_END, engine, model, tokens

from mikv.budget import Amounts
from mikv.cache.policy_store import PolicyStore
from mikv.cache.sides import Fits
from mikv.engine import Engine
from mikv.head_bits import HeadBits
from mikv.importance.base import Context
from mikv.importance.scores import ColumnSums
from mikv.quant.chain import chain_of
from mikv.whiten import whiten

ABOVE = Amounts((0.0,), (4,))


@pytest.mark.parametrize("extra", [0.0, 0.25, 0.5, 1.0, 1.75, 2.0])
def test_no_other_way_to_give_the_bits_leaves_less_noise(extra: float) -> None:
    """Against all ways there are, for eight heads of two layers."""
    weight = torch.rand(2, 1, 4, generator=torch.Generator().manual_seed(3)) ** 3
    bits = HeadBits(ABOVE, (4, 3, 2), extra)._filled(weight)
    assert bits.shape == weight.shape
    assert int((bits - 2).sum()) == round(8 * extra)
    noise = float((weight.double() * 4.0**-bits).sum())
    flat = weight.double().flatten()
    ways = (torch.tensor(way) for way in product((2, 3, 4), repeat=8) if sum(way) == 16 + round(8 * extra))
    assert noise == pytest.approx(min(float((flat * 4.0**-way).sum()) for way in ways))


def test_rows_are_filled_apart() -> None:
    weight = torch.rand(3, 2, 2, generator=torch.Generator().manual_seed(1))
    made = HeadBits(ABOVE, (4, 3, 2), 0.5)
    both = made._filled(weight)
    for row in range(2):
        assert torch.equal(both[:, row], made._filled(weight[:, row : row + 1])[:, 0])


@pytest.mark.parametrize("options", [{"bits": (4,)}, {"bits": (4, 2)}, {"bits": (2, 3)}, {"extra": 2.5}, {"extra": -0.1}])
def test_impossible_bits_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="bits"):
        HeadBits(**{"above": ABOVE, "bits": (4, 3, 2), "extra": 1.0, **options})


@pytest.mark.parametrize(("query_heads", "kv_heads"), [(4, 4), (6, 2), (8, 1)])
def test_the_noise_that_is_foretold_is_that_of_the_logits(
    query_heads: int, kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every query meets every key as it is read back; the mean square error of the logits, over the code's relative error."""
    from mikv.cache import prefill

    queries: list[torch.Tensor] = []
    attend = prefill.causal_attention
    monkeypatch.setattr(prefill, "causal_attention", lambda query, *rest: (queries.append(query), attend(query, *rest))[1])
    run = Engine(model(query_heads=query_heads, kv_heads=kv_heads, head_dim=64, hidden_size=16 * query_heads), NO_END, 257)
    state = run.prefill([tokens(300)], {ColumnSums()})
    (bank,) = state.banks
    chain = chain_of(["centre", "balance/rms", "rotate", "codebook2"])
    foretold = Fits(state, bank).key_noise(chain, 4)[:, 0] * 0.117  # what two bits of the codebook leave
    store = run.compress(state, [whiten(2, window=0, keep=0.0, code="codebook")]).banks[0].stores[0]
    _, (_, _, keys, _) = store.read()
    error = keys[:, 0] - bank.keys[:, 0, :, 4:].float()
    group = query_heads // kv_heads
    for layer, head in product(range(2), range(kv_heads)):
        of_group = queries[layer][0, head * group : (head + 1) * group].flatten(0, 1)
        seen = float((of_group @ error[layer, head].T / 8).square().mean())
        assert seen == pytest.approx(float(foretold[layer, head]), rel=0.3)


def test_each_head_holds_its_tokens_at_its_own_bits_and_bytes_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    settle, widths = PolicyStore._settle, []

    def counting(self: PolicyStore, index: int, tier: Any, incoming: Any, *rest: Any) -> Any:
        widths.append({tensor.shape[3] for tensor in incoming if tensor is not None})
        return settle(self, index, tier, incoming, *rest)

    monkeypatch.setattr(PolicyStore, "_settle", counting)
    run = engine(layers=3)
    plain, more = whiten(2, window=6, keep=0.0), whiten(2, extra=0.5, window=6, keep=0.0)
    state = run.prefill([tokens(60), tokens(33, seed=1)], more.observers)
    cache = run.compress(state, [plain, more])
    for step in range(5):
        run.step(cache, torch.full((4,), step), torch.tensor([60, 33] * 2) + step, torch.ones(4, dtype=torch.bool))
    assert len(widths) == 5 * (2 + 4)  # steps, tiers of both policies from the window's on
    assert all(width == {1} for width in widths)  # a step handles one token, also where it passes tiers that hold many
    two = cache.banks[0].stores[1]
    counts = torch.stack([tier.count for tier in two.tiers])
    assert (counts[0] == 4).all()
    assert (counts[1] == 6).all()
    coded = counts[2:]
    assert ((coded > 0).sum(dim=0) == 1).all()  # in one tier
    assert (coded.sum(dim=0) == torch.tensor([65 - 10, 38 - 10])[None, :, None]).all()
    bits = (coded > 0).float().permute(1, 2, 3, 0) @ torch.tensor([4.0, 3.0, 2.0])
    assert (bits.sum(dim=(0, 2)) == 2 * 6 + 3).all()  # half a bit for each of six heads
    more_bytes = [b.nbytes["codes"] - a.nbytes["codes"] for a, b in zip(cache.usage()[:2], cache.usage()[2:], strict=True)]
    assert more_bytes == [3 * 55 * 16 // 8, 3 * 28 * 16 // 8]
    assert all(u.nbytes["positions"] == 4 * 6 * 6 for u in cache.usage())  # all but the window's follow from the slots
    for tier in two.tiers[2:]:
        for place in product(range(3), range(2), range(2)):
            held = tier.positions()[place][: tier.count[place]]
            assert held.tolist() == list(range(4, 4 + len(held)))


def test_an_attention_that_coded_tokens_receive_nothing_of_needs_no_bits() -> None:
    """The same noise in all heads; in one of them all attention is on the sinks."""
    observed = torch.ones(1, 1, 4, 40)
    observed[0, 0, 2, 4:] = 0
    positions = torch.arange(40).expand(1, 1, 4, 40)
    context = Context(
        layers=torch.zeros(1, dtype=torch.long), total_layers=1, prompts=torch.zeros(1), positions=positions,
        seen=torch.tensor([40]), prompt_lengths=torch.tensor([40]), protected=positions < 4, keys=torch.zeros(1, 1, 4, 40, 16),
        values=torch.zeros(1, 1, 4, 40, 16), observed=observed, key_noise=lambda: torch.ones(1, 1, 4),
    )  # fmt: skip
    quotas = HeadBits(ABOVE, (3, 2), 0.75).quotas(None, replace(context, everywhere=lambda: [context]))
    assert quotas[0].flatten().tolist() == [4] * 4
    assert (quotas[1] > 1000).flatten().tolist() == [True, True, False, True]
