"""ZipCache's salience (arXiv 2405.14256): attention per query, estimated from a few probe queries of the prompt.

    probes       the last 5 % of a prompt's queries, and as many drawn at random among the others
    salience_i   sum of the attention that token i receives from the probes, over the number of probes that can see it

A kernel need make the probabilities of the probes alone. Divided by the number of *all* queries that can see a token (`per` =
length: T - i), as the official code does, the sum favours late tokens, whatever they received: half of the probes come last.
While decoding every query is a probe: its attention is at hand here anyway.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

from mikv.importance.base import Observer
from mikv.importance.scores import Accumulated, ColumnSums, ColumnSumsState
from mikv.randomness import uniform
from mikv.types import Geometry, Lengths

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Probes(ColumnSums):
    """Observer: salience, from `share` of each prompt's queries.

    Args:
        last: more than any prompt has. Which queries are probes depends on the length of the whole prompt, so that none may
            lie in a prefix that prompts share.
        share: of the queries, in 0..1; half of them the last ones, half drawn (with repetition).
        per: what sums are divided by: `probes` that can see the token, or its share of all queries that can (`length`).
        seed: of the draw.
    """

    last: int | None = 2**40
    share: float = 0.1
    per: str = "probes"
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.share, bool) or not isinstance(self.share, int | float) or not 0 < self.share <= 1:
            raise ValueError(f"probes={self.share}: a share of the prompt's queries, above 0 and at most 1 (0.1 = 10 %)")
        object.__setattr__(self, "share", float(self.share))
        if self.per not in ("probes", "length"):
            raise ValueError(f"per={self.per}: choose probes or length")

    def start(self, geometry: Geometry, lengths: Lengths, device: torch.device) -> _ProbesState:
        return _ProbesState(self, geometry, lengths, device)

    def weights(self, length: int) -> Tensor:
        """How often each query of a prompt is a probe, float32 [length]. From the length alone: the same in any batch."""
        import torch

        half = Fraction(str(self.share)) / 2
        others = int((1 - half) * length)
        found = torch.zeros(length)
        found[others:] = 1
        draws = torch.arange(int(half * length) if others else 0)
        of_length = torch.tensor(length) * 0x5851F42D4C957F2D  # int64 wraps
        drawn = uniform(draws * 0x2545F4914F6CDD1D + of_length + self.seed) * others
        return found.index_add_(0, drawn.long(), torch.ones(len(draws)))


class _ProbesState(ColumnSumsState):
    def __init__(self, probes: Probes, geometry: Geometry, lengths: Lengths, device: torch.device) -> None:
        import torch

        super().__init__(geometry, lengths, device)
        weights, divisors = torch.zeros(2, len(lengths.tokens), lengths.width)
        for row, length in enumerate(lengths.tokens.tolist()):
            mine = probes.weights(length)
            weights[row, lengths.width - length :] = mine
            able = mine if probes.per == "probes" else torch.full_like(mine, float(mine.mean()))
            divisors[row, lengths.width - length :] = able.flip(0).cumsum(0).flip(0)
        self._weights, self._divisors = weights.to(device), divisors.masked_fill(divisors == 0, 1).to(device)

    def block(self, layer: int, probs: Tensor, first: int, real_queries: Tensor) -> None:
        import torch

        weights = self._weights[:, first : first + probs.shape[3]] * real_queries
        self.add(layer, torch.matmul(weights[:, None, None, None], probs).sum(dim=(2, 3)))

    def result(self) -> Tensor:
        return super().result() / self._divisors[:, None]


@dataclass(frozen=True)
class Salience(Accumulated):
    """The mean attention per query. Arguments: see Probes."""

    share: float = 0.1
    per: str = "probes"
    seed: int = 0

    def __post_init__(self) -> None:
        Probes(share=self.share, per=self.per)  # refuses what is none
        object.__setattr__(self, "share", float(self.share))

    @property
    def observer(self) -> Observer:
        return Probes(share=self.share, per=self.per, seed=self.seed)

    def update(self, scores: Tensor, mass: Tensor, queries: Tensor) -> Tensor:
        return scores + (mass - scores) / queries
