"""What of kvpress a scorer press needs, and two presses: for tests where the library is not installed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class ScorerPress:
    compression_ratio: float = 0.0

    def post_init_from_model(self, model: Any) -> None:
        """Once, before the first score."""
        self.model = model

    def score(self, module: Any, hidden_states: Tensor, keys: Tensor, values: Tensor, attentions: Any, kwargs: Any) -> Tensor:
        raise NotImplementedError


@dataclass
class KnormPress(ScorerPress):
    def score(self, module: Any, hidden_states: Tensor, keys: Tensor, values: Tensor, attentions: Any, kwargs: Any) -> Tensor:
        return -keys.norm(dim=-1)


@dataclass
class QueryPress(ScorerPress):
    """The last query's attention, made again from what the press is given: needs hidden states, cosines, a module and its
    rotary embedding."""

    sign: float = 1.0

    def score(self, module: Any, hidden_states: Tensor, keys: Tensor, values: Tensor, attentions: Any, kwargs: Any) -> Tensor:
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        assert attentions is None
        assert self.model.get_decoder().rotary_emb is module.rotary_emb
        query = module.q_proj(hidden_states).unflatten(-1, (-1, module.head_dim)).transpose(1, 2)
        cos, sin = kwargs["position_embeddings"]
        query = apply_rotary_pos_emb(query, query, cos, sin)[0][:, :, -1:]
        logits = query @ keys.repeat_interleave(query.shape[1] // keys.shape[1], dim=1).transpose(2, 3)
        probs = torch.softmax(logits / module.head_dim**0.5, dim=-1)[:, :, 0].mean(dim=1, keepdim=True)
        return self.sign * probs.expand(-1, keys.shape[1], -1)


@dataclass
class RatioPress(ScorerPress):
    """As StreamingLLMPress: what is to go, as many as the ratio says, stands behind the first token."""

    def score(self, module: Any, hidden_states: Tensor, keys: Tensor, values: Tensor, attentions: Any, kwargs: Any) -> Tensor:
        scores = torch.ones_like(keys[..., 0])
        scores[..., 1 : 1 + keys.shape[2] - int(keys.shape[2] * (1 - self.compression_ratio))] = 0
        return scores


@dataclass
class EagerPress(ScorerPress):
    def score(self, module: Any, hidden_states: Tensor, keys: Tensor, values: Tensor, attentions: Any, kwargs: Any) -> Tensor:
        assert attentions is not None, "attention weights, please"
        return attentions


class MaskPress:
    """No scorer press."""
