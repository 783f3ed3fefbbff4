"""The contract of an importance score, and what it may watch.

A score sees attention, keys and values, never the text: during prefill an `Observer` is shown the probabilities block by block
(no T x T matrix ever exists), during decoding the attention mass of each step. Only past attention enters, so no score can look
ahead. Scores are float32: in fp16 a large sum swallows every later increment.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from mikv.types import Geometry, Lengths

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Context:
    """The one argument of scores and budgets: T tokens of a bank, those of a prompt or the one that a step brought.

    layers: int64 [L], the layers' indices; total_layers: of the model; prompts: int64 [B], a number that names each prompt
    (the same alone and in any batch); positions: int64 [L, B, H, T], negative = padding; seen: int64 [B], real tokens until
    now; prompt_lengths: int64 [B], with the question where it belongs to the prompt; protected: bool [L, B, H, T], tokens
    that importance does not decide about (sinks, a window); keys, values: exact, [L, B, H, T, D]; observed: what the score's
    observer saw of the prompt, float32 [L, B, H, T] (None while decoding); mass: attention that the tokens received in this
    step, summed over a group's query heads, float32 [L, B, H, T] (None for a prompt); key_noise: of a prompt, for a budget:
    float32 [L, B, H], see mikv.cache.sides; everywhere: of a prompt, for a budget that spans layers on several devices: the
    contexts of all of them, in the order of layers, with what its observer saw; output_projection: of a layer (by index),
    float [hidden, Hq, D]: what its attention's output is multiplied by; token_bytes: what a token takes in each tier, per
    layer and head, and side_bytes what a head takes besides."""

    layers: Tensor
    total_layers: int
    prompts: Tensor
    positions: Tensor
    seen: Tensor
    prompt_lengths: Tensor
    protected: Tensor
    keys: Tensor
    values: Tensor
    observed: Tensor | None = None
    mass: Tensor | None = None
    key_noise: Callable[[], Tensor] | None = None
    everywhere: Callable[[], Sequence[Context]] | None = None
    output_projection: Callable[[int], Tensor] | None = None
    token_bytes: tuple[float, ...] = ()
    side_bytes: float = 0.0


class ObserverState(Protocol):
    """Accumulates over the query blocks of one prefill."""

    def block(self, layer: int, probs: Tensor, first: int, real_queries: Tensor) -> None:
        """One block of queries: probs [B, H, G, q, T'] fp32 over the columns 0..T'-1, the first query's column, and
        real_queries bool [B, q] (False = padding, or a query that the observer did not ask for)."""
        ...

    def result(self) -> Tensor:
        """[L, B, H, T] float32."""
        ...


class Observer(Protocol):
    """What is watched during prefill; hashable, so that policies which want the same share one observation."""

    @property
    def last(self) -> int | None:
        """How many of each prompt's last queries it wants to see; None = all. A prefix that prompts share is cut so that none
        of these lies in it."""
        ...

    def start(self, geometry: Geometry, lengths: Lengths, device: torch.device) -> ObserverState: ...

    def combine(self, before: Tensor, after: Tensor) -> Tensor:
        """Of an observer of all queries: what a prompt's showed, from what those of a shared prefix did (0 outside of its
        columns) and those after it: float32 [L, B, H, T] each."""
        ...


class Importance(Protocol):
    """Scores in, higher = keep. Frozen dataclasses; everything that changes lives in the tensors passed around."""

    @property
    def observer(self) -> Observer | None:
        """What must be watched during prefill, or None."""
        ...

    def score(self, context: Context) -> Tensor:
        """Scores of tokens that are new (of a prompt, or of a step, before its mass is added): float32 [L, B, H, T]."""
        ...

    def update(self, scores: Tensor, mass: Tensor, queries: Tensor) -> Tensor:
        """Scores after a step, given the attention that each token received in it, and how many queries could see it until
        now, this step's included (float32, float32, int64, same shape)."""
        ...
