"""Folders that hold no whole model: one message that names the file and says what to do, by every way to the weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from saved_models import save
from transformers import AutoModelForCausalLM

from mikv.models.load import ModelSpec, ModelUnavailable, load, load_geometry, load_tokenizer

every_way = pytest.mark.parametrize(
    "call", [load, load_tokenizer, load_geometry, ModelSpec.describe], ids=["load", "tokenizer", "geometry", "describe"]
)
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"


def without(*names: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return change


def with_text(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def with_config(**changes: Any) -> Callable[[Path], None]:
    """None = the entry is left out."""

    def change(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text()) | changes
        (folder / CONFIG).write_text(json.dumps({name: value for name, value in config.items() if value is not None}))

    return change


def emptied(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


def cut(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:5000])


def grown(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes() + b"more")


def as_pickle(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def as_adapter(folder: Path) -> None:
    emptied(folder)
    (folder / "adapter_config.json").write_text("{}")


def as_gguf(folder: Path) -> None:
    emptied(folder)
    (folder / "model.gguf").touch()


def in_parts(folder: Path) -> None:
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="100KB")
    (folder / WEIGHTS).unlink()


def one_part_missing(folder: Path) -> None:
    in_parts(folder)
    (folder / "model-00002-of-00005.safetensors").unlink()


def a_part_elsewhere(folder: Path) -> None:
    in_parts(folder)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = "../other.safetensors"
    (folder / INDEX).write_text(json.dumps(index))


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "empty": (emptied, r"the folder is empty; wanted: a folder with config\.json"),
    "no config": (without(CONFIG), r"there is no config\.json; wanted"),
    "config that is no JSON": (with_text(CONFIG, b"{nothing"), r"config\.json is no JSON \(.*line 1.*\): get it again"),
    "config that is empty": (with_text(CONFIG, b""), r"config\.json is no JSON"),
    "config that is no text": (with_text(CONFIG, b"\xff\xfe"), r"config\.json is no JSON: it is no UTF-8 text"),
    "config that is a list": (with_text(CONFIG, b"[1]"), r"config\.json is of type list; wanted: a JSON object"),
    "no model_type": (with_config(model_type=None), r"config\.json has model_type=None"),
    "model_type 3": (with_config(model_type=3), r"config\.json has model_type=3"),
    "no num_hidden_layers": (with_config(num_hidden_layers=None), r"config\.json has no num_hidden_layers"),
    "no num_attention_heads": (with_config(num_attention_heads=None), r"config\.json has no num_attention_heads"),
    "two layers in words": (with_config(num_hidden_layers="two"), r"num_hidden_layers='two'; wanted: a whole number"),
    "no layers": (with_config(num_hidden_layers=0), r"num_hidden_layers=0; wanted: a whole number"),
    "generation config": (with_text("generation_config.json", b"{"), r"generation_config\.json is no JSON"),
    "no tokenizer": (without("tokenizer.json", "tokenizer_config.json"), r"there is no tokenizer \(tokenizer\.json"),
    "a tokenizer's config alone": (without("tokenizer.json"), r"there is no tokenizer \(tokenizer\.json"),
    "tokenizer that is no JSON": (with_text("tokenizer.json", b"{"), r"tokenizer\.json is no JSON"),
    "tokenizer config that is a list": (with_text("tokenizer_config.json", b"[]"), r"tokenizer_config\.json is of type list"),
    "no weights": (without(WEIGHTS), r"there is no model\.safetensors; wanted"),
    "cut weights": (cut, r"model\.safetensors is no whole safetensors file \(.*Get it again"),
    "weights that go on": (grown, r"model\.safetensors is no whole safetensors file"),
    "weights that are none": (with_text(WEIGHTS, b"version https://git-lfs.github.com/spec/v1\n"), "a Git LFS pointer"),
    "empty weights": (with_text(WEIGHTS, b""), r"model\.safetensors is no whole safetensors file"),
    "pickles": (as_pickle, r"its weights are pickles \(pytorch_model\.bin\), files .*save_pretrained\('NEW'\)"),
    "an adapter": (as_adapter, "it is an adapter and no model: name it as model.adapter"),
    "a model with an adapter": (with_text("adapter_config.json", b"{}"), "it is a model and an adapter in one folder"),
    "a folder of a GGUF file": (as_gguf, r"name the file itself, \.\.\./model\.gguf"),
    "a part that is missing": (one_part_missing, r"names model-00002-of-00005\.safetensors, which is not there"),
    "a part elsewhere": (a_part_elsewhere, r"names \.\./other\.safetensors, which is not in the folder itself"),
}  # fmt: skip


@every_way
@pytest.mark.parametrize("broken", BROKEN)
def test_a_folder_that_holds_no_whole_model_is_refused_with_the_file(
    broken: str, call: Callable[[ModelSpec], object], tmp_path: Path
) -> None:
    change, why = BROKEN[broken]
    change(save(tmp_path))
    with pytest.raises(ModelUnavailable, match=rf"model\.path={tmp_path} could not be loaded: .*{why}"):
        call(ModelSpec("m", path=str(tmp_path)))


@pytest.mark.parametrize("content", [b"{}", b'{"added_tokens": [], "model": {"type": "BPE"}}'])
def test_a_tokenizer_that_is_none_is_refused(content: bytes, tmp_path: Path) -> None:
    (save(tmp_path) / "tokenizer.json").write_bytes(content)
    with pytest.raises(
        ModelUnavailable, match=rf"model\.path={tmp_path} could not be loaded: its tokenizer .*tokenizer.json.* can't be read: "
    ):
        load_tokenizer(ModelSpec("m", path=str(tmp_path)))


def test_a_configuration_that_transformers_refuses_is_explained(tmp_path: Path) -> None:
    with_config(num_key_value_heads="two")(save(tmp_path))
    with pytest.raises(ModelUnavailable, match=r"could not be loaded: .*num_key_value_heads.* expected int"):
        load(ModelSpec("m", path=str(tmp_path)))


def test_weights_in_parts_are_loaded(tmp_path: Path) -> None:
    before = load(ModelSpec("m", path=str(save(tmp_path)))).model.state_dict()
    in_parts(tmp_path)
    after = load(ModelSpec("m", path=str(tmp_path))).model.state_dict()
    assert len(list(tmp_path.glob("*.safetensors"))) == 5
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@every_way
def test_a_file_that_is_no_gguf_by_its_name_is_refused(call: Callable[[ModelSpec], object], tmp_path: Path) -> None:
    file = save(tmp_path) / WEIGHTS
    with pytest.raises(ModelUnavailable, match=r"it is a file, and no \.gguf; wanted: a folder with a model"):
        call(ModelSpec("m", path=str(file)))


# --- code that comes with the weights ---


def with_code(folder: Path) -> Path:
    """A model of an architecture of its own, whose code says that it was run."""
    with_config(model_type="own", auto_map={"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"})(save(folder))
    (folder / "own.py").write_text("raise RuntimeError('the code was run')")
    return folder


@pytest.mark.parametrize("call", [load, load_geometry])
def test_code_that_comes_with_the_weights_is_not_run_unless_it_is_asked_for(
    call: Callable[[ModelSpec], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = with_code(tmp_path / "model")
    with pytest.raises(ModelUnavailable) as refused:
        call(ModelSpec("m", path=str(folder)))
    for said in ("contains custom code", "not run unless model.trust_remote_code=true says so: read it first"):
        assert said in str(refused.value)
    with pytest.raises(ModelUnavailable, match="the code was run"):
        call(ModelSpec("m", path=str(folder), trust_remote_code=True))


def test_a_tokenizers_code_is_not_run_either(tmp_path: Path) -> None:
    save(tmp_path)
    settings = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "own.py").write_text("raise RuntimeError('the code was run')")
    with pytest.raises(ModelUnavailable, match=r"contains custom code.*model\.trust_remote_code=true"):
        load_tokenizer(ModelSpec("m", path=str(tmp_path)))
