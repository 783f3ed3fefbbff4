"""Outcomes of clusters, made at random: how many of each cluster were lost and gained."""

from __future__ import annotations

import numpy as np

# Clusters of 2 to 10 samples: of one size, and mixed.
SIZES = {"2": [2], "5": [5], "10": [10], "mixed": [2, 10, 3, 7, 5, 2, 9, 4, 6, 8]}


def sizes_of(kind: str, groups: int) -> np.ndarray:
    """Sizes [groups]."""
    return np.resize(np.array(SIZES[kind]), groups)


def clustered(
    rng: np.random.Generator, trials: int, sizes: np.ndarray, correlation: float, lost: float, gained: float
) -> tuple[np.ndarray, np.ndarray]:
    """Counts of lost and gained samples [trials, clusters]: a cluster's own rates are drawn from a Dirichlet distribution whose
    means are `lost` and `gained`, and whose width makes two of its samples correlate so."""
    means = np.array([lost, gained, 1 - lost - gained])
    weights = rng.gamma(means * (1 - correlation) / correlation + 1e-12, size=(trials, len(sizes), 3))
    weights[weights.sum(axis=-1) == 0] = means  # all three too small for a float
    counts = rng.multinomial(np.broadcast_to(sizes, (trials, len(sizes))), weights / weights.sum(axis=-1, keepdims=True))
    return counts[..., 0], counts[..., 1]


def copied(
    rng: np.random.Generator, trials: int, sizes: np.ndarray, correlation: float, lost: float, gained: float
) -> tuple[np.ndarray, np.ndarray]:
    """The same, but each sample is either drawn by itself or copies what was drawn once for its cluster: whole clusters are
    lost, and no sample beside them where losses are rare."""
    chances = np.broadcast_to([lost, gained, 1 - lost - gained], (trials, len(sizes), 3))
    copies = rng.binomial(np.broadcast_to(sizes, (trials, len(sizes))), correlation**0.5)
    counts = rng.multinomial(1, chances) * copies[..., None] + rng.multinomial(sizes - copies, chances)
    return counts[..., 0], counts[..., 1]
