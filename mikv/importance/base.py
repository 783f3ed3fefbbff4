"""The contract of an importance score, and what it may watch.

A score sees attention, never the text: during prefill an `Observer` is shown the probabilities block by block (no T x T
matrix ever exists), during decoding the attention mass of each step. Only past attention enters, so no score can look
ahead. Scores are float32: in fp16 a large sum swallows every later increment.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from mikv.types import Geometry, Lengths

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class ObserverState(Protocol):
    """Accumulates over the query blocks of one prefill."""

    def block(self, layer: int, probs: Tensor, first: int, real_queries: Tensor) -> None:
        """One block of queries: probs [B, H, G, q, T'] fp32 over the columns 0..T'-1, the first query's column, and
        real_queries bool [B, q] (False = padding)."""
        ...

    def result(self) -> Tensor:
        """[L, B, H, T] float32."""
        ...


class Observer(Protocol):
    """What is watched during prefill; hashable, so that policies which want the same share one observation."""

    def start(self, geometry: Geometry, lengths: Lengths, device: torch.device) -> ObserverState: ...

    def combine(self, before: Tensor, after: Tensor) -> Tensor:
        """What a prompt's queries showed, from what those of a shared prefix did (0 outside of its columns) and those after
        it: float32 [L, B, H, T] each."""
        ...


class Importance(Protocol):
    """Scores in, higher = keep. Frozen dataclasses; everything that changes lives in the tensors passed around."""

    @property
    def observer(self) -> Observer | None:
        """What must be watched during prefill, or None."""
        ...

    def prefill(self, observed: Tensor | None, layers: Tensor, rows: Tensor, positions: Tensor, heads: int) -> Tensor:
        """Scores of prompt tokens, float32 [L, B, H, T].

        observed is the observer's result, layers int64 [L] the layers' indices, rows int64 [B] a number that names the
        prompt (the same alone and in any batch), positions int64 [B, T] (negative = padding).
        """
        ...

    def entry(self, layers: Tensor, rows: Tensor, positions: Tensor, heads: int) -> Tensor:
        """Scores, float32 [L, B, H], of the token that enters at positions int64 [B] while decoding."""
        ...

    def decode(self, scores: Tensor, mass: Tensor) -> Tensor:
        """Scores after a step, given the attention mass each token received in it (both float32, same shape)."""
        ...
