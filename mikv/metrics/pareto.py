"""Which policies no other one beats: the Pareto front of bytes and a measure."""

from __future__ import annotations

from collections.abc import Sequence


def pareto_front(sizes: Sequence[float], values: Sequence[float], lower_is_better: bool = False) -> list[int]:
    """Places of the points that are better than all smaller ones, by size. Of equal points the first stands for all."""
    front: list[int] = []
    better = [-v if lower_is_better else v for v in values]
    for i in sorted(range(len(sizes)), key=lambda i: (sizes[i], -better[i])):
        if not front or better[i] > better[front[-1]]:
            front.append(i)
    return front
