"""How large a policy's cache is, and which share of important tokens makes it as large as wanted.

Two policies at the same ratio are not at the same bytes (positions, scores, scales and minima differ), so a comparison at
equal bytes asks a real store what it holds: the cache of one head of random numbers is built, and its tensors are counted.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from mikv.cache.backend import Backend
from mikv.cache.compressed import CompressedCache
from mikv.cache.prefill import PrefillBank, PrefillState
from mikv.policy import Policy
from mikv.rope import Rope
from mikv.types import Geometry, Lengths

# The balancer is the same for any length, and budgets are rounded down to whole tokens: at this length both weigh little.
TOKENS = 1024
_STEPS = 1000  # shares are multiples of 1 / _STEPS: labels stay readable


def counted_size(policy: Policy, head_dim: int, tokens: int = TOKENS) -> float:
    """Stored bytes of a context of so many tokens over those of the 16-bit cache, counted from the tensors of one head."""
    noise = torch.randn(2, 1, 1, 1, tokens, head_dim, generator=torch.Generator().manual_seed(0))
    geometry, lengths = Geometry(1, 1, 1, head_dim), Lengths(torch.tensor([tokens]), tokens)
    generator = torch.Generator().manual_seed(1)
    shapes = {observer: observer.start(geometry, lengths, noise.device).result().shape for observer in policy.observers}
    bank = PrefillBank(
        layers=torch.zeros(1, dtype=torch.long),
        keys=noise[0],
        values=noise[1],
        query_absmax=noise[0].abs().amax(dim=3),
        query_squares=noise[0].square().sum(dim=3),
        observed={observer: torch.rand(shape, generator=generator) for observer, shape in shapes.items()},
        last_queries=noise.new_zeros((1, 1, 1, 1, 0, head_dim)),
    )
    rope = Rope(torch.ones(head_dim // 2))
    prompts = torch.zeros(1, dtype=torch.long)
    # which tokens a score chooses does not change their number
    state = PrefillState((bank,), lengths, prompts, geometry, torch.bfloat16, rope, lambda _: noise.new_ones(1, 1, head_dim))
    (usage,) = CompressedCache(state, [policy], backend=Backend("packed")).usage()
    return sum(usage.nbytes.values()) / usage.full_nbytes


def largest_share(make: Callable[[float], Policy], size: float, head_dim: int) -> float | None:
    """The largest share of tokens in the first tier, a multiple of 0.001, with which a policy is no larger than `size` (of
    the 16-bit cache); None where it is larger with any share.

    make: the policy with a share. Its size must grow with it.
    """
    low, high = -1, _STEPS
    while low < high:
        middle = (low + high + 1) // 2
        if counted_size(make(middle / _STEPS), head_dim) <= size:
            low = middle
        else:
            high = middle - 1
    return None if low < 0 else low / _STEPS
