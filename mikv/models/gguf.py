"""GGUF files: a safetensors copy in the user's cache folder, which is what runs.

The copy's folder is named after the content of the file and the versions of what converted it, and lists its own files with
their digests: a copy that is half-written, edited, or of another converter is not used.
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mikv.digests import cache_dir, file_digest
from mikv.fingerprint import content_fingerprint, fingerprint
from mikv.models.architecture import SUPPORTED
from mikv.models.weights import check_loaded, some

_MANIFEST = "converted.json"
# Without these transformers takes the numbers of another model.
_REQUIRED = ("block_count", "embedding_length", "feed_forward_length", "attention.head_count")


def converted_gguf(file: Path) -> Path:
    """Folder with the safetensors copy of a GGUF file, made on first use (dequantizing takes about 20 s each time).

    The folder is written beside its place and renamed, so that two processes may convert at once and a killed one leaves
    nothing half-made in its place.

    Raises:
        ValueError: the file is no whole GGUF file, or holds a model that would not run as it is; says why.
        OSError: it can't be read, or the cache can't be written.
    """
    origin = {
        "content": content_fingerprint(file),
        **{name: importlib.metadata.version(name) for name in ("transformers", "gguf")},
    }
    target = cache_dir() / f"gguf-{fingerprint(origin)}"
    if _is_whole(target, origin):
        return target
    header = _read_header(file)
    if target.exists():
        print(f"the converted copy of {file.name} in {target} is not what was written there: it is made again", flush=True)
    print(f"converting {file.name} to safetensors, once, into {target} ...", flush=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=target.name, dir=target.parent))
    try:
        _convert(file, header, scratch / "new")
        manifest = {"origin": origin, "name": file.name, "files": _digests(scratch / "new")}
        (scratch / "new" / _MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        if target.exists() and not _is_whole(target, origin):
            target.rename(scratch / "damaged")
        try:
            (scratch / "new").rename(target)
        except OSError:
            if not _is_whole(target, origin):  # otherwise: another process was first
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


class _Header(NamedTuple):
    architecture: str
    tensors: frozenset[str]  # their names


def _convert(file: Path, header: _Header, folder: Path) -> None:
    """Write the safetensors copy. Raises ValueError where it would be another model than the file's."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where, name = str(file.parent), file.name
    tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=name)
    model, info = AutoModelForCausalLM.from_pretrained(
        where, gguf_file=name, dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True
    )
    check_loaded(model, info)
    if unread := sorted(header.tensors - _readable(model, header.architecture)):
        raise ValueError(
            f"{name} has {len(unread)} tensors that transformers does not read ({some(unread)}): what ran would be another "
            "model, with fewer layers, other positions or no biases. Take the model's safetensors instead"
        )
    # the weights are plain float32 now; the marks of the quantized file would make save_pretrained refuse
    model.hf_quantizer = None
    del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _read_header(file: Path) -> _Header:
    """Raises ValueError where the file is no GGUF that can be converted."""
    import gguf

    try:
        reader = gguf.GGUFReader(file)
        said = {name: field.contents() for name, field in reader.fields.items() if len(field.data) == 1}
    except Exception as error:  # it reads bytes without checks: IndexError, ValueError, UnicodeDecodeError, ...
        raise ValueError(f"{file.name} is no whole GGUF file ({error}): a download that was cut? Get it again") from error
    kind = said.get("general.architecture")
    if kind not in SUPPORTED or kind not in gguf.MODEL_ARCH_NAMES.values():
        raise ValueError(
            f"{file.name} holds a model of architecture {kind!r}; GGUF files are read of {', '.join(SUPPORTED)} only. Take the "
            "model's safetensors instead"
        )
    if missing := [f"{kind}.{name}" for name in _REQUIRED if f"{kind}.{name}" not in said]:
        raise ValueError(f"{file.name} does not say {', '.join(missing)}: get it again")
    if (scaling := said.get(f"{kind}.rope.scaling.type", "none")) != "none":
        raise ValueError(
            f"{file.name} asks for {scaling} scaling of positions, which transformers does not read from a GGUF file: what ran "
            "would be another model. Take the model's safetensors instead"
        )
    return _Header(kind, frozenset(tensor.name for tensor in reader.tensors))


def _readable(model: Any, architecture: str) -> set[str]:
    """The names that a GGUF file has for a model's tensors."""
    import gguf

    kind = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, model.config.num_hidden_layers)
    stems = (name.rpartition(".") for name in model.state_dict())
    return {f"{names.get_name(stem)}.{leaf}" for stem, _, leaf in stems}


def _digests(folder: Path) -> dict[str, str]:
    return {file.name: file_digest(file) for file in sorted(folder.iterdir()) if file.name != _MANIFEST}


def _is_whole(folder: Path, origin: dict[str, str]) -> bool:
    """A copy is used only if it is of this file and these converters, and every file in it is as it was written."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        return bool(manifest["origin"] == origin and manifest["files"] == _digests(folder))
    except (OSError, ValueError, KeyError, TypeError):
        return False
