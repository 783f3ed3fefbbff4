"""A decode step's attention by the kernels: the packed tiers are read where they lie, nothing dense is made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mikv.cache.compressed import CompressedCache
from mikv.cache.policy_store import PolicyStore
from mikv.cache.tier_store import TierStore
from mikv.kernels import pick
from mikv.kernels.segments import Segment, Vectors


def attend(
    stores: Sequence[PolicyStore],
    layer: int,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scaling: float,
    padding: Tensor,
    columns: int,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of one layer, store by store, over its tiers and the pair of the step that is under way.

    Args:
        stores: whose rows follow each other in `query`. Their positions are the tokens' own (policies with contiguous
            positions need keys that were rotated anew: not here).
        query: [R, Hq, 1, D].
        keys, values: [R, H, D], the newest pair, exact.
        padding: int64 [R], column = position + padding; columns: of the cache, with the newest.
        implementation: see mikv.kernels.pick.

    Returns:
        The output [R, 1, Hq, D], and the attention mass of each column, float32 [R, H, columns]: 0 where nothing is held,
        and where no score is kept (a tier that can't be left needs none).
    """
    heads = keys.shape[1]
    mass = torch.zeros((len(query), heads, columns), dtype=torch.float32, device=query.device)
    outs = []
    start = 0
    for store in stores:
        rows = slice(start, start + len(store.seen))
        start = rows.stop
        segments = [tier_segment(tier, layer) for tier in store.tiers]
        segments.append(_newest(keys[rows], values[rows], store.policy.importance is not None))
        attention = pick.decode_attention(query[rows].squeeze(2), segments, scaling, implementation)
        outs.append(attention.out)
        shift = padding[rows].to(query.device)[:, None, None]
        for tier, received in zip(store.tiers, attention.mass[:-1], strict=True):
            if received is not None:  # what lies in unused slots received nothing: added anywhere, it changes nothing
                column = (tier.positions()[layer] + shift).clamp(0, columns - 1)
                mass[rows].scatter_add_(2, column, received)
        if attention.mass[-1] is not None:
            mass[rows, :, -1] = attention.mass[-1][..., 0]
    return torch.cat(outs).unsqueeze(1), mass


def read_in_place(cache: CompressedCache, implementation: str | None = None) -> None:
    """Make a cache (reader=packed) attend by the kernels, for the benchmarks, until it picks by itself.

    Raises:
        ValueError: a policy re-indexes positions: its keys must be rotated anew at each step, which the kernels don't.
    """

    def reader_of(bank: Any) -> Callable[[int, Tensor, float], Tensor]:
        def read(layer: int, query: Tensor, scaling: float) -> Tensor:
            keys, values, columns = bank.keys[layer], bank.values[layer], bank.columns + 1
            out, mass = attend(bank.stores, layer, query, keys, values, scaling, bank.padding, columns, implementation)
            bank.mass.append(mass)
            return out

        return read

    for bank in cache.banks:
        if any(store.policy.positions == "contiguous" for store in bank.stores):
            raise ValueError("policies with contiguous positions can't be read in place; use positions=original")
        bank.attend = reader_of(bank)  # type: ignore[method-assign, assignment]


def tier_segment(tier: TierStore, layer: int) -> Segment:
    """One layer of a tier as the kernels read it. Nothing is copied."""
    stop = tier.count.to(device=next(iter(tier.parts.values())).device, dtype=torch.int32)
    balancer = None if tier.balancer is None else tier.balancer[layer, :, :, 0].contiguous()
    keys, values = (_vectors(tier, name, bits, layer) for name, bits in (("keys", tier.tier.k), ("values", tier.tier.v)))
    return Segment(keys, values, stop, balancer=balancer, wants_mass=tier.scores() is not None)


def _vectors(tier: TierStore, name: str, bits: int, layer: int) -> Vectors:
    if bits == 16:
        return Vectors(16, tier.parts[f"{name}.raw"][layer])
    return Vectors(bits, *(tier.parts[f"{name}.{part}"][layer] for part in ("codes", "scale", "zero")))


def _newest(keys: Tensor, values: Tensor, wants_mass: bool) -> Segment:
    stop = torch.ones(len(keys), dtype=torch.int32, device=keys.device)
    key, value = (Vectors(16, x.unsqueeze(2).contiguous()) for x in (keys, values))
    return Segment(key, value, stop, wants_mass=wants_mass)
