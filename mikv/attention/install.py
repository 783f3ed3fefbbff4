"""Registers the project's attention with transformers, through its two public seams.

`Cache.update` hands the attention function a handle instead of tensors; the handle knows how to attend, so this module
knows nothing of caches. Without a cache of ours it gets plain tensors and attends causally.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from mikv.attention.reference import causal_attention

NAME = "mikv"


@runtime_checkable
class Handle(Protocol):
    """What `update` of the project's caches returns in the place of keys and values."""

    def attend(self, query: Tensor, scaling: float) -> Tensor:
        """query [B, Hq, Tq, D] -> output [B, Tq, Hq, D]."""
        ...


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor | Handle,
    value: Tensor | Handle,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface."""
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if isinstance(key, Tensor):
        assert isinstance(value, Tensor)
        return causal_attention(query, key, value, scaling, attention_mask), None
    return key.attend(query, scaling), None


def padding_mask(attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """transformers' mask interface: the padding alone, bool [B, T]. No T x T mask is ever made."""
    return None if attention_mask is None else attention_mask.bool()


def install() -> None:
    """Make `attn_implementation="mikv"` known. Idempotent."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, padding_mask)
