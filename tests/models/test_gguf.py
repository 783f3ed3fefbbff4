"""GGUF files: each runs as what it holds, from a copy that is what was written, or is refused."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from saved_models import answer, save
from tiny_gguf import write_gguf

from mikv.digests import cache_dir
from mikv.models.architecture import geometry
from mikv.models.gguf import converted_gguf
from mikv.models.load import SMOLLM2_PACKAGE, ModelSpec, ModelUnavailable, load, load_geometry, load_tokenizer
from mikv.models.sources import package_gguf
from mikv.models.tiny import tiny_config, tiny_model

every_way = pytest.mark.parametrize("call", [load, load_tokenizer, load_geometry], ids=["load", "tokenizer", "geometry"])


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MIKV_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_file_runs_as_the_weights_that_it_holds(tmp_path: Path) -> None:
    loaded = load(ModelSpec("m", path=str(write_gguf(tmp_path / "tiny.gguf", seed=3))))
    for name, tensor in tiny_model(tiny_config(), seed=3).state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], tensor), name
    assert loaded.tokenizer("abc").input_ids == [257, 66]  # "ab", "c"
    assert loaded.end_tokens == {256}


def test_two_files_of_one_name_and_size_are_two_models(tmp_path: Path) -> None:
    """The second got the first one's answers, under its own name in the records."""
    files = [write_gguf(tmp_path / folder / "final.gguf", seed) for seed, folder in enumerate("ab")]
    assert files[0].stat().st_size == files[1].stat().st_size
    first, second = (ModelSpec("m", path=str(file)) for file in files)
    assert answer(load(first)) != answer(load(second)) == answer(load(ModelSpec("m", path=str(save(tmp_path / "b", seed=1)))))
    assert first.describe() != second.describe()


def test_a_file_is_converted_once_whatever_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_gguf(tmp_path / "tiny.gguf")
    folder = converted_gguf(file)
    assert "converting tiny.gguf to safetensors, once" in capsys.readouterr().out
    assert converted_gguf(file.rename(tmp_path / "other.gguf")) == folder
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["transformers", "gguf"])
def test_another_converter_makes_another_copy(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_gguf(tmp_path / "tiny.gguf")
    before = converted_gguf(file)
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda asked: "99.0" if asked == name else version(asked))
    after = converted_gguf(file)
    assert after != before
    assert json.loads((after / "converted.json").read_text())["origin"][name] == "99.0"


def edit(folder: Path) -> None:
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        edit,
        lambda folder: (folder / "model.safetensors").unlink(),
        lambda folder: (folder / "config.json").write_text("{}"),
        lambda folder: (folder / "adapter_config.json").write_text("{}"),
        lambda folder: (folder / "converted.json").unlink(),
        lambda folder: (folder / "converted.json").write_text("[]"),
    ],
    ids=["a bit of the weights", "weights gone", "config", "a file too much", "manifest gone", "manifest broken"],
)
def test_a_copy_that_is_not_what_was_written_is_made_again(
    damage: Callable[[Path], object], tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_gguf(tmp_path / "tiny.gguf")
    folder = converted_gguf(file)
    before = {found.name: found.read_bytes() for found in folder.iterdir()}
    damage(folder)
    capsys.readouterr()
    assert converted_gguf(file) == folder
    assert "is not what was written there: it is made again" in capsys.readouterr().out
    assert {found.name: found.read_bytes() for found in folder.iterdir()} == before
    assert [found.name for found in cache.iterdir() if found.name != "sha256"] == [folder.name]


def test_another_files_copy_under_this_ones_name_is_not_used(tmp_path: Path) -> None:
    files = [write_gguf(tmp_path / f"{seed}.gguf", seed) for seed in (0, 1)]
    first, second = map(converted_gguf, files)
    wanted = (second / "model.safetensors").read_bytes()
    second.rename(tmp_path / "aside")
    first.rename(second)
    assert converted_gguf(files[1]) == second
    assert (second / "model.safetensors").read_bytes() == wanted


# --- what is refused ---


def written(**options: Any) -> Callable[[Path], Path]:
    return lambda file: write_gguf(file, **options)


def cut_to(size: int) -> Callable[[Path], Path]:
    def make(file: Path) -> Path:
        file.write_bytes(write_gguf(file).read_bytes()[:size])
        return file

    return make


def nonsense(file: Path) -> Path:
    file.write_bytes(b"GGUFnonsense" * 10)
    return file


REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "nothing in it": (cut_to(0), "is no whole GGUF file"),
    "cut in the first bytes": (cut_to(10), "is no whole GGUF file"),
    "cut in the metadata": (cut_to(3000), "is no whole GGUF file"),
    "cut in the weights": (cut_to(300_000), "is no whole GGUF file.*Get it again"),
    "no GGUF": (nonsense, "is no whole GGUF file"),
    "another architecture": (written(said={"architecture": "deci"}), "of architecture 'deci'; GGUF files are read of llama"),
    "a layer too many": (written(said={"block_count": 1}), r"has 9 tensors that transformers does not read \(blk\.1\."),
    "a layer too few": (written(said={"block_count": 3}), "9 of the model's 30 tensors are missing"),
    "a tensor missing": (
        written(leave_out="blk.1.attn_q.weight"),
        r"1 of the model's 21 tensors are missing from the weights \(model\.layers\.1\.self_attn\.q_proj\.weight\)",
    ),
    "other shapes": (written(said={"embedding_length": 32}), "21 of the model's 21 tensors have another shape"),
    "scaled positions": (written(said={"rope.scaling.type": "yarn"}), "asks for yarn scaling of positions"),
    "frequencies of its own": (written(more=["rope_freqs.weight"]), r"does not read \(rope_freqs\.weight\)"),
    "biases": (written(more=["blk.0.attn_q.bias"]), r"does not read \(blk\.0\.attn_q\.bias\)"),
    "no number of layers": (written(said={"block_count": None}), r"does not say llama\.block_count"),
}


@every_way
@pytest.mark.parametrize("what", REFUSED)
def test_a_file_that_would_not_run_as_it_is_is_refused(
    what: str, call: Callable[[ModelSpec], object], tmp_path: Path, cache: Path
) -> None:
    make, why = REFUSED[what]
    file = make(tmp_path / "tiny.gguf")
    with pytest.raises(ModelUnavailable, match=rf"model\.path={file} could not be loaded: .*{why}"):
        call(ModelSpec("m", path=str(file)))
    assert not list(cache.glob("gguf-*"))  # nothing half-made is left


def test_without_an_output_of_its_own_the_embedding_is_taken(tmp_path: Path) -> None:
    loaded = load(ModelSpec("m", path=str(write_gguf(tmp_path / "tiny.gguf", leave_out="output.weight"))))
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight


# --- the real small model ---


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec(SMOLLM2_PACKAGE) is None, reason=f"{SMOLLM2_PACKAGE} is not installed")
def test_the_packages_gguf_is_converted_once(capsys: pytest.CaptureFixture[str]) -> None:
    file = package_gguf(SMOLLM2_PACKAGE)
    folder = converted_gguf(file)
    assert "converting" in capsys.readouterr().out
    assert [found.name for found in cache_dir().glob("gguf-*")] == [folder.name]
    loaded = load(ModelSpec("smollm2", path=str(file)))
    assert "converting" not in capsys.readouterr().out
    assert geometry(loaded.model.config) == (30, 9, 3, 64)
    assert loaded.tokenizer.chat_template
    assert loaded.tokenizer.convert_tokens_to_ids("<|im_end|>") in loaded.end_tokens
