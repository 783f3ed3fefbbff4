"""What all readers share: the stores of some policies of a panel, and how they are stepped."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Self

import torch
from torch import Tensor

from mikv.cache.policy_store import Change, PolicyStore, Received


class Reader(ABC):
    """Attends over the stores of some policies, and remembers from layer to layer what attention their tokens received.

    Args:
        stores: whose rows follow each other; R is the number of their rows.
    """

    def __init__(self, stores: Sequence[PolicyStore]) -> None:
        self.stores = list(stores)

    @abstractmethod
    def attend(self, layer: int, query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
        """One decode step of one layer, over what is stored and the newest pair; layers come in order.

        Args:
            query: [R, Hq, 1, D].
            keys, values: [R, H, D], the newest pair, exact.

        Returns:
            [R, 1, Hq, D].
        """

    def end_step(self, keys: Tensor, values: Tensor, active: Tensor) -> None:
        """The stores take in the newest pairs, [L, R, H, D]; active: bool [R] on the CPU, see PolicyStore.step."""
        changes = [
            store.step(keys[:, rows], values[:, rows], self._received(i, rows), active[rows])
            for i, (store, rows) in enumerate(self._rows())
        ]
        self._follow(changes)

    def rows_of(self, taken: Mapping[PolicyStore, Tensor]) -> Tensor:
        """Rows of this reader, int64, from those that are taken of its stores (int64 each)."""
        return torch.cat([taken[store] + rows.start for store, rows in self._rows() if store in taken])

    def fork(self, stores: Sequence[PolicyStore], rows: Tensor) -> Self:
        """A reader of its own with some of the rows, see `select`."""
        forked = copy.copy(self)
        forked.select(stores, rows)
        return forked

    def select(self, stores: Sequence[PolicyStore], rows: Tensor) -> None:
        """Go on with some rows (int64, of those that stood here) of these stores, which have been cut to them already."""
        self.stores = list(stores)
        self._take(rows)

    def _rows(self) -> list[tuple[PolicyStore, slice]]:
        found = []
        start = 0
        for store in self.stores:
            found.append((store, slice(start, start + len(store.seen))))
            start += len(store.seen)
        return found

    @abstractmethod
    def _received(self, index: int, rows: slice) -> Received:
        """What the tokens of a store received in this step."""

    @abstractmethod
    def _follow(self, changes: Sequence[Sequence[Change]]) -> None:
        """The step has ended, and these are the changes of each store, in order."""

    @abstractmethod
    def _take(self, rows: Tensor) -> None:
        """Go on with some rows (int64), in memory of its own; the stores are cut to them already."""
