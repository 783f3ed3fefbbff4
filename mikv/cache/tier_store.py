"""The packed pairs of one tier: for each layer, row and KV head a list of slots, each with a key, a value and what
belongs to them. This is what a compressed cache really holds; bytes are counted here, from the tensors."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mikv.kernels import pick
from mikv.quant.codec import Codec, Parts, storage_dtype
from mikv.tensors import Index, at
from mikv.types import Tier

# When slots are needed, so many are added: few enough that what is allocated stays close to what is used, enough that moving
# the store costs less than reading it (a copy of all slots in 32 steps of a decode).
_MORE, _SHARE = 4, 32


class Pairs(NamedTuple):
    """Exact pairs and what belongs to them: keys, values float [..., D]; positions int64 and scores float32 [...]."""

    keys: Tensor
    values: Tensor
    positions: Tensor
    scores: Tensor | None


class TierStore:
    """Slots of one tier, for a bank of L layers and B rows. All heads and layers of a row hold equally many tokens.

    Args:
        tier: bits and group.
        chunks: initial content, [l, B, H, S, ...] for consecutive slices of layers; of row b the first count[b] slots
            are used.
        count: int64 [B], on the CPU.
        head_dim: D.
        balancer: float32 [L, B, H, 1, D] for keys of a quantized tier, or None.
        compute: dtype of the model.
        positions: `stored` where the policy needs them (to rank tokens, to re-index them); `tracked` where only a dense copy
            does, which is a way to evaluate and no part of the cache: they are kept, and not counted; `slots` where they are
            the slots' numbers; `unknown` where nobody asks.
        with_scores: scores must be stored (where a token can still be demoted).
        packing: who quantizes and packs, see mikv.kernels.pick.
    """

    def __init__(
        self,
        tier: Tier,
        chunks: Iterable[Pairs],
        count: Tensor,
        head_dim: int,
        balancer: Tensor | None,
        compute: torch.dtype,
        positions: str,
        with_scores: bool,
        packing: str = "reference",
    ) -> None:
        group = tier.group_size(head_dim)
        self._key_codec = Codec(tier.k, group, head_dim, storage_dtype(compute))
        self._value_codec = Codec(tier.v, group, head_dim, storage_dtype(compute))
        self._balancer = balancer if tier.k < 16 else None
        self._positions, self.with_scores = positions, with_scores
        self._packing = packing
        self.tier = tier
        self.count = count.clone()
        self._longest = int(count.max())  # upper bound of count, known without looking
        encoded: list[Parts] = []
        start = 0
        for pairs in chunks:
            encoded.append(self._encode(pairs, slice(start, start + len(pairs.keys))))
            start += len(pairs.keys)
        self.parts = {name: torch.cat([parts[name] for parts in encoded]) for name in encoded[0]}

    @property
    def balancer(self) -> Tensor | None:
        """float32 [L, B, H, 1, D] that stored keys were multiplied by, or None."""
        return self._balancer

    @property
    def device(self) -> torch.device:
        return next(iter(self.parts.values())).device

    @property
    def slots(self) -> int:
        """Slots that are allocated, used or not."""
        return self._shape[3]

    @property
    def knows_positions(self) -> bool:
        return self._positions != "unknown"

    def positions(self, layers: slice = slice(None)) -> Tensor:
        """int64 [l, B, H, S] of some layers; of unused slots whatever lies there."""
        if "positions" in self.parts:
            return self.parts["positions"][layers].squeeze(-1).long()
        assert self._positions == "slots", "nobody asked for this tier's positions when it was made"
        shape = self._shape
        return torch.arange(shape[3], device=self.device).expand(shape[:4])[layers]

    def scores(self) -> Tensor | None:
        """float32 [L, B, H, S], or None where none are stored."""
        return self.parts["scores"].squeeze(-1) if self.with_scores else None

    def set_scores(self, scores: Tensor) -> None:
        self.parts["scores"] = scores.unsqueeze(-1)

    def used(self) -> Tensor:
        """bool [B, S]: slots that hold a token."""
        return torch.arange(self.slots) < self.count[:, None]

    def read(self, layers: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Dequantized keys (balancer undone) and values of some layers, float32 [l, B, H, S, D]."""
        return self._decode({name: part[layers] for name, part in self.parts.items()}, layers)

    def exchange(
        self, incoming: Pairs, slot: Tensor, arriving: Tensor, leaving: Tensor, rejected: Tensor
    ) -> tuple[tuple[Tensor, Tensor], Tensor, Pairs]:
        """One token comes, one goes, per layer and head of each row.

        Args:
            incoming: [L, B, H, ...]; appended where only `arriving`, put into `slot` where a token also leaves.
            slot: int64 [L, B, H], the token that leaves.
            arriving, leaving: bool [B], CPU.
            rejected: bool [L, B, H]: the incoming token is the one that goes; nothing is stored here.

        Returns:
            Keys and values of the incoming token as they are read back, float32 [L, B, H, D]; where it was put, int64
            [L, B, H] (an unused slot, where it was not to be stored); and the token that was in `slot`, dequantized.
        """
        if self._longest == self.slots:
            self._grow()
        device = slot.device
        taken = {name: part[at(part.shape, slot)].unsqueeze(3) for name, part in self.parts.items()}
        emptied = leaving & ~arriving
        if emptied.any():  # the gap is filled by the last token; in other rows that one is written over itself
            last = self._index((self.count - 1).clamp(min=0))
            gap = at(self._shape, torch.where(emptied.to(device)[None, :, None], slot, last[3]))
            for part in self.parts.values():
                part[gap] = part[last]
        self.count = self.count - emptied.long()
        # what must not be stored is written too, behind the last used slot: that slot stays unused
        replaces = (arriving & leaving).to(device)[None, :, None] & ~rejected
        slots = torch.where(replaces, slot, self.count.to(device)[None, :, None])
        target = at(self._shape, slots)
        encoded = self._encode(Pairs(*(None if x is None else x.unsqueeze(3) for x in incoming)))  # type: ignore[arg-type]
        for name, part in encoded.items():
            self.parts[name][target] = part.squeeze(3)
        appended = arriving & ~leaving
        self.count = self.count + appended.long()
        self._longest += int(appended.any())
        keys, values = self._decode(encoded)
        return (keys.squeeze(3), values.squeeze(3)), slots, self._pairs(taken)

    def _pairs(self, one_slot: Parts) -> Pairs:
        """Dequantized pairs [L, B, H, ...] of parts [L, B, H, 1, *]."""
        keys, values = self._decode(one_slot)
        if "positions" in one_slot:
            positions = one_slot["positions"].long().flatten(2)
        else:  # of a tier that nobody leaves: anything
            positions = torch.zeros(self._shape[:3], dtype=torch.int64, device=self.device)
        scores = one_slot["scores"].flatten(2) if self.with_scores else None
        return Pairs(keys.squeeze(3), values.squeeze(3), positions, scores)

    def fork(self, rows: Tensor) -> TierStore:
        """A store of its own with some of the rows (int64, CPU; one may come several times)."""
        forked = copy.copy(self)
        forked.parts = dict(self.parts)
        forked.select(rows)
        return forked

    def select(self, rows: Tensor) -> None:
        """Go on with some of the rows; part by part, so that what is left is not held twice."""
        there = rows.to(self.device)
        for name in self.parts:
            self.parts[name] = self.parts[name][:, there]
        self.count = self.count[rows]
        if self._balancer is not None:
            self._balancer = self._balancer[:, there]

    def nbytes(self) -> dict[str, Tensor]:
        """Bytes of the used slots by part, int64 [B]: slot bytes are those of the tensors that are stored."""
        per_part: dict[str, Tensor] = {}
        for name, slot_bytes in self._slot_bytes():
            per_part[name] = per_part.get(name, torch.zeros_like(self.count)) + self.count * slot_bytes
        return per_part

    def allocated(self) -> int:
        """Bytes of all slots of one row, used or not: what these tensors take of the memory. With what is not counted
        as stored, because only a dense copy beside the store reads it: tracked positions."""
        layers, _, heads = self._shape[:3]
        return self.slots * sum(part.shape[4] * part.element_size() * layers * heads for part in self.parts.values())

    def _slot_bytes(self) -> Iterator[tuple[str, int]]:
        """Parts that are counted, and the bytes of one of their slots in all layers and heads of a row."""
        layers, _, heads = self._shape[:3]
        for name, part in self.parts.items():
            if name != "positions" or self._positions == "stored":
                yield name.rpartition(".")[2], part.shape[4] * part.element_size() * layers * heads

    def _encode(self, pairs: Pairs, layers: slice = slice(None)) -> Parts:
        """Parts [l, B, H, S, *] of pairs [l, B, H, S, ...] of some layers."""
        balancer = None if self._balancer is None else self._balancer[layers]
        parts = {f"keys.{name}": part for name, part in self._stored(self._key_codec, pairs.keys, balancer).items()}
        parts |= {f"values.{name}": part for name, part in self._stored(self._value_codec, pairs.values, None).items()}
        if self._positions in ("stored", "tracked"):
            parts["positions"] = pairs.positions.to(torch.int32).unsqueeze(-1)
        if self.with_scores:
            assert pairs.scores is not None
            parts["scores"] = pairs.scores.unsqueeze(-1)
        return parts

    def _stored(self, codec: Codec, x: Tensor, balancer: Tensor | None) -> Parts:
        """x [l, B, H, S, D] as it is stored, multiplied by balancer [l, B, H, 1, D] before it is quantized."""
        if codec.bits == 16:
            return codec.encode(x)
        flat = None if balancer is None else balancer.squeeze(3).flatten(0, 1).contiguous()
        packed = pick.encode(x.flatten(0, 1), codec.bits, codec.head_dim // codec.group, flat, None, self._packing)
        assert packed.scale is not None
        assert packed.zero is not None
        parts = {"codes": packed.data, "scale": packed.scale, "zero": packed.zero}
        return {name: part.unflatten(0, x.shape[:2]) for name, part in parts.items()}

    def _decode(self, parts: Parts, layers: slice = slice(None)) -> tuple[Tensor, Tensor]:
        keys = self._key_codec.decode({n[5:]: part for n, part in parts.items() if n.startswith("keys.")})
        values = self._value_codec.decode({n[7:]: part for n, part in parts.items() if n.startswith("values.")})
        if self._balancer is not None:
            keys = keys / self._balancer[layers]
        return keys, values

    @property
    def _shape(self) -> torch.Size:
        """[L, B, H, S, *] of some part."""
        return next(iter(self.parts.values())).shape

    def _index(self, slot: Tensor) -> Index:
        """Index of one slot per row (int64 [B]), the same for all layers and heads."""
        shape = self._shape
        device = self.device
        return at(shape, slot.to(device)[None, :, None].expand(shape[:3]))

    def _grow(self) -> None:
        for name, part in self.parts.items():
            more = part.new_zeros((*part.shape[:3], _MORE + part.shape[3] // _SHARE, part.shape[4]))
            self.parts[name] = torch.cat((part, more), dim=3)
