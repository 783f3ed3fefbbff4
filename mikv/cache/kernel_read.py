"""A decode step's attention by the kernels: the packed tiers are read where they lie, nothing dense is made.

Where a policy re-indexes positions its keys must be rotated anew at each step: those alone are unpacked, layer by layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mikv.cache.policy_store import PolicyStore
from mikv.cache.reindex import Reindex, gone_after_slots
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
    reindex: Reindex | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of one layer, store by store, over its tiers and the pair of the step that is under way.

    Args:
        stores: whose rows follow each other in `query`.
        query: [R, Hq, 1, D].
        keys, values: [R, H, D], the newest pair, exact.
        padding: int64 [R], column = position + padding; columns: of the cache, with the newest.
        implementation: see mikv.kernels.pick.
        reindex: needed where a policy has contiguous positions.

    Returns:
        The output [R, 1, Hq, D], and the attention mass of each column, float32 [R, H, columns]: 0 where nothing is held,
        and where no score is kept (a tier that can't be left needs none).
    """
    heads = keys.shape[1]
    mass = torch.zeros((len(query), heads, columns), dtype=torch.float32, device=query.device)
    outs = []
    here = slice(layer, layer + 1)
    start = 0
    for store in stores:
        rows = slice(start, start + len(store.seen))
        start = rows.stop
        segments = [tier_segment(tier, layer) for tier in store.tiers]
        if store.policy.positions == "contiguous":
            assert reindex is not None
            segments = _rotated(store, layer, segments, columns, query.dtype, reindex)
        segments.append(_newest(keys[rows], values[rows], store.policy.importance is not None))
        attention = pick.decode_attention(query[rows].squeeze(2), segments, scaling, implementation)
        outs.append(attention.out)
        shift = padding[rows].to(query.device)[:, None, None]
        for tier, received in zip(store.tiers, attention.mass[:-1], strict=True):
            if received is not None:  # what lies in unused slots received nothing: added anywhere, it changes nothing
                column = (tier.positions(here)[0] + shift).clamp(0, columns - 1)
                mass[rows].scatter_add_(2, column, received)
        if attention.mass[-1] is not None:
            mass[rows, :, -1] = attention.mass[-1][..., 0]
    return torch.cat(outs).unsqueeze(1), mass


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


def _rotated(
    store: PolicyStore, layer: int, segments: Sequence[Segment], columns: int, dtype: torch.dtype, reindex: Reindex
) -> list[Segment]:
    """The same segments with keys that are unpacked and stand where a re-indexed cache shows them."""
    here = slice(layer, layer + 1)
    slots = [tier.slots for tier in store.tiers]
    positions = torch.cat([tier.positions(here)[0] for tier in store.tiers], dim=2)
    used = torch.cat([tier.used() for tier in store.tiers], dim=1)
    gone = gone_after_slots(positions, used, store.seen).split(slots, dim=2)
    return [
        segment._replace(keys=Vectors(16, reindex(tier.read(here)[0][0].to(dtype), missing, columns)), balancer=None)
        for segment, tier, missing in zip(segments, store.tiers, gone, strict=True)
    ]


def _newest(keys: Tensor, values: Tensor, wants_mass: bool) -> Segment:
    stop = torch.ones(len(keys), dtype=torch.int32, device=keys.device)
    key, value = (Vectors(16, x.unsqueeze(2).contiguous()) for x in (keys, values))
    return Segment(key, value, stop, wants_mass=wants_mass)
