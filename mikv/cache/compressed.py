"""A compressed cache that transformers' models decode from: a whole panel of policies, as rows of one batch.

The packed stores are the truth: what they hold is what is counted and what is read. How it is read:

    working   a dense copy stands beside the store; each token is dequantized once, when it enters its tier. On a CPU
              unpacking every code at every step costs more than it saves. It costs memory: use it to evaluate.
    packed    the store is unpacked for every layer at every step, nothing dense is kept.
    kernel    mikv.kernels reads the packed tiers where they lie, with the least memory.

How a dense copy is laid out is mikv.cache.dense's business, what all readers share is in mikv.cache.reader.
The first two give the same answers bit for bit, because the same attention runs on the same numbers in the same places; the
kernels add up in another order, and Triton's round queries and probabilities to 16 bits.
A pair is exact in the step that computes it, as in prefill; the store has it from then on.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from mikv.cache.backend import Backend
from mikv.cache.dense import Prompts, dense_readers
from mikv.cache.kernel_read import KernelReader
from mikv.cache.policy_store import PolicyStore
from mikv.cache.prefill import PrefillState
from mikv.cache.reader import Reader
from mikv.cache.sides import Fits
from mikv.policy import Policy
from mikv.types import Geometry


@dataclass(frozen=True)
class Usage:
    """What one row holds. Tokens are per layer and head (the mean where they hold unequally many): seen so far, stored in
    some tier, and not held at 16 bits (evicted ones included). nbytes: counted, by part, of the tokens that are there;
    allocated_nbytes: of the memory that the stores take for the row, with slots that are not used yet or only in other rows;
    full_nbytes: the 16-bit cache of the tokens seen, at KV heads."""

    seen_tokens: int
    kept_tokens: float
    compressed_tokens: float
    nbytes: dict[str, int]
    full_nbytes: int
    allocated_nbytes: int = field(compare=False)  # of the batch too: its longest row decides how many slots there are


class Workspace:
    """Memory for working copies that is used again, batch after batch: on a CPU, getting gigabytes of fresh pages from the
    system costs as much as filling them. One cache at a time may use it; what it hands out holds finite leftovers."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}
        self._banks: dict[int, Workspace] = {}

    def of_bank(self, bank: int) -> Workspace:
        """Each bank works with memory of its own: all of a cache are at work in a step, and two may lie on one device."""
        return self._banks.setdefault(bank, Workspace())

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        size = torch.Size(shape).numel()
        buffer = self._buffers.get((name, dtype, device))
        if buffer is None or buffer.numel() < size:
            del buffer
            self._buffers.pop((name, dtype, device), None)  # first the old one goes: both may not fit
            buffer = self._buffers[name, dtype, device] = torch.zeros(size, dtype=dtype, device=device)
        return buffer[:size].view(shape)


class CompressedCache(Cache):
    """Rows are policy-major: row p * B + b is prompt b under policy p, until `fork` chooses others.

    Args:
        state: the prefill of the B prompts; may be empty (no real token in any row).
        panel: the P policies.
        prompt_lengths: int64 [B]: lengths that budgets of kind `fixed` are shares of; None = the prefill's.
        backend: see above.
        workspace: memory for the working copy; None = fresh memory.
    """

    def __init__(
        self,
        state: PrefillState,
        panel: Sequence[Policy],
        prompt_lengths: Tensor | None = None,
        backend: Backend = Backend(),
        workspace: Workspace | None = None,
    ) -> None:
        self._geometry = state.geometry
        prompt_lengths = state.lengths.tokens if prompt_lengths is None else prompt_lengths
        if state.rope is None and any(policy.positions == "contiguous" for policy in panel):
            raise ValueError(
                "this model's RoPE frequencies depend on the length: keys in the cache can't be re-indexed; use "
                "positions=original"
            )
        workspace = Workspace() if workspace is None else workspace
        super().__init__(layers=[])
        self._hold(
            [_Bank(state, fits, panel, prompt_lengths, backend, workspace.of_bank(i)) for i, fits in enumerate(Fits.of(state))]
        )

    def end_step(self, active: Tensor) -> None:
        """Call after each forward pass: the new token enters the stores, scores grow, tokens are demoted.

        A caller that does not know of it (`model.generate` of transformers) need not call it: a step that was not
        ended is ended for all rows when the next one begins, or when the cache is asked what it holds.

        active: bool [R] on the CPU; rows that have ended stay as they are.
        """
        for bank in self.banks:
            bank.end_step(active)

    def fork(self, rows: Tensor) -> CompressedCache:
        """A cache of its own with some of the rows (int64, CPU; those of one policy together, policies in order).

        Rows that have ended are left out, and need no more time and memory. A row may come several times: continuations of
        one context share its prefill, its compression and its question.
        """
        forked = copy.copy(self)
        forked._hold([bank.fork(rows) for bank in self.banks])
        return forked

    def batch_select_indices(self, indices: Tensor) -> None:
        """Go on with some of the rows, as `fork` takes them, in the place of all: what is left is not held twice."""
        rows = indices.cpu()
        if torch.equal(rows, torch.arange(sum(len(store.seen) for store in self.banks[0].stores))):
            return
        for bank in self.banks:
            bank.select(rows)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times, as transformers' beam search wants its prompts."""
        rows = sum(len(store.seen) for store in self.banks[0].stores)
        self.batch_select_indices(torch.arange(rows).repeat_interleave(repeats))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beams go on from other beams: rows in another order (of one policy; a panel has none to go on from)."""
        if len(self.banks[0].stores) > 1:
            raise NotImplementedError("a cache of several policies can't follow beams: compress with one policy at a time")
        self.batch_select_indices(beam_idx)

    def crop(self, max_length: int) -> None:
        """Refused: a token that has been demoted can't come back."""
        raise NotImplementedError(
            "a compressed cache can't be cut back to fewer tokens (what was demoted or evicted since is lost): compress anew, "
            "or fork the cache before it is fed"
        )

    def reset(self) -> None:
        """Refused: it is made from a prefill."""
        raise NotImplementedError("a compressed cache is made from a prefill and can't be emptied: compress a new one")

    def _hold(self, banks: list[_Bank]) -> None:
        self.banks = banks
        self.layers = [_CompressedLayer(bank, i) for bank in banks for i in range(len(bank.layers))]

    def usage(self) -> list[Usage]:
        """What each row holds now."""
        self._end_open_step()
        geometry = self._geometry
        per_token = geometry.layers * geometry.kv_heads * geometry.head_dim * 2 * 2  # keys and values, 2 bytes each
        usages = []
        for stores in zip(*(bank.stores for bank in self.banks), strict=True):
            nbytes: dict[str, Tensor] = {}
            for store in stores:
                for part, size in store.nbytes().items():
                    nbytes[part] = nbytes[part] + size if part in nbytes else size
            first, allocated = stores[0], sum(store.allocated() for store in stores)
            kept, compressed = (
                _per_head(torch.stack([count(store) for store in stores]).sum(dim=0), geometry)
                for count in (PolicyStore.kept_tokens, PolicyStore.compressed_tokens)
            )
            for b, seen in enumerate(first.seen.tolist()):
                sizes = {part: int(size[b]) for part, size in nbytes.items()}
                usages.append(Usage(seen, kept[b], compressed[b], sizes, seen * per_token, allocated))
        return usages

    def tiers(self, begin: Tensor, end: Tensor) -> list[dict[str, float]]:
        """For each row the share of its tokens at positions begin <= p < end (int64 [R], on the CPU) by the bits of the tier
        that holds them, mean over layers and heads; "0" = evicted. Empty where there are no such tokens."""
        self._end_open_step()
        tiers: list[dict[str, float]] = []
        if not end.any():
            return [{} for _ in end]
        total = ((end - begin) * self._geometry.layers * self._geometry.kv_heads).tolist()
        for stores, (_, where) in zip(
            zip(*(bank.stores for bank in self.banks), strict=True), self.banks[0].rows(), strict=True
        ):
            held: dict[str, Tensor] = {}
            for store in stores:
                for bits, count in store.held(begin[where], end[where]).items():
                    held[bits] = held[bits] + count if bits in held else count
            for b, tokens in enumerate(total[where]):
                shares = {bits: float(count[b]) / tokens for bits, count in held.items()} if tokens else {}
                gone = {"0": 1 - sum(shares.values())} if shares and stores[0].policy.evicts else {}
                tiers.append(shares | gone)
        return tiers

    def _end_open_step(self) -> None:
        for bank in self.banks:
            bank.end_open_step()


def _per_head(total: Tensor, geometry: Geometry) -> list[float]:
    """Tokens of each row (int64 [B], summed over layers and heads) per layer and head; whole numbers where they are."""
    heads = geometry.layers * geometry.kv_heads
    return [number // heads if number % heads == 0 else number / heads for number in total.tolist()]


class _Bank:
    """The layers of one device: their stores, their readers, and the pair of the step that is under way."""

    def __init__(
        self,
        state: PrefillState,
        fits: Fits,
        panel: Sequence[Policy],
        prompt_lengths: Tensor,
        backend: Backend,
        workspace: Workspace,
    ) -> None:
        bank = fits.bank
        self.layers = bank.layers
        self.open = False  # whether a step is under way
        by_kernel = [backend.reader_of(policy) == "kernel" for policy in panel]
        self.stores = [
            # the kernels read pairs in any order; a dense copy wants each at its place
            PolicyStore(policy, state, bank, prompt_lengths, fits, backend.kernels, track=not kernel)
            for policy, kernel in zip(panel, by_kernel, strict=True)
        ]
        self.columns = state.lengths.width
        layers, batch, heads, _, dim = bank.keys.shape
        self.keys = bank.keys.new_zeros((layers, len(panel) * batch, heads, dim))
        self.values = torch.zeros_like(self.keys)
        packed = [store for store, kernel in zip(self.stores, by_kernel, strict=True) if kernel]
        others = [store for store, kernel in zip(self.stores, by_kernel, strict=True) if not kernel]
        prompts = Prompts((layers, heads, dim), state.lengths.padding, self.columns)
        memory = partial(workspace.take, dtype=self.keys.dtype, device=self.keys.device)
        self.readers: list[Reader] = [KernelReader(packed, backend.attention, state.rope)] if packed else []
        self.readers += dense_readers(others, prompts, backend.reader == "working", memory, state.rope)
        self._arrange()

    def _arrange(self) -> None:
        """Which rows each reader reads (a slice where they are neighbours: nothing need be copied then)."""
        places = dict(self.rows())
        self._rows: list[slice | Tensor] = []
        for reader in self.readers:
            rows = [places[store] for store in reader.stores]
            together = slice(rows[0].start, rows[-1].stop)
            if sum(mine.stop - mine.start for mine in rows) == together.stop - together.start:
                self._rows.append(together)
            else:
                self._rows.append(torch.cat([torch.arange(mine.start, mine.stop) for mine in rows]))

    def rows(self) -> Iterator[tuple[PolicyStore, slice]]:
        """Each policy's store and its rows."""
        start = 0
        for store in self.stores:
            rows = slice(start, start + len(store.seen))
            yield store, rows
            start = rows.stop

    def attend(self, layer: int, query: Tensor, scaling: float) -> Tensor:
        """One decode step of one layer; the new pair is in self.keys / self.values."""
        keys, values = self.keys[layer], self.values[layer]
        if len(self.readers) == 1:
            return self.readers[0].attend(layer, query, keys, values, scaling)
        out = query.new_empty(query.transpose(1, 2).shape)
        for reader, rows in zip(self.readers, self._rows, strict=True):
            out[rows] = reader.attend(layer, query[rows], keys[rows], values[rows], scaling)
        return out

    def take(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """The newest pair of one layer, [R, H, D]."""
        if layer == 0:
            self.end_open_step()
        if keys.shape != self.keys.shape[1:]:
            raise ValueError(
                f"the cache has {self.keys.shape[1]} rows ({len(self.stores)} policies), and is fed {keys.shape[0]} tokens: "
                "one a row is wanted"
            )
        self.open = True
        self.keys[layer], self.values[layer] = keys, values

    def end_open_step(self) -> None:
        """End a step that has not been ended, for all rows."""
        if self.open:
            self.end_step(torch.ones(self.keys.shape[1], dtype=torch.bool))

    def end_step(self, active: Tensor) -> None:
        self.open = False
        self.columns += 1
        for reader, rows in zip(self.readers, self._rows, strict=True):
            reader.end_step(self.keys[:, rows], self.values[:, rows], active[rows])

    @property
    def seen(self) -> int:
        """Columns that were seen, with the one of a step that is under way."""
        return self.columns + self.open

    def fork(self, rows: Tensor) -> _Bank:
        self.end_open_step()
        forked = copy.copy(self)
        forked._take(rows, fork=True)
        return forked

    def select(self, rows: Tensor) -> None:
        self.end_open_step()
        self._take(rows, fork=False)

    def _take(self, rows: Tensor, fork: bool) -> None:
        """Go on with some rows, in copies of stores and readers or in themselves."""
        taken: dict[PolicyStore, Tensor] = {}
        for store, mine in self.rows():
            local = rows[(rows >= mine.start) & (rows < mine.stop)] - mine.start
            if len(local):
                taken[store] = local
        # before the stores change: a reader's rows are counted by those of its stores
        readers = [(reader, reader.rows_of(taken)) for reader in self.readers if any(store in taken for store in reader.stores)]
        self.readers, self.stores = [], list(taken)
        goes_on: dict[PolicyStore, PolicyStore] = {}
        for store, local in taken.items():
            if fork:
                goes_on[store] = store.fork(local)
            else:
                store.select(local)
                goes_on[store] = store
        self.stores = list(goes_on.values())
        for reader, local in readers:
            stores = [goes_on[store] for store in reader.stores if store in goes_on]
            if fork:
                reader = reader.fork(stores, local)
            else:
                reader.select(stores, local)
            self.readers.append(reader)
        there = rows.to(self.keys.device)
        self.keys, self.values = self.keys[:, there], self.values[:, there]
        self._arrange()


class _CompressedLayer(CacheLayerMixin):
    """One layer's part of a CompressedCache, and the handle that attends for it."""

    is_sliding = False

    def __init__(self, bank: _Bank, index: int) -> None:
        super().__init__()
        self._bank, self._index = bank, index
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: made from a prefill, the layer knows its shapes."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        if key_states.shape[2] != 1:
            raise RuntimeError(
                f"a compressed cache is fed one token per row and step, not {key_states.shape[2]}: compress the prompt without "
                "its last token, and feed that one"
            )
        self._bank.take(self._index, key_states.squeeze(2), value_states.squeeze(2))
        return self, self

    def attend(self, query: Tensor, scaling: float) -> Tensor:
        return self._bank.attend(self._index, query, scaling)

    def get_seq_length(self) -> int:
        """Columns seen so far: what positions are counted from, whatever has been evicted."""
        return self._bank.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._bank.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1
