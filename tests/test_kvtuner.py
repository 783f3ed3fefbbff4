"""KVTuner: each layer in its own tier, whatever the model, and the authors' bits as they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import engine, tokens
from torch import Tensor

from baselines.kvtuner import kvtuner, presets
from mikv.cache.compressed import CompressedCache
from mikv.cache.policy_store import PolicyStore
from mikv.policy import Policy
from mikv.quant.tier import Tier

LAYERS = [[4, 2], [8, 8], [2, 4], [4, 2], [8, 4]]


def slow(x: Tensor, bits: int) -> Tensor:
    """Per token: a minimum and a step over all channels of a head, [T, D]."""
    read = []
    for row in x.tolist():
        low = float(torch.tensor(min(row)).half())
        step = float(torch.tensor((max(row) - low) / (2**bits - 1)).half())
        read.append([min(max(round((number - low) / step), 0), 2**bits - 1) * step + low for number in row])
    return torch.tensor(read)


def compressed(policy: Policy, layers: int, length: int = 33) -> tuple[Any, PolicyStore, CompressedCache]:
    run = engine(layers=layers, head_dim=64)
    state = run.prefill([tokens(length)], policy.observers)
    cache = run.compress(state, [policy])
    return state.banks[0], cache.banks[0].stores[0], cache


def test_every_layer_is_read_as_its_bits_say() -> None:
    bank, store, _ = compressed(kvtuner(layers=LAYERS), 5)
    held = store.read()
    for layer, (key_bits, value_bits) in enumerate(LAYERS):
        (one,) = [part for part in held if part[1].expand(part[0].shape)[layer].any()]
        for head in range(bank.keys.shape[2]):
            assert one[0][layer, 0, head].tolist() == list(range(33))
            for read, exact, bits in ((one[2], bank.keys, key_bits), (one[3], bank.values, value_bits)):
                wanted = slow(exact[layer, 0, head], bits)
                close = torch.isclose(read[layer, 0, head], wanted, rtol=1e-4, atol=1e-5)
                assert close.float().mean() > 0.999  # FP32 and double: a number on the edge of two codes


def test_new_tokens_go_to_their_layers_tier_and_bytes_are_those_of_its_bits() -> None:
    policy = kvtuner(layers=LAYERS)
    run = engine(layers=5, head_dim=64)
    _, store, cache = compressed(policy, 5)
    for step in range(9):
        for tier, held in zip(policy.tiers, store.tiers, strict=True):
            mine = [[tier.k, tier.v] == bits for bits in LAYERS]
            assert held.count[:, 0].tolist() == [[(33 + step) * here] * 2 for here in mine]
        assert store._settled is not None
        assert (torch.stack([held.count for held in store.tiers]).cumsum(dim=0)[:-1] <= store._settled).all()
        (row,) = cache.usage()
        bits = sum(key + value + 2 * 32 / 64 for key, value in LAYERS)  # a scale and a minimum per vector, no position
        assert sum(row.nbytes.values()) == (33 + step) * 2 * 64 * bits / 8
        run.step(cache, torch.tensor([step]), torch.tensor([33 + step]), torch.ones(1, dtype=torch.bool))


def test_tiers_come_from_best_to_worst_and_equal_layers_share_one() -> None:
    policy = kvtuner(layers=LAYERS)
    assert [(tier.k, tier.v) for tier in policy.tiers] == [(8, 8), (8, 4), (4, 2), (2, 4)]
    assert policy.budget.tiers == policy.budget.whole == 4
    assert all(policy.in_order(index) == 0 for index in range(4))  # no positions are stored
    assert kvtuner(layers=["k4v2", 8, 16, [2, 2]]).tiers == (
        Tier(16), *(Tier(key=f"affine{k}/all", value=f"affine{v}/all") for k, v in ((8, 8), (4, 2), (2, 2)))
    )  # fmt: skip


def test_one_kind_of_layer_is_one_tier() -> None:
    _, store, _ = compressed(kvtuner(layers=[[4, 4]] * 3), 3)
    assert len(store.tiers) == 1
    assert store.tiers[0].count.tolist() == [[[33, 33]]] * 3


@pytest.mark.parametrize("layers", [1, 2, 5])
def test_by_default_the_first_layer_has_8_bits_and_the_others_4_in_any_model(layers: int) -> None:
    _, store, _ = compressed(kvtuner(), layers)
    assert [str(tier.tier) for tier in store.tiers] == ["8", "4"]
    assert store.tiers[0].count[:, 0, 0].tolist() == [33] + [0] * (layers - 1)
    assert store.tiers[1].count[:, 0, 0].tolist() == [0] + [33] * (layers - 1)


def test_a_layer_with_fewer_bits_before_the_others_is_no_matter() -> None:
    _, store, _ = compressed(kvtuner(first=2, rest="k4v8"), 3)
    assert [str(tier.tier) for tier in store.tiers] == ["k4v8", "2"]
    assert store.tiers[1].count[:, 0, 0].tolist() == [33, 0, 0]


def test_the_presets_are_the_authors() -> None:
    """Layers of the four models; a mean of at most 4 or 6 bits, as their names say."""
    assert len(presets()) == 16
    for name, layers in presets().items():
        of_model = {"Meta-Llama-3.1-8B": 32, "Mistral-7B": 32, "Qwen2.5-3B": 36, "Qwen2.5-7B": 28}
        assert len(layers) == next(number for model, number in of_model.items() if name.startswith(model))
        policy = kvtuner(preset=name)
        assert policy.label == f"kvtuner {name}"
        bits = [(policy.tiers[place].k, policy.tiers[place].v) for place in policy.budget.places]  # type: ignore[attr-defined]
        assert {number for pair in bits for number in pair} <= {8, 4, 2}
        assert [f"k{key}v{value}" for key, value in bits] == layers
        assert sum(map(sum, bits)) / 2 / len(bits) <= int(name.rpartition("KVTuner")[2][0])
    llama = presets()["Meta-Llama-3.1-8B-Instruct_pertoken_KVTuner4_0"]
    assert llama[:6] == ["k4v8", "k4v2", "k4v2", "k4v2", "k4v2", "k4v4"]


def test_bits_for_another_number_of_layers_are_refused_and_what_to_do_is_said() -> None:
    for policy in (kvtuner(preset="Qwen2.5-7B-Instruct_pertoken_KVTuner4_0"), kvtuner(layers=[[8, 8]] * 28)):
        with pytest.raises(ValueError, match=r"28 layers for a model of 3; give a pair .* policy.layers=\[\[8,8\],\[4,2\]"):
            compressed(policy, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "Llama"}, "no preset 'Llama'; there are Meta-Llama-3.1-8B"),
        ({"preset": "Llama", "layers": [[8, 8]]}, "leave one out"),
        ({"layers": []}, "wanted the bits of each layer"),
        ({"layers": [[8, 8, 8]]}, "wanted two numbers"),
        ({"layers": [[8, 7]]}, "7 bits"),
        ({"layers": [[8, 0]]}, "evicted whole"),
    ],
)
def test_what_is_no_setting_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kvtuner(**options)


def test_labels() -> None:
    assert kvtuner().label == "kvtuner 8, 4"
    assert kvtuner(rest="k4v2").label == "kvtuner 8, k4v2"
    assert kvtuner(layers=LAYERS).label == "kvtuner 5 layers, 4.60 bits"
