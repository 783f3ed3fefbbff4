"""Places in tensors that hold a vector for each layer, row, head and slot. Imports nothing of the project."""

from __future__ import annotations

import torch
from torch import Tensor

Index = tuple[Tensor, Tensor, Tensor, Tensor]


def at(shape: torch.Size, last: Tensor) -> Index:
    """Index of the places `last` (int64 [L, B, H] or [L, B, H, n]) along dimension 3 of a tensor of shape [L, B, H, S, ...].

    Advanced indexing: gather and scatter want an index as large as the data, and are slower for it.
    """
    layer, row, head = torch.meshgrid(*(torch.arange(n, device=last.device) for n in shape[:3]), indexing="ij")
    if last.dim() == 4:
        layer, row, head = layer[..., None], row[..., None], head[..., None]
    return layer, row, head, last


def taken(x: Tensor, slots: Tensor) -> Tensor:
    """Vectors of x [L, B, H, T, D] in another order: slots int64 [L, B, H, S] -> [L, B, H, S, D].

    As rows of one matrix, which is copied several times as fast as by advanced indexing.
    """
    first = torch.arange(slots.shape[:3].numel(), device=x.device).view(*slots.shape[:3], 1) * x.shape[3]
    rows = x.reshape(-1, x.shape[-1]).index_select(0, (first + slots).flatten())
    return rows.view(*slots.shape, x.shape[-1])


def layer_chunks(shape: torch.Size, elements: int = 2**20) -> list[slice]:
    """Slices of the first dimension of [L, B, H, T, D] that hold about `elements` each.

    Work on a whole prefill goes chunk by chunk: its temporaries then stay in the processor's cache, and
    small beside the data.
    """
    per_layer = max(1, shape[1:].numel())
    step = max(1, elements // per_layer)
    return [slice(start, start + step) for start in range(0, shape[0], step)]


def ranks(value: Tensor) -> Tensor:
    """Of each along the last dimension: 0 = the highest, int64; ties go to the later one."""
    # flipped, so that the stable sort meets the later one first
    order = value.flip(-1).argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places).flip(-1)
