"""Shares of tokens, in exact arithmetic: 0.29 * 100 is 28.999... in floating point."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def exact(share: float) -> Fraction:
    """The decimal number that was written, not its binary neighbour."""
    try:
        return Fraction(str(share))
    except ValueError as error:
        raise ValueError(f"{share} is no ratio; wanted a part of the tokens between 0 and 1 (0.2 = 20 % kept)") from error


def check_ratio(name: str, share: float) -> None:
    if not isinstance(share, int | float) or not 0 <= share <= 1:
        raise ValueError(f"{name}: {share} is no ratio; wanted a part of the tokens between 0 and 1 (0.2 = 20 % kept)")


def part(share: float, lengths: Tensor) -> Tensor:
    """floor(share * length) of lengths int64 [...]."""
    of = exact(share)
    return lengths * of.numerator // of.denominator
