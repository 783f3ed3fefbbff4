"""Is this a whole model? Asked before anything large is read; each answer names the file and what to do."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from mikv.models.architecture import SUPPORTED

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_WANTED = f"a folder with config.json, {WEIGHTS} (or {INDEX} and its parts) and a tokenizer, or a .gguf file"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_TOKENIZERS = ("tokenizer.", "vocab.", "spiece.", "sentencepiece.", "tekken.")  # how files with a vocabulary begin
# What transformers takes a default for where config.json does not say it: that of another model.
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
# JSON files that transformers reads beside the index; where generation_config.json is broken it goes on without a word.
_OBJECTS = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def check_folder(folder: Path, own_code: bool) -> None:
    """Refuse what is no whole model of safetensors.

    Args:
        folder: of the weights.
        own_code: Python code that comes with the weights may run; its tokenizer may have any form.

    Raises:
        ValueError: says which file is missing or broken.
        OSError: a file can't be read.
    """
    check_names({file.name for file in folder.iterdir()}, own_code)
    check_files(folder)
    for part in _parts(folder):
        if not (folder / part).is_file():
            raise ValueError(f"{INDEX} names {part}, which is not there: get the whole folder again")


def check_names(names: Collection[str], own_code: bool) -> None:
    """The same as far as names tell. Raises ValueError."""
    if not names:
        raise ValueError(f"the folder is empty; wanted: {_WANTED}")
    if "config.json" not in names:
        if ggufs := sorted(name for name in names if name.lower().endswith(".gguf")):
            raise ValueError(f"it is a folder with GGUF files: name the file itself, .../{ggufs[0]}")
        if "adapter_config.json" in names:
            raise ValueError("it is an adapter and no model: name it as model.adapter, beside the model that it was made for")
        raise ValueError(f"there is no config.json; wanted: {_WANTED}")
    if "adapter_config.json" in names:
        raise ValueError(
            "it is a model and an adapter in one folder, and it is not clear which is meant: move adapter_config.json and "
            "adapter_model.safetensors to a folder of their own and name that as model.adapter, or delete them"
        )
    if not {WEIGHTS, INDEX} & set(names):
        if pickles := sorted(name for name in names if name.endswith(_PICKLES)):
            raise ValueError(
                f"its weights are pickles ({', '.join(pickles[:3])}), files that can run code when they are opened; only "
                'safetensors are loaded. Where you trust them, convert them once: python -c "from transformers import '
                "AutoModelForCausalLM as M; M.from_pretrained('THIS').save_pretrained('NEW')\", and copy the tokenizer's files"
            )
        raise ValueError(f"there is no {WEIGHTS}; wanted: {_WANTED}")
    vocabulary = any(name.startswith(_TOKENIZERS) for name in names)
    if not vocabulary and not own_code:
        raise ValueError(
            "there is no tokenizer (tokenizer.json, or tokenizer.model, or vocab.json and merges.txt): copy the model's own"
        )


def check_files(folder: Path) -> None:
    """What is there of a model must be readable. Raises ValueError, OSError."""
    for name in _OBJECTS:
        if (folder / name).is_file():
            read_object(folder / name)
    _check_config(read_object(folder / "config.json"))
    for part in _parts(folder):
        if (folder / part).is_file():
            check_safetensors(folder / part)


def read_object(file: Path) -> dict[str, Any]:
    """A JSON file that holds an object. Raises ValueError, OSError; names the file."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file.name} is no JSON ({error}): get it again") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{file.name} is no JSON: it is no UTF-8 text ({error.reason} at byte {error.start})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file.name} is of type {type(found).__name__}; wanted: a JSON object, {{...}}")
    return found


def check_safetensors(file: Path) -> None:
    """The header must be one and describe the file to its last byte. Raises ValueError, OSError."""
    try:
        with safe_open(file, framework="pt"):
            return
    except SafetensorError as error:
        raise ValueError(
            f"{file.name} is no whole safetensors file ({error}): was its download cut, is it a Git LFS pointer? Get it again"
        ) from error


def _check_config(config: dict[str, Any]) -> None:
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise ValueError(f"config.json has model_type={kind!r}; wanted: the architecture's name, such as llama")
    for name in _SIZES if kind in SUPPORTED else ():
        if name not in config:
            raise ValueError(f"config.json has no {name}: get the file that belongs to these weights")
        if not isinstance(config[name], int) or isinstance(config[name], bool) or config[name] < 1:
            raise ValueError(f"config.json has {name}={config[name]!r}; wanted: a whole number, at least 1")


def _parts(folder: Path) -> list[str]:
    """Names of the weights' files, as transformers chooses them: one file takes precedence over an index."""
    if (folder / WEIGHTS).is_file() or not (folder / INDEX).is_file():
        return [WEIGHTS]
    named = read_object(folder / INDEX).get("weight_map")
    if not isinstance(named, dict) or not named or not all(isinstance(part, str) for part in named.values()):
        raise ValueError(f"{INDEX} has no weight_map, which says which tensor lies in which file: get it again")
    if outside := sorted(part for part in named.values() if Path(part).name != part):
        raise ValueError(f"{INDEX} names {outside[0]}, which is not in the folder itself; what lies elsewhere is not loaded")
    return sorted(set(named.values()))
