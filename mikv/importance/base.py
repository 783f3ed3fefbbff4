"""The contract of an importance score, and what it may watch.

A score sees attention, keys and values, never the text: during prefill an `Observer` is shown the probabilities block by block
(no T x T matrix ever exists), during decoding the attention mass of each step. Only past attention enters, so no score can look
ahead. Scores are float32: in fp16 a large sum swallows every later increment.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from mikv.types import Geometry, Lengths

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from mikv.rope import Rope


@dataclass(frozen=True)
class Context:
    """The one argument of scores and budgets: T tokens of a bank, those of a prompt or the one that a step brought.

    layers: int64 [L], the layers' indices; total_layers: of the model; prompts: int64 [B], a number that names each prompt
    (the same alone and in any batch); positions: int64 [L, B, H, T], negative = padding; seen: int64 [B], real tokens until
    now; prompt_lengths: int64 [B], with the question where it belongs to the prompt; protected: bool [L, B, H, T], tokens
    that importance does not decide about (sinks, a window); keys, values: exact, [L, B, H, T, D]; observed: what the
    score's observer saw of the prompt, float32 [L, B, H, T, ...] (None while decoding); mass: attention that the tokens
    received in this step, summed over a group's query heads, float32 [L, B, H, T] (None for a prompt); key_noise: of a prompt,
    for a budget: float32 [L, B, H], see mikv.cache.sides; everywhere: of a prompt, for a budget that spans layers on several
    devices: the contexts of all of them, in the order of layers, with what its observer saw; output_projection: of a layer (by
    index), float [hidden, Hq, D]: what its attention's output is multiplied by; rope: of the model, None where its frequencies
    are not fixed; token_bytes: what a token takes in each tier, per layer and head, and side_bytes what a head takes
    besides; memo: of a prompt, what scores of several policies have in common, by name."""

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
    rope: Rope | None = None
    token_bytes: tuple[float, ...] = ()
    side_bytes: float = 0.0
    memo: dict[str, Tensor] = field(default_factory=dict)


class ObserverState(ABC):
    """Accumulates over one prefill. To be inherited from: only what its observer is shown is called."""

    def block(self, layer: int, probs: Tensor, first: int, real_queries: Tensor) -> None:
        """One block of queries: probs [B, H, G, q, T'] fp32 over the columns 0..T'-1, the first query's column, and
        real_queries bool [B, q] (False = padding, or a query that the observer did not ask for)."""
        raise NotImplementedError

    def queries(self, layer: int, query: Tensor, positions: Tensor) -> None:
        """All queries of a layer before RoPE, [B, H, G, T', D], and their positions, int64 [B, T'] (negative = padding)."""
        raise NotImplementedError

    def attended(self, layer: int, shown: Attended) -> None:
        """A layer's attention as a whole, after it."""
        raise NotImplementedError

    @abstractmethod
    def result(self) -> Tensor:
        """[L, B, H, T] float32, or with more behind; of queries [L, B, H, ...], without columns."""


class Attended(NamedTuple):
    """What goes into a layer's attention: the module and its model; hidden states [B, T, hidden]; keys, after RoPE, and values
    [B, H, T, D]; RoPE's cosines and sines [B, T, D]; real: bool [B, T], False = padding (on the left)."""

    module: Any
    model: Any
    hidden: Tensor
    keys: Tensor
    values: Tensor
    cosines: tuple[Tensor, Tensor]
    real: Tensor


class Observer(Protocol):
    """What is watched during prefill; hashable, so that policies which want the same share one observation."""

    @property
    def last(self) -> int | None:
        """How many of each prompt's last queries it wants to see; None = all. A prefix that prompts share is cut so that none
        of these lies in it."""
        ...

    @property
    def shown(self) -> str:
        """What its state is shown: `block` by block probabilities, `queries`, or what is `attended` (then prompts share no
        prefix)."""
        ...

    def start(self, geometry: Geometry, lengths: Lengths, device: torch.device) -> ObserverState: ...

    def combine(self, before: Tensor, after: Tensor) -> Tensor:
        """Of an observer of all queries: what a prompt's showed, from what those of a shared prefix did (0 outside of its
        columns) and those after it: both as `result` gives them."""
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


class OfPrompt(Importance):
    """A score of prompts alone, to be inherited from: it watches nothing, and what comes later changes nothing."""

    @property
    def observer(self) -> Observer | None:
        return None

    def update(self, scores: Tensor, mass: Tensor, queries: Tensor) -> Tensor:
        return scores
