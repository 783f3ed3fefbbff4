"""Eqs. 2-4 of the paper: the outlier-aware channel balancer.

    b = sqrt(max_t |q| / max_t |k|)      per layer, KV head and channel, over the prompt
    stored key = Q(k * b)                logits = (q / b) . Q(k * b)

Keys and queries have outliers in the same few channels; after balancing, max |q / b| = max |k b| in each, so that the
quantizer's step is spent where the dot product feels it. It is computed from each prompt alone and frozen for decoding.
Values are not balanced. With grouped-query attention max |q| is taken over the query heads of a group (our reading:
the paper's models of that kind are not described).
"""

from __future__ import annotations

import torch
from torch import Tensor


def balancer(query_absmax: Tensor, key_absmax: Tensor) -> Tensor:
    """b in float32, same shape as both inputs ([..., D], non-negative). 1 where a maximum is zero or not finite."""
    q, k = query_absmax.to(torch.float32), key_absmax.to(torch.float32)
    b = torch.sqrt(q / k)
    return torch.where(torch.isfinite(b) & (b > 0), b, torch.ones_like(b))
