"""How the tokens of an answer are chosen: greedy or sampled, and when an answer ends.

Sampling is counter-based: the random number of a step is a hash of seed, prompt, repetition and step. A prompt therefore
gets the same numbers alone and in any batch, and all policies of a panel get the same ones: where their distributions
agree they say the same, so that a difference between two answers is a difference between two caches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Stop(Protocol):
    """Whether an answer is over although no end token came; hashable, so that equal ways to decode share a batch."""

    def __call__(self, tokens: Sequence[int]) -> bool: ...

    def __hash__(self) -> int: ...


@dataclass(frozen=True)
class Sampling:
    """Parameters as in transformers' GenerationConfig.

    Args:
        temperature: above 0.
        top_k: only the k most probable tokens; 0 = all.
        top_p: only the most probable tokens that together reach this probability.
        min_p: only tokens that have this share of the most probable one's probability.
        seed: of the random numbers.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature}: above 0; greedy answers are do_sample=false")
        if self.top_k < 0 or not 0 < self.top_p <= 1 or not 0 <= self.min_p <= 1:
            raise ValueError(f"top_k={self.top_k}, top_p={self.top_p}, min_p={self.min_p}: top_k from 0, the others in 0..1")


@dataclass(frozen=True)
class Decoding:
    """How to answer.

    Args:
        max_new_tokens: limit of an answer, at least 1.
        sampling: None = greedy.
        repetition_penalty: above 1 = tokens of the prompt and the answer get less probable (as transformers does it).
        stop: ends an answer, besides the model's end tokens.
    """

    max_new_tokens: int
    sampling: Sampling | None = None
    repetition_penalty: float = 1.0
    stop: Stop | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens}: at least 1")


def penalized(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits [R, V] of tokens that were seen (bool [R, V]) are divided by the penalty, negative ones multiplied."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def choose(logits: Tensor, sampling: Sampling | None, draws: Tensor) -> Tensor:
    """The next token of each row, int64 [R].

    Args:
        logits: [R, V].
        sampling: None = the most probable token.
        draws: float64 [R], in 0..1; unused when greedy.
    """
    if sampling is None:
        return logits.argmax(dim=-1)
    probs, tokens = torch.softmax(logits.double() / sampling.temperature, dim=-1).sort(dim=-1, descending=True, stable=True)
    kept = torch.ones_like(probs, dtype=torch.bool)
    if sampling.top_k:
        kept[:, sampling.top_k :] = False
    # each filter works on what the one before it left, as transformers' do
    left = torch.where(kept, probs, 0)
    left = left / left.sum(dim=-1, keepdim=True)
    kept &= left.cumsum(dim=-1) - left < sampling.top_p
    kept &= probs >= sampling.min_p * probs[:, :1]
    cumulative = torch.where(kept, probs, 0).cumsum(dim=-1)
    place = torch.searchsorted(cumulative, draws[:, None].to(logits.device) * cumulative[:, -1:], right=True)
    last = kept.sum(dim=-1, keepdim=True) - 1  # a draw of almost 1 may round up to the sum
    return tokens.gather(-1, torch.minimum(place, last)).squeeze(-1)
