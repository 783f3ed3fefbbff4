"""The packed pairs of one tier: for each layer, row and KV head a list of slots, each with a key, a value and what
belongs to them. This is what a compressed cache really holds; bytes are counted here, from the tensors."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mikv.cache.sides import Sides, apply, undo
from mikv.kernels import pick
from mikv.kernels.segments import PACKED_BITS
from mikv.quant.base import Parts, Side, Transform, Where, storage_dtype
from mikv.quant.codes.affine import Affine
from mikv.quant.codes.exact import Exact
from mikv.quant.tier import Tier
from mikv.quant.transforms.balance import Balance
from mikv.rope import Rope
from mikv.tensors import at

# When slots are needed, so many are added: few enough that what is allocated stays close to what is used, enough that moving
# the store costs less than reading it (a copy of all slots in 32 steps of a decode).
_MORE, _SHARE = 4, 32


class Pairs(NamedTuple):
    """Exact pairs and what belongs to them: keys, values float [..., D]; positions int64 and scores float32 [...]."""

    keys: Tensor
    values: Tensor
    positions: Tensor
    scores: Tensor | None

    def at(self, index: Tensor) -> Pairs:
        """Others of [L, B, H, n, ...] along n: int64 [L, B, H, m]."""
        where = at(self.positions.shape, index)
        return Pairs(*(None if x is None else x[where] for x in self))  # type: ignore[arg-type]


class Exchanged(NamedTuple):
    """What an exchange did. stored bool [L, B, H, A]: whether an incoming token was; keys, values float32 [L, B, H, A, D]: as
    they are read back; slots int64 [L, B, H, A]: where they are (an unused slot, where they were not to be stored); taken:
    the tokens that left, [L, B, H, K, ...]; compacted: whether tokens that stayed have changed their slots."""

    stored: Tensor
    keys: Tensor
    values: Tensor
    slots: Tensor
    taken: Pairs
    compacted: bool


class TierStore:
    """Slots of one tier, for a bank of L layers and B rows. Each layer and head of a row holds as many tokens as it holds.

    Args:
        tier: how pairs are stored.
        sides: what the transforms of its chains were fitted to.
        chunks: initial content, [l, B, H, S, ...] for consecutive slices of layers; the first count[l, b, h] slots are used.
            S is a multiple of the tier's block.
        count: int64 [L, B, H], on the CPU.
        compute: dtype of the model.
        positions: `stored` where the policy needs them (to rank tokens, to re-index them, to undo a transform); `tracked` where
            only a dense copy does, which is a way to evaluate and no part of the cache: they are kept, and not counted; `slots`
            where they follow from the slots: `first`, the slot's number, and `kept`; `unknown` where they are not needed.
        with_scores: scores must be stored (where a token can still be demoted).
        first, kept: position of the first token, and those behind it that other tiers hold (and store), int64 [L, B, H, n],
            rising, None = none.
        rope: of the model; None where its frequencies are not fixed.
        packing: which code quantizes and packs, see mikv.kernels.pick.
    """

    def __init__(
        self,
        tier: Tier,
        sides: Sides,
        chunks: Iterable[Pairs],
        count: Tensor,
        compute: torch.dtype,
        positions: str,
        with_scores: bool,
        first: int = 0,
        kept: Tensor | None = None,
        rope: Rope | None = None,
        packing: str = "reference",
    ) -> None:
        self._chains = {"keys": tier.key, "values": tier.value}
        self._positions, self._first, self.with_scores = positions, first, with_scores
        self._storage, self._rope, self._packing = storage_dtype(compute), rope, packing
        self.tier, self.sides = tier, sides
        # the j-th that is kept elsewhere comes before all slots from kept - j on
        self._passed = None if kept is None else (kept - torch.arange(kept.shape[-1], device=kept.device) - first).contiguous()
        self.count = count.clone()
        encoded: list[Parts] = []
        start = 0
        for pairs in chunks:
            encoded.append(self._encode(pairs, slice(start, start + len(pairs.keys))))
            start += len(pairs.keys)
        self.parts = {name: torch.cat([parts[name] for parts in encoded]) for name in encoded[0]}

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
        assert self._positions == "slots", "this tier was made without positions"
        slots = torch.arange(self.slots, device=self.device).expand(self._shape[:4])[layers]
        if self._passed is None:
            return self._first + slots
        return self._first + slots + torch.searchsorted(self._passed[layers], slots.contiguous(), right=True)

    def scores(self) -> Tensor | None:
        """float32 [L, B, H, S], or None where none are stored."""
        return self.parts["scores"].squeeze(-1) if self.with_scores else None

    def set_scores(self, scores: Tensor) -> None:
        self.parts["scores"] = scores.unsqueeze(-1)

    def used(self) -> Tensor:
        """bool [L or 1, B, H or 1, S]: slots that hold a token; 1 where all layers and heads hold equally many. On the CPU."""
        count = self.count
        if (count == count[:1, :, :1]).all():
            count = count[:1, :, :1]
        return torch.arange(self.slots) < count[..., None]

    def read(self, layers: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Dequantized keys and values of some layers, transforms undone, float32 [l, B, H, S, D]."""
        return self._decode({name: part[layers] for name, part in self.parts.items()}, layers)

    def steps(self, what: str, layer: int) -> Iterator[tuple[Transform, Side, Where]]:
        """The transforms of `keys` or `values`, and what they need in one layer (a first dimension of 1)."""
        chain, here = self._chains[what], slice(layer, layer + 1)
        where = Where(self.positions(here) if self._needs_positions else None, self._rope)
        for i, step in enumerate(chain.transforms):
            side = self.sides[what, chain.transforms[: i + 1]]
            yield step, {name: tensor[here] for name, tensor in side.items()}, where

    def reserve(self, tokens: int) -> None:
        """Make room for so many more tokens per layer and head."""
        wanted = int(self.count.max()) + tokens
        if wanted <= self.slots:
            return
        more = max(_MORE + self.slots // _SHARE, wanted - self.slots)
        more = -(-more // self.tier.block) * self.tier.block
        for name, part in self.parts.items():
            added = part.new_zeros((*part.shape[:3], more // self._block(name), part.shape[4]))
            self.parts[name] = torch.cat((part, added), dim=3)

    def exchange(self, incoming: Pairs, arriving: Tensor, leaving: Tensor, chosen: Tensor | None) -> Exchanged:
        """Some tokens come, some go, per layer and head of each row. There must be room (`reserve`).

        Args:
            incoming: [L, B, H, A, ...], in the order of positions.
            arriving: int64 [L, B, H], CPU: the first so many of them count; a multiple of the tier's block.
            leaving: int64 [L, B, H], CPU: how many tokens go.
            chosen: int64 [L, B, H, K]: the tokens that leave, the first `leaving` count: slots, and from `slots` on the
                incoming token chosen - slots, which is not stored at all. None = no token, in any head.
        """
        device, slots = self.device, self.slots
        index = torch.arange(incoming.positions.shape[3], device=device)
        stays = index < arriving.to(device)[..., None]  # [L, B, H, A]
        taken, compacted = incoming, False
        if chosen is None:
            target = self.count.to(device)[..., None] + index
        else:
            goes = torch.arange(chosen.shape[3], device=device) < leaving.to(device)[..., None]  # [L, B, H, K]
            taken = self._taken(incoming, chosen, slots)
            refused = (chosen - slots)[..., None, :] == index[:, None]  # [L, B, H, A, K]
            stays = stays & ~(refused & goes[..., None, :]).any(dim=-1)
            target, compacted = self._make_room(chosen, goes & (chosen < slots), stays, arriving, leaving)
        self.count = self.count + arriving - leaving
        # what must not be stored is written too, behind the last used slot: that slot stays unused
        target = torch.where(stays, target, self.count.to(device)[..., None])
        encoded = self._encode(incoming)
        self._put(encoded, target)
        keys, values = self._decode(encoded, positions=incoming.positions)
        return Exchanged(stays, keys, values, target, taken, compacted)

    def _taken(self, incoming: Pairs, chosen: Tensor, slots: int) -> Pairs:
        """The chosen ones, from slots (dequantized) or from those that come (as exact as they came)."""
        slot = chosen.clamp(max=slots - 1)
        mine = self._pairs({name: part[at(part.shape, slot)] for name, part in self.parts.items()}, slot)
        theirs = incoming.at((chosen - slots).clamp(min=0))
        new = chosen >= slots
        return Pairs(
            torch.where(new[..., None], theirs.keys.float(), mine.keys),
            torch.where(new[..., None], theirs.values.float(), mine.values),
            torch.where(new, theirs.positions, mine.positions),
            None if mine.scores is None or theirs.scores is None else torch.where(new, theirs.scores, mine.scores),
        )

    def _make_room(
        self, chosen: Tensor, inside: Tensor, stays: Tensor, arriving: Tensor, leaving: Tensor
    ) -> tuple[Tensor, bool]:
        """Slots for the incoming tokens that stay, [L, B, H, A]: first the gaps, then behind the last one. Gaps that are left
        are filled by the last tokens; whether there were any."""
        device = self.device
        # of the j-th that stays the j-th gap, from below: those lie before what is left in the end
        gaps = torch.where(inside, chosen, torch.iinfo(torch.int64).max).sort(dim=-1).values
        number = inside.sum(dim=-1, keepdim=True)
        nth = stays.cumsum(dim=-1) - 1
        gap = gaps.gather(-1, nth.clamp(0, gaps.shape[-1] - 1))
        target = torch.where(nth < number, gap, self.count.to(device)[..., None] + nth - number)
        if not bool((leaving > arriving).any()):
            return target, False
        # tokens that are left before any is added
        left = (self.count - (leaving - arriving).clamp(min=0)).to(device)[..., None]
        # the gaps that no token fills and that lie before `left`, and the tokens that lie behind it
        unfilled = torch.arange(gaps.shape[-1], device=device)
        open_gap = (unfilled < number) & (unfilled >= stays.sum(dim=-1, keepdim=True))
        tail = left + torch.arange(gaps.shape[-1], device=device)
        there = tail < self.count.to(device)[..., None]
        there &= ~((tail[..., None] == gaps[..., None, :]) & open_gap[..., None, :]).any(dim=-1)
        fills = (open_gap & (gaps < left)).to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
        moves = there.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
        many = there.sum(dim=-1, keepdim=True)
        spare = self.count.to(device)[..., None].clamp(max=self.slots - 1)  # a slot that may be written over itself
        source = torch.where(unfilled < many, tail.gather(-1, moves), spare)
        goal = torch.where(unfilled < many, gaps.gather(-1, fills), spare)
        for part in self.parts.values():
            part[at(part.shape, goal)] = part[at(part.shape, source)]
        return target, True

    def _put(self, encoded: Parts, target: Tensor) -> None:
        for name, part in encoded.items():
            block = self._block(name)
            self.parts[name][at(self.parts[name].shape, target[..., ::block] // block)] = part

    def _block(self, name: str) -> int:
        """How many slots share one entry of a part."""
        what, _, part = name.partition(".")
        code = self._chains[what].code if what in self._chains else None
        return code.block if code is not None and part in code.per_block else 1

    def _pairs(self, parts: Parts, slots: Tensor) -> Pairs:
        """Dequantized pairs [L, B, H, n, ...] of parts [L, B, H, n, *] that lie in some slots (int64 [L, B, H, n])."""
        # where they are not known no token leaves: anything will do
        positions = parts["positions"].squeeze(-1).long() if "positions" in parts else self._first + slots
        keys, values = self._decode(parts, positions=positions)
        return Pairs(keys, values, positions, parts["scores"].squeeze(-1) if self.with_scores else None)

    def fork(self, rows: Tensor, sides: Sides) -> TierStore:
        """A store of its own with some of the rows (int64, CPU; one may come several times); sides: of those rows."""
        forked = copy.copy(self)
        forked.parts = dict(self.parts)
        forked.select(rows, sides)
        return forked

    def select(self, rows: Tensor, sides: Sides) -> None:
        """Go on with some of the rows; part by part, so that what is left is not held twice."""
        there = rows.to(self.device)
        for name in self.parts:
            self.parts[name] = self.parts[name][:, there]
        self.count, self.sides = self.count[:, rows], sides
        self._passed = None if self._passed is None else self._passed[:, there].contiguous()

    def nbytes(self) -> dict[str, Tensor]:
        """Bytes of the used slots by part, int64 [B]: slot bytes are those of the tensors that are stored."""
        per_part: dict[str, Tensor] = {}
        tokens = self.count.sum(dim=(0, 2))
        for name, slot_bytes in self._slot_bytes():
            kind = name.rpartition(".")[2]
            per_part[kind] = per_part.get(kind, torch.zeros_like(tokens)) + tokens // self._block(name) * slot_bytes
        return per_part

    def allocated(self) -> int:
        """Bytes of all slots of one row, used or not: what these tensors take of the memory. With what is not counted
        as stored, because only a dense copy beside the store reads it: tracked positions."""
        return sum(part.shape[3:].numel() * part.element_size() * part[:, :1].shape[:3].numel() for part in self.parts.values())

    def _slot_bytes(self) -> Iterator[tuple[str, int]]:
        """Parts that are counted, and the bytes of one of their slots (or blocks) of one layer and head."""
        for name, part in self.parts.items():
            if name != "positions" or self._positions == "stored":
                yield name, part.shape[4] * part.element_size()

    def _encode(self, pairs: Pairs, layers: slice = slice(None)) -> Parts:
        """Parts [l, B, H, S, *] of pairs [l, B, H, S, ...] of some layers."""
        where = Where(pairs.positions, self._rope)
        parts = {
            f"{what}.{name}": part
            for what, of_it in self._stored({"keys": pairs.keys, "values": pairs.values}, layers, where).items()
            for name, part in of_it.items()
        }
        if self._positions in ("stored", "tracked"):
            parts["positions"] = pairs.positions.to(torch.int32).unsqueeze(-1)
        if self.with_scores:
            assert pairs.scores is not None
            parts["scores"] = pairs.scores.unsqueeze(-1)
        return parts

    def _stored(self, pairs: dict[str, Tensor], layers: slice, where: Where) -> dict[str, Parts]:
        """Keys and values [l, B, H, S, D] as they are stored."""
        found, ready = {}, {}
        codes = {what: chain.code for what, chain in self._chains.items() if chain.code is not None}
        for what, x in pairs.items():
            code = codes[what]
            if self._packing == "triton" and isinstance(code, Affine) and code.bits in PACKED_BITS:
                found[what] = self._by_kernel(what, code, x, layers, where)
            else:
                ready[what] = apply(self._chains[what], what, x, self.sides, layers, where)
        if len(ready) == 2 and codes["keys"] == codes["values"] != Exact():
            # at once: a step has few vectors, and is over sooner with half of the calls
            both = codes["keys"].encode(torch.stack(tuple(ready.values())), self._storage)
            return {what: {name: part[i] for name, part in both.items()} for i, what in enumerate(ready)}
        return found | {what: codes[what].encode(y, self._storage) for what, y in ready.items()}

    def _by_kernel(self, what: str, code: Affine, x: Tensor, layers: slice, where: Where) -> Parts:
        """The same bits from the kernel, which balances in passing where that is all there is to be done."""
        chain = self._chains[what]
        balancer = None
        if chain.transforms == (Balance(),):
            balancer = self.sides[what, chain.transforms]["balancer"][layers].flatten(0, 1).contiguous()
        else:
            x = apply(chain, what, x, self.sides, layers, where)
        packed = pick.encode(x.flatten(0, 1), code.bits, code.groups(x.shape[-1]), balancer, self._packing)
        assert packed.scale is not None
        assert packed.zero is not None
        parts = {"codes": packed.data, "scale": packed.scale, "zero": packed.zero}
        return {name: part.unflatten(0, x.shape[:2]) for name, part in parts.items()}

    def _decode(self, parts: Parts, layers: slice = slice(None), positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if positions is None and self._needs_positions:
            positions = parts["positions"].squeeze(-1).long() if "positions" in parts else self.positions(layers)
        where = Where(positions, self._rope)
        found = []
        for what, chain in self._chains.items():
            assert chain.code is not None
            mine = {name.partition(".")[2]: part for name, part in parts.items() if name.startswith(what)}
            found.append(undo(chain, what, chain.code.decode(mine), self.sides, layers, where))
        return found[0], found[1]

    @property
    def _needs_positions(self) -> bool:
        return any(chain.needs_positions for chain in self._chains.values())

    @property
    def _shape(self) -> torch.Size:
        """[L, B, H, S, *] of some part that each slot has."""
        return next(part.shape for name, part in self.parts.items() if self._block(name) == 1)
