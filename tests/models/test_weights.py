"""Weights that are not whole, or not the configuration's, are refused: nothing runs with random or fewer layers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from saved_models import answer, save, save_adapter

from mikv.models.load import TINY, ModelSpec, ModelUnavailable, load

Tensors = dict[str, torch.Tensor]


def configure(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes), encoding="utf-8")


def rewrite(file: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def refusal(spec: ModelSpec) -> str:
    with pytest.raises(ModelUnavailable) as refused:
        load(spec)
    return str(refused.value)


@pytest.mark.parametrize("attention", ["mikv", "sdpa"])
def test_more_layers_than_there_are_weights_are_refused_by_name(tmp_path: Path, attention: str) -> None:
    """The third layer ran with random numbers."""
    configure(save(tmp_path), num_hidden_layers=3)
    with pytest.raises(ModelUnavailable) as refused:
        load(ModelSpec("m", path=str(tmp_path)), attention)
    for said in (
        f"model.path={tmp_path} could not be loaded: 9 of the model's 30 tensors are missing from the weights",
        "(model.layers.2.input_layernorm.weight, ",
        "would be random numbers",
    ):
        assert said in str(refused.value)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_a_tensor_that_is_missing_is_named(tmp_path: Path, name: str) -> None:
    rewrite(save(tmp_path) / "model.safetensors", lambda tensors: tensors.pop(name))
    assert f"1 of the model's 21 tensors are missing from the weights ({name})" in refusal(ModelSpec("m", path=str(tmp_path)))


def test_fewer_layers_than_there_are_weights_are_refused(tmp_path: Path) -> None:
    """The second layer was silently cut."""
    configure(save(tmp_path), num_hidden_layers=1)
    said = refusal(ModelSpec("m", path=str(tmp_path)))
    assert "9 tensors of the weights belong to no layer" in said
    assert "(model.layers.1.input_layernorm.weight, " in said


def test_another_shape_is_refused_with_both(tmp_path: Path) -> None:
    configure(save(tmp_path), vocab_size=300)
    said = refusal(ModelSpec("m", path=str(tmp_path)))
    assert "2 of the model's 21 tensors have another shape than by the configuration" in said
    assert "(lm_head.weight: [258, 64] in the weights, [300, 64] wanted)" in said


def test_tied_weights_and_old_buffers_are_no_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = save(tmp_path, tie_word_embeddings=True) / "model.safetensors"
    spec = ModelSpec("m", path=str(tmp_path))
    before = answer(load(spec))
    assert "lm_head.weight" not in load_file(file)
    rewrite(file, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    assert answer(load(ModelSpec("m", path=str(tmp_path)))) == before
    assert capsys.readouterr().out == ""


def test_what_has_no_place_and_is_no_layers_is_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rewrite(save(tmp_path) / "model.safetensors", lambda tensors: tensors.update({"value_head.weight": torch.ones(8)}))
    load(ModelSpec("m", path=str(tmp_path)))
    assert (
        "note: 1 tensors of the weights have no place in the model and are not used (value_head.weight)"
        in capsys.readouterr().out
    )


# --- adapters ---


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: tensors.pop(next(iter(tensors))), "1 of its tensors are missing from it (base_model.model.model."),
        (
            lambda tensors: tensors.update(
                {"base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight": torch.ones(2, 64)}
            ),
            "1 of its tensors have no place in the model (base_model.model.model.layers.7.",
        ),
    ],
    ids=["missing", "of a layer that there is not"],
)
def test_an_adapter_that_is_not_whole_is_refused(tmp_path: Path, change: Callable[[Tensors], object], said: str) -> None:
    save_adapter(tmp_path)
    rewrite(tmp_path / "adapter_model.safetensors", change)
    assert f"model.adapter={tmp_path} does not fit the model: {said}" in refusal(ModelSpec(TINY, adapter=str(tmp_path)))


@pytest.mark.parametrize("shape", [{"query_heads": 8}, {"layers": 3}, {"layers": 1}], ids=["wider", "deeper", "shorter"])
def test_an_adapter_of_another_model_is_refused(tmp_path: Path, shape: dict[str, int]) -> None:
    save_adapter(tmp_path / "adapter", **shape)
    spec = ModelSpec("m", path=str(save(tmp_path / "base")), adapter=str(tmp_path / "adapter"))
    assert f"model.adapter={tmp_path / 'adapter'} does not fit the model: " in refusal(spec)


def test_an_adapter_for_modules_that_the_model_lacks_is_refused(tmp_path: Path) -> None:
    save_adapter(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"target_modules": ["c_attn"]}))
    said = refusal(ModelSpec(TINY, adapter=str(tmp_path)))
    assert f"model.adapter={tmp_path} does not fit the model: " in said
    assert "c_attn" in said


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("adapter_config.json", b"{", "adapter_config.json is no JSON"),
        ("adapter_config.json", b"[]", "adapter_config.json is of type list"),
        ("adapter_config.json", b"{}", "adapter_config.json has peft_type=None; only LORA"),
        ("adapter_config.json", b'{"peft_type": "IA3"}', "peft_type='IA3'; only LORA"),
        ("adapter_config.json", None, "No such file"),
        ("adapter_model.safetensors", b"nothing", "adapter_model.safetensors is no whole safetensors file"),
    ],
)
@pytest.mark.parametrize("call", [load, ModelSpec.describe])
def test_an_adapter_with_a_broken_file_is_refused(
    tmp_path: Path, name: str, content: bytes | None, why: str, call: Callable[[ModelSpec], object]
) -> None:
    save_adapter(tmp_path)
    (tmp_path / name).unlink() if content is None else (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelUnavailable) as refused:
        call(ModelSpec(TINY, adapter=str(tmp_path)))
    assert f"model.adapter={tmp_path}: " in str(refused.value)
    assert why in str(refused.value)
