"""A model over several GPUs, as far as that can be tested without any: banks, hooks, plans, refusals."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from accelerate import dispatch_model, infer_auto_device_map, init_empty_weights
from conftest import NO_END, answers, engine, prompt
from transformers import AutoModelForCausalLM

from mikv.config import policy
from mikv.engine import Engine, prefill
from mikv.engine.requests import Decoding, Scoring
from mikv.models.architecture import SUPPORTED, layer_devices
from mikv.models.load import ModelSpec, ModelUnavailable, check_on_gpus
from mikv.models.tiny import tiny_config, tiny_model
from mikv.policy import Policy

PROMPTS = [prompt(40, 1), prompt(23, 2, question=3), prompt(31, 3)]
CPU = torch.device("cpu")


def spread_engine(monkeypatch: pytest.MonkeyPatch, places: list[int]) -> Engine:
    """An engine that believes its layers to lie on several devices; torch takes cpu:0, cpu:1 ... all for the CPU."""
    devices = [torch.device("cpu", place) for place in places]
    monkeypatch.setattr(prefill, "layer_devices", lambda _: devices)
    return engine(layers=len(places))


@pytest.mark.parametrize("places", [[0, 0, 1, 1], [0, 1, 2, 3], [0, 1, 1, 0]])
def test_layers_of_each_device_have_a_cache_of_their_own_and_nothing_changes(
    any_policy: Policy, places: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    together = engine(layers=4)
    spread = spread_engine(monkeypatch, places)
    banks = spread.prefill([p.context for p in PROMPTS]).banks
    assert [bank.layers.tolist() for bank in banks] == {
        (0, 0, 1, 1): [[0, 1], [2, 3]],
        (0, 1, 2, 3): [[0], [1], [2], [3]],
        (0, 1, 1, 0): [[0], [1, 2], [3]],
    }[tuple(places)]
    assert answers(spread, PROMPTS, [any_policy]) == answers(together, PROMPTS, [any_policy])
    one, other = (e.generate(PROMPTS, [any_policy], Decoding(4))[0] for e in (together, spread))
    assert [g.usage.nbytes for g in one] == [g.usage.nbytes for g in other]


def test_a_model_with_the_hooks_of_a_device_map_answers_and_scores_the_same() -> None:
    """accelerate wraps each layer and moves what goes in and out; the cache's handles must pass."""
    config = tiny_config(layers=3)
    plain = Engine(tiny_model(config, torch.float32), NO_END, 257)
    hooked_model = tiny_model(config, torch.float32)
    parts = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    layers = {f"model.layers.{i}": "cpu" for i in range(3)}
    hooked = Engine(
        dispatch_model(hooked_model, parts | layers, skip_keys=hooked_model._skip_keys_device_placement, force_hooks=True),
        NO_END,
        257,
    )
    assert hasattr(hooked.model.model.layers[1], "_hf_hook")

    panel = [policy("full"), policy("mikv"), policy("h2o")]
    assert answers(hooked, PROMPTS, panel) == answers(plain, PROMPTS, panel)
    scorings = [Scoring(p, [(1, 2), (3,)]) for p in PROMPTS]
    assert hooked.score(scorings, panel) == plain.score(scorings, panel)


@pytest.mark.parametrize("architecture", SUPPORTED)
def test_accelerate_plans_whole_layers_in_order(architecture: str) -> None:
    """On the meta device, for two GPUs that each hold a little more than half: no layer is cut."""
    with init_empty_weights():
        empty = AutoModelForCausalLM.from_config(tiny_config(architecture, layers=6))
    size = sum(p.numel() * p.element_size() for p in empty.parameters())
    plan = infer_auto_device_map(
        empty, {0: int(0.62 * size), 1: size}, no_split_module_classes=list(empty._no_split_modules or [])
    )
    places = [plan[f"model.layers.{i}"] for i in range(6)]  # a cut layer would be there in parts
    assert places == sorted(places)
    assert set(places) == {0, 1}


def test_devices_of_layers_are_read_from_the_layers() -> None:
    half = tiny_model(tiny_config(layers=4), torch.float32)
    half.model.layers[2:].to("meta")
    assert layer_devices(half) == [CPU, CPU, torch.device("meta"), torch.device("meta")]


def test_a_model_that_does_not_fit_is_refused() -> None:
    fits = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": 1}
    check_on_gpus(SimpleNamespace(hf_device_map=fits))
    for place in ("cpu", "disk"):
        with pytest.raises(ModelUnavailable, match=r"1 of its 4 parts \(lm_head \.\.\.\) are left over.*launcher\.gpus"):
            check_on_gpus(SimpleNamespace(hf_device_map=fits | {"lm_head": place}))


def test_settings_that_exclude_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.device_map=fast: choose auto or null"):
        ModelSpec("tiny-random", device_map="fast")
    with pytest.raises(ValueError, match="exclude each other"):
        ModelSpec("tiny-random", device_map="auto", device="cpu")


def test_where_layers_lie_is_in_no_key() -> None:
    assert ModelSpec("tiny-random", device_map="auto").describe() == ModelSpec("tiny-random").describe()
