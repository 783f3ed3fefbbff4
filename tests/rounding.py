"""What holds on every processor where the same is computed in matrices of another shape, or summed up in another order.

Numbers then differ in their last digits, and where a number lies at the border of two codes the code may flip: the logits of
that row move, a little, for good. So most rows must agree closely, all of them roughly, and what is counted exactly. Rows that
are mixed up, or feel their neighbours' padding, are beyond this.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from torch import Tensor

from mikv.engine.requests import Generation, Scores

CLOSELY, ROUGHLY = 1e-3, 1.0  # logits and log-probabilities of a tiny random model are some units large
FEW = 1 / 3  # of the rows may have a flipped code


def assert_rows_alike(mine: Tensor, wanted: Tensor) -> None:
    """Logits [n, V]."""
    off = (mine - wanted).abs().amax(dim=-1)
    assert off.max() < ROUGHLY, off
    assert (off > CLOSELY).float().mean() <= FEW, off


def assert_scores_alike(mine: Sequence[Scores], wanted: Sequence[Scores]) -> None:
    """Of several prompts, or policies: the same counts; log-probabilities and fidelity of continuations alike."""
    off = 0
    for one, other in zip(mine, wanted, strict=True):
        assert (one.compressed_tokens, one.usage) == (other.compressed_tokens, other.usage)
        differences = []
        for a, b in zip(one.continuations, other.continuations, strict=True):
            assert a.tokens == b.tokens
            differences += [abs(a.logprob - b.logprob) / a.tokens, abs(a.fidelity.kl - b.fidelity.kl)]
        assert max(differences) < ROUGHLY, differences
        off += median(differences) > 10 * CLOSELY  # a float32 model stores FP16: its last bit may flip in any of them
    assert off <= FEW * len(mine)


def assert_answers_alike(mine: Sequence[Generation], wanted: Sequence[Generation]) -> None:
    """Of several prompts, or policies: the same counts, and most of them the same tokens."""
    other = sum(a.tokens != b.tokens for a, b in zip(mine, wanted, strict=True))
    assert other <= FEW * len(mine)
    for a, b in zip(mine, wanted, strict=True):
        assert (a.compressed_tokens, a.usage, a.watched_tiers) == (b.compressed_tokens, b.usage, b.watched_tiers)
