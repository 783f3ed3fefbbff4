"""Reading packed stores by torch, from dequantized pairs in a dense copy.

A copy is laid out in one of two ways. Policies that keep every token share one, in the order of columns: one matrix product
serves them all. A policy that evicts has one of its own, in the order of its store's slots: what it has evicted is not there,
and costs nothing.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from mikv.attention.reference import decode_attention
from mikv.cache.policy_store import Change, PolicyStore, Received
from mikv.cache.reader import Reader
from mikv.cache.reindex import gone_after_columns, gone_after_slots
from mikv.cache.tier_store import TierStore
from mikv.rope import Rope
from mikv.tensors import at, layer_chunks

# Columns are added in steps of this many when a decode runs on.
_GROW = 64

Memory = Callable[[str, tuple[int, ...]], Tensor]
"""Memory of a name and a shape, in the model's dtype; it holds finite leftovers."""


class Prompts(NamedTuple):
    """What a copy must know of the prefill: L, H and D; padding int64 [B], column = position + padding; columns, padding
    included."""

    shape: tuple[int, int, int]
    padding: Tensor
    columns: int


def dense_readers(
    stores: Sequence[PolicyStore], prompts: Prompts, working: bool, memory: Memory, rope: Rope | None
) -> list[DenseReader]:
    """A reader for each kind of store in a panel; arguments as of DenseReader."""
    together: list[PolicyStore] = []
    readers: list[DenseReader] = []
    for store in stores:
        moved = None if store.policy.positions == "original" else rope
        own: Memory = partial(_named, memory, len(readers))
        if store.policy.evicts and len(store.tiers) == 1:
            readers.append(BySlot([store], prompts, working, own, moved))
        elif moved is not None:
            readers.append(ByColumn([store], prompts, working, own, moved))
        else:
            together.append(store)
    if together:
        readers.append(ByColumn(together, prompts, working, partial(_named, memory, len(readers)), None))
    return readers


def _named(memory: Memory, number: int, name: str, shape: tuple[int, ...]) -> Tensor:
    return memory(f"{name} {number}", shape)


class DenseReader(Reader):
    """keys, values [L, R, H, S, D] are the copy; S is at least what is needed.

    Args:
        stores: see Reader; at first of B rows each.
        prompts: that they hold.
        working: the copy is kept, and follows every change; else it is made anew for each layer and step, and L is 1.
        memory: for the copy.
        rope: turns keys to their place in the cache; None = they stay where they are.
    """

    def __init__(
        self, stores: Sequence[PolicyStore], prompts: Prompts, working: bool, memory: Memory, rope: Rope | None
    ) -> None:
        super().__init__(stores)
        self._working, self._memory, self._rope = working, memory, rope
        self._shape = prompts.shape
        self._padding, self._columns = prompts.padding.repeat(len(stores)), prompts.columns
        self._mass: list[Tensor] = []
        self.keys: Tensor
        self.values: Tensor
        if working:
            self._make(prompts.shape[0])
            for chunk in layer_chunks(self.keys.shape):
                self._fill(chunk, chunk)
        self._refresh()

    def attend(self, layer: int, query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
        place = layer
        if not self._working:
            place = 0
            self._make(1)
            self._fill(slice(layer, layer + 1), slice(None))
        held_keys, held_values, present = self._with_newest(layer, place, keys, values)
        if self._rope is not None:
            held_keys = self._rope.turn(held_keys, self._gone(layer, present), self._columns)
        out, mass = decode_attention(query, held_keys, held_values, present, scaling)
        self._mass.append(mass)
        return out

    def _follow(self, changes: Sequence[Sequence[Change]]) -> None:
        self._mass = []
        self._columns += 1
        self._refresh()
        if self._working:
            for (_, rows), some in zip(self._rows(), changes, strict=True):
                for change in some:
                    self._apply(rows, change)

    def _take(self, rows: Tensor) -> None:
        self._mass = []
        self._padding = self._padding[rows]
        if self._working:
            there = rows.to(self.keys.device)
            self.keys, self.values = self.keys[:, there], self.values[:, there]
        self._refresh()

    def _claim(self, layers: int, slots: int) -> None:
        _, heads, dim = self._shape
        shape = (layers, sum(len(store.seen) for store in self.stores), heads, slots, dim)
        self.keys, self.values = self._memory("keys", shape), self._memory("values", shape)

    def _reserve(self, slots: int) -> None:
        if self._working and slots > self.keys.shape[3]:
            more = slots - self.keys.shape[3] + _GROW
            self.keys, self.values = _extended(self.keys, more), _extended(self.values, more)

    @abstractmethod
    def _make(self, layers: int) -> None:
        """Memory for the copy of so many layers."""

    @abstractmethod
    def _fill(self, layers: slice, into: slice) -> None:
        """Write some layers of the stores into layers of the copy."""

    @abstractmethod
    def _with_newest(self, layer: int, place: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One layer, which lies at a place of the copy, with the newest pair [R, H, D]: keys, values [R, H, S, D], and which of
        them there are, bool [R, H or 1, S]."""

    @abstractmethod
    def _gone(self, layer: int, present: Tensor) -> Tensor:
        """How many tokens are missing after each of these keys, int64 [R, H, S]."""

    @abstractmethod
    def _refresh(self) -> None:
        """Other rows, or a token more: note what of it matters for reading, and make room."""

    @abstractmethod
    def _apply(self, rows: slice, change: Change) -> None:
        """Some tokens per layer, row and head are rewritten, or go."""


class ByColumn(DenseReader):
    """A token stands in the column of its position: present bool [L, R, H, S] says which are held.

    The first column is a scratch place for writes that must go nowhere (unused slots, rows that have ended), so that every
    write is one scatter; it is never attended.
    """

    def _make(self, layers: int) -> None:
        self._claim(layers, 1 + self._columns + 1 + _GROW)
        self._present = torch.zeros(self.keys.shape[:-1], dtype=torch.bool, device=self.keys.device)

    def _fill(self, layers: slice, into: slice) -> None:
        for store, rows in self._rows():
            for positions, used, keys, values in store.read(layers):
                places = torch.where(used.to(positions.device), self._places(rows, positions), 0)
                where = at(places.shape, places)
                self.keys[into, rows][where] = keys.to(self.keys.dtype)
                self.values[into, rows][where] = values.to(self.values.dtype)
                self._present[into, rows][where] = True

    def _places(self, rows: slice, positions: Tensor) -> Tensor:
        """Of tokens at positions [L, B, H, ...]."""
        padding = self._padding[rows].to(positions.device)
        return 1 + positions + padding.view(1, -1, 1, *([1] * (positions.dim() - 3)))

    def _with_newest(self, layer: int, place: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        newest, here = 1 + self._columns, slice(1, 2 + self._columns)
        self.keys[place, :, :, newest] = keys
        self.values[place, :, :, newest] = values
        self._present[place, :, :, newest] = True
        return self.keys[place, :, :, here], self.values[place, :, :, here], self._present[place, :, :, here]

    def _gone(self, layer: int, present: Tensor) -> Tensor:
        return gone_after_columns(present, self._padding)

    def _received(self, index: int, rows: slice) -> Received:
        store = self.stores[index]
        if not store.policy.scored:
            return Received()
        mass = torch.stack([of_layer[rows] for of_layer in self._mass])
        tiers: list[Tensor | None] = []
        for tier in store.tiers:
            if tier.with_scores:
                columns = self._places(rows, tier.positions()) - 1
                tiers.append(mass.gather(3, columns.clamp(0, mass.shape[-1] - 1)))  # unused slots: anything
            else:
                tiers.append(None)
        return Received(tiers, mass[..., -1])

    def _refresh(self) -> None:
        self._reserve(2 + self._columns)
        if self._working and self.keys.shape[3] > self._present.shape[3]:
            self._present = _extended(self._present, self.keys.shape[3] - self._present.shape[3])

    def _apply(self, rows: slice, change: Change) -> None:
        places = torch.where(change.where, self._places(rows, change.positions), 0)
        where = at(places.shape, places)
        if change.keys is None or change.values is None:
            self._present[:, rows][where] = False
            return
        self.keys[:, rows][where] = change.keys.to(self.keys.dtype)
        self.values[:, rows][where] = change.values.to(self.values.dtype)

    def _take(self, rows: Tensor) -> None:
        if self._working:
            self._present = self._present[:, rows.to(self._present.device)]
        super()._take(rows)


class BySlot(DenseReader):
    """One store of one tier: the newest pair, then the tier's slots as they lie."""

    def _make(self, layers: int) -> None:
        self._claim(layers, 1 + self._tier.slots)

    def _fill(self, layers: slice, into: slice) -> None:
        keys, values = self._tier.read(layers)
        here = slice(1, 1 + self._tier.slots)
        self.keys[into, :, :, here] = keys
        self.values[into, :, :, here] = values

    def _with_newest(self, layer: int, place: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.keys[place, :, :, 0] = keys
        self.values[place, :, :, 0] = values
        here = slice(1 + self._tier.slots)
        return self.keys[place, :, :, here], self.values[place, :, :, here], self._present[layer % len(self._present)]

    def _gone(self, layer: int, present: Tensor) -> Tensor:
        return self._missing[layer]

    def _received(self, index: int, rows: slice) -> Received:
        if not self.stores[index].policy.scored:
            return Received()
        mass = torch.stack(self._mass)
        return Received([mass[..., 1:] if self._tier.with_scores else None], mass[..., 0])

    def _apply(self, rows: slice, change: Change) -> None:
        if change.compacted:
            for layers in layer_chunks(self.keys.shape):
                self._fill(layers, layers)
            return
        if change.keys is None or change.values is None or change.slots is None:
            return  # in the slot of what was evicted stands what came
        where = at(change.slots.shape, 1 + change.slots)
        self.keys[where] = change.keys.to(self.keys.dtype)
        self.values[where] = change.values.to(self.values.dtype)

    @property
    def _tier(self) -> TierStore:
        (tier,) = self.stores[0].tiers
        return tier

    def _refresh(self) -> None:
        store, tier = self.stores[0], self._tier
        self._reserve(1 + tier.slots)
        # [L or 1, R, H or 1, S]: the newest pair is always there
        self._present = torch.nn.functional.pad(tier.used(), (1, 0), value=True).to(tier.device)
        if self._rope is not None:
            gone = gone_after_slots(tier.positions(), tier.used(), store.seen)
            self._missing = torch.nn.functional.pad(gone, (1, 0))  # after the newest pair none is


def _extended(x: Tensor, more: int) -> Tensor:
    return torch.cat((x, x.new_zeros((*x.shape[:3], more, *x.shape[4:]))), dim=3)
