"""What of an architecture the cache must know, and which architectures it can serve."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mikv.types import Geometry

# Tested with tiny random models of each (tests/test_policy_contract.py). Others may work: add them there, then here.
SUPPORTED = ("llama", "mistral", "qwen2", "qwen3")

# RoPE variants whose frequencies do not depend on the length: re-indexing a cached key is one more rotation.
_FIXED_ROPE = ("default", "linear", "llama3")


class Unsupported(ValueError):
    """The model can't be run with a compressed cache; the message says why."""


def geometry(config: Any) -> Geometry:
    """Read the geometry of a supported model; refuse the others with the reason.

    Raises:
        Unsupported: unknown architecture, sliding window, soft-capped scores, multi-head latent attention, or a head
            dimension whose codes would not fill whole words.
    """
    name = getattr(config, "model_type", "?")
    if getattr(config, "kv_lora_rank", None):
        raise Unsupported(
            f"{name} has multi-head latent attention: its cache holds latents, not the keys and values that tiers are made of"
        )
    if getattr(config, "attn_logit_softcapping", None):
        raise Unsupported(f"{name} caps its attention scores (attn_logit_softcapping): the cache's attention does not")
    windowed = {kind for kind in getattr(config, "layer_types", None) or () if kind != "full_attention"}
    if windowed or getattr(config, "sliding_window", None):
        kinds = ", ".join(sorted(windowed)) or f"a window of {config.sliding_window} tokens"
        raise Unsupported(
            f"{name} has layers that do not attend to the whole context ({kinds}): they evict by themselves, so a "
            "policy's share of tokens would mean something else in each layer. If all of your prompts are shorter than "
            "the window, load it with the window switched off (model.path= a folder whose config.json has "
            "sliding_window, layer_types = null and use_sliding_window = false)."
        )
    if name not in SUPPORTED:
        raise Unsupported(f"architecture {name!r} is not among the tested ones ({', '.join(SUPPORTED)})")
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    if head_dim % 16:
        raise Unsupported(f"{name} has head_dim={head_dim}; packing needs a multiple of 16")
    return Geometry(config.num_hidden_layers, heads, config.num_key_value_heads, head_dim)


def layer_devices(model: Any) -> list[torch.device]:
    """Where each decoder layer lives."""
    return [next(layer.parameters()).device for layer in model.get_decoder().layers]


def rope_inv_freq(model: Any) -> Tensor | None:
    """RoPE's inverse frequencies [D / 2], or None where they depend on the length (then positions can't be re-indexed)."""
    rope = model.get_decoder().rotary_emb
    return rope.inv_freq if getattr(rope, "rope_type", "default") in _FIXED_ROPE else None


def output_projection(model: Any, layer: int) -> Tensor:
    """What the output of a layer's attention is multiplied by, [hidden, Hq, D]."""
    weight: Tensor = model.get_decoder().layers[layer].self_attn.o_proj.weight.detach()
    return weight.unflatten(1, (model.config.num_attention_heads, -1))
