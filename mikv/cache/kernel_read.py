"""A decode step's attention by the kernels: the packed tiers are read where they lie, nothing dense is made.

Where a policy re-indexes positions its keys must be rotated anew at each step: those alone are unpacked, layer by layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mikv.cache.policy_store import Change, PolicyStore, Received
from mikv.cache.reader import Reader
from mikv.cache.reindex import Reindex, gone_after_slots
from mikv.cache.tier_store import TierStore
from mikv.kernels import pick
from mikv.kernels.segments import Segment, Vectors


class KernelReader(Reader):
    """Store by store, over the segments of its tiers and the newest pair.

    Args:
        stores: see Reader.
        implementation: see mikv.kernels.pick.
        reindex: needed where a policy has contiguous positions.
    """

    def __init__(
        self, stores: Sequence[PolicyStore], implementation: str | None = None, reindex: Reindex | None = None
    ) -> None:
        super().__init__(stores)
        self._implementation, self._reindex = implementation, reindex
        self._mass: list[list[Sequence[Tensor | None]]] = [[] for _ in self.stores]  # by store, layer and segment

    def attend(self, layer: int, query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
        outs = []
        for (store, rows), mass in zip(self._rows(), self._mass, strict=True):
            segments = [tier_segment(tier, layer) for tier in store.tiers]
            if store.policy.positions == "contiguous":
                assert self._reindex is not None
                segments = _rotated(store, layer, segments, query.dtype, self._reindex)
            segments.append(_newest(keys[rows], values[rows], store.policy.importance is not None))
            attention = pick.decode_attention(query[rows].squeeze(2), segments, scaling, self._implementation)
            outs.append(attention.out)
            mass.append(attention.mass)
        return torch.cat(outs).unsqueeze(1)

    def _received(self, index: int, rows: slice) -> Received:
        if self.stores[index].policy.importance is None:
            return Received()
        *tiers, newest = (_stacked(of_segment) for of_segment in zip(*self._mass[index], strict=True))
        assert newest is not None
        return Received(tiers, newest[..., 0])

    def _follow(self, changes: Sequence[Sequence[Change]]) -> None:
        self._mass = [[] for _ in self.stores]

    def _take(self, rows: Tensor) -> None:
        self._mass = [[] for _ in self.stores]


def _stacked(of_layers: Sequence[Tensor | None]) -> Tensor | None:
    """[L, ...] of L tensors, or None where there are none."""
    found = [x for x in of_layers if x is not None]
    return torch.stack(found) if found else None


def tier_segment(tier: TierStore, layer: int) -> Segment:
    """One layer of a tier as the kernels read it. Nothing is copied."""
    stop = tier.count.to(device=tier.device, dtype=torch.int32)
    balancer = None if tier.balancer is None else tier.balancer[layer, :, :, 0].contiguous()
    keys, values = (_vectors(tier, name, bits, layer) for name, bits in (("keys", tier.tier.k), ("values", tier.tier.v)))
    return Segment(keys, values, stop, balancer=balancer, wants_mass=tier.with_scores)


def _vectors(tier: TierStore, name: str, bits: int, layer: int) -> Vectors:
    if bits == 16:
        return Vectors(16, tier.parts[f"{name}.raw"][layer])
    return Vectors(bits, *(tier.parts[f"{name}.{part}"][layer] for part in ("codes", "scale", "zero")))


def _rotated(
    store: PolicyStore, layer: int, segments: Sequence[Segment], dtype: torch.dtype, reindex: Reindex
) -> list[Segment]:
    """The same segments with keys that are unpacked and stand where a re-indexed cache shows them."""
    here = slice(layer, layer + 1)
    slots = [tier.slots for tier in store.tiers]
    positions = torch.cat([tier.positions(here)[0] for tier in store.tiers], dim=2)
    used = torch.cat([tier.used() for tier in store.tiers], dim=1)
    gone = gone_after_slots(positions, used, store.seen).split(slots, dim=2)
    seen = int(store.seen.max())
    return [
        segment._replace(keys=Vectors(16, reindex(tier.read(here)[0][0].to(dtype), missing, seen)), balancer=None)
        for segment, tier, missing in zip(segments, store.tiers, gone, strict=True)
    ]


def _newest(keys: Tensor, values: Tensor, wants_mass: bool) -> Segment:
    stop = torch.ones(len(keys), dtype=torch.int32, device=keys.device)
    key, value = (Vectors(16, x.unsqueeze(2).contiguous()) for x in (keys, values))
    return Segment(key, value, stop, wants_mass=wants_mass)
