"""A decode step's attention by the kernels: the packed tiers are read where they lie, nothing dense is made.

Where a policy re-indexes positions its keys must be rotated anew at each step: those alone are unpacked, layer by layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from mikv.cache.policy_store import Change, PolicyStore, Received
from mikv.cache.reader import Reader
from mikv.cache.reindex import gone_after_slots
from mikv.cache.tier_store import TierStore
from mikv.kernels import pick
from mikv.kernels.segments import Segment, Vectors
from mikv.quant.base import Code
from mikv.quant.codes.affine import Affine
from mikv.quant.codes.codebook import Levels
from mikv.quant.codes.exact import Exact
from mikv.quant.transforms.balance import Balance
from mikv.rope import Rope


class KernelReader(Reader):
    """Store by store, over the segments of its tiers and the newest pair.

    Args:
        stores: see Reader.
        implementation: see mikv.kernels.pick.
        rope: needed where a policy has contiguous positions.
    """

    def __init__(self, stores: Sequence[PolicyStore], implementation: str | None = None, rope: Rope | None = None) -> None:
        super().__init__(stores)
        self._implementation, self._rope = implementation, rope
        self._mass: list[list[Sequence[Tensor | None]]] = [[] for _ in self.stores]  # by store, layer and segment

    def attend(self, layer: int, query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
        outs = []
        for (store, rows), mass in zip(self._rows(), self._mass, strict=True):
            mine = query[rows].squeeze(2)
            segments = [tier_segment(tier, layer, mine) for tier in store.tiers]
            if store.policy.positions == "contiguous":
                assert self._rope is not None
                segments = _rotated(store, layer, segments, query.dtype, self._rope)
            segments.append(_newest(keys[rows], values[rows], store.policy.scored))
            attention = pick.decode_attention(mine, segments, scaling, self._implementation)
            outs.append(attention.out)
            mass.append(attention.mass)
        return torch.cat(outs).unsqueeze(1)

    def _received(self, index: int, rows: slice) -> Received:
        if not self.stores[index].policy.scored:
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


def tier_segment(tier: TierStore, layer: int, query: Tensor) -> Segment:
    """One layer of a tier as the kernels read it, for a query [R, Hq, D]. Nothing is copied."""
    keys, values = (
        _vectors(tier, what, chain.code, layer) for what, chain in (("keys", tier.tier.key), ("values", tier.tier.value))
    )
    stop = tier.count[layer].to(device=tier.device, dtype=torch.int32)
    segment = Segment(keys, values, stop, wants_mass=tier.with_scores)
    if tier.tier.key.transforms == (Balance(),):  # the paper's, which the kernels divide out themselves
        segment = segment._replace(balancer=tier.sides["keys", tier.tier.key.transforms]["balancer"][layer].contiguous())
    elif tier.tier.key.transforms:
        grouped = query.float().unflatten(1, (keys.data.shape[1], -1))[None]  # [1, R, H, G, D]
        folded, shift = fold_query(tier, layer, grouped)
        segment = segment._replace(query=folded[0].flatten(1, 2), shift=None if shift is None else shift[0])
    if tier.tier.value.transforms:
        segment = segment._replace(output=partial(fold_output, tier, layer))
    return segment


def fold_query(tier: TierStore, layer: int, query: Tensor) -> tuple[Tensor, Tensor | None]:
    """The query [1, R, H, G, D] as the stored keys of a tier want it, and what is added to the logits, [1, R, H, G, S or 1]."""
    shift: Tensor | None = None
    for step, side, where in tier.steps("keys", layer):
        added = step.shift(query, side, where)
        if added is not None:
            shift = added if shift is None else shift + added
        query = step.query(query, side)
    return query, shift


def fold_output(tier: TierStore, layer: int, out: Tensor, weight: Tensor) -> Tensor:
    """The weighted sum of a tier's values from that of the vectors that are stored: out [R, H, G, D], weight [R, H, G, 1]."""
    for step, side, _ in reversed(list(tier.steps("values", layer))):
        out = step.output(out[None], weight[None], side)[0]
    return out


def _vectors(tier: TierStore, what: str, code: Code | None, layer: int) -> Vectors:
    def part(name: str) -> Tensor:
        return tier.parts[f"{what}.{name}"][layer]

    if isinstance(code, Exact):
        return Vectors(16, part("raw"))
    if isinstance(code, Affine):
        return Vectors(code.bits, part("codes"), part("scale"), part("zero"))
    assert isinstance(code, Levels), "a code that the kernels don't know is read from a dense copy"
    return Vectors(code.bits, part("codes"), part("norm"), levels=code.table(tier.device, half=tier.device.type == "cuda"))


def _rotated(store: PolicyStore, layer: int, segments: Sequence[Segment], dtype: torch.dtype, rope: Rope) -> list[Segment]:
    """The same segments with keys that are unpacked and stand where a re-indexed cache shows them."""
    here = slice(layer, layer + 1)
    slots = [tier.slots for tier in store.tiers]
    positions = torch.cat([tier.positions(here)[0] for tier in store.tiers], dim=2)
    used = torch.cat([torch.arange(tier.slots) < tier.count[layer][..., None] for tier in store.tiers], dim=2)
    gone = gone_after_slots(positions, used, store.seen).split(slots, dim=2)
    seen = int(store.seen.max())
    return [
        segment._replace(
            keys=Vectors(16, rope.turn(tier.read(here)[0][0].to(dtype), missing, seen)), balancer=None, query=None, shift=None
        )
        for segment, tier, missing in zip(segments, store.tiers, gone, strict=True)
    ]


def _newest(keys: Tensor, values: Tensor, wants_mass: bool) -> Segment:
    stop = torch.ones(keys.shape[:2], dtype=torch.int32, device=keys.device)
    key, value = (Vectors(16, x.unsqueeze(2).contiguous()) for x in (keys, values))
    return Segment(key, value, stop, wants_mass=wants_mass)
