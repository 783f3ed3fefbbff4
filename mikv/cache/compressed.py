"""A compressed cache that transformers' models decode from: a whole panel of policies, as rows of one batch.

The packed stores are the truth: what they hold is what is counted and what is read. How it is read:

    working   a dense copy stands beside the store; each token is dequantized once, when it enters its tier. On a CPU
              unpacking every code at every step costs more than it saves. It costs memory: use it to evaluate.
    packed    the store is unpacked for every layer at every step, nothing dense is kept.
    kernel    mikv.kernels reads the packed tiers where they lie, with the least memory.

The first two give the same answers bit for bit, because the same attention runs on the same numbers in the same places; the
kernels add up in another order, and Triton's round queries and probabilities to 16 bits.
A pair is exact in the step that computes it, as in prefill; the store has it from then on.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from mikv.attention.reference import decode_attention
from mikv.cache import kernel_read
from mikv.cache.policy_store import Change, PolicyStore
from mikv.cache.prefill import PrefillBank, PrefillState
from mikv.cache.reading import Reading
from mikv.cache.reindex import Reindex, gone_after_columns
from mikv.policy import Policy
from mikv.types import at, layer_chunks

# Columns are added in steps of this many when a decode runs on.
_GROW = 64


class Usage(NamedTuple):
    """What one row holds. Tokens are per layer and head (all hold equally many): seen so far, stored in some tier, and not
    held at 16 bits (evicted ones included). full_nbytes: the 16-bit cache of the tokens seen, at KV heads."""

    seen_tokens: int
    kept_tokens: int
    compressed_tokens: int
    nbytes: dict[str, int]
    full_nbytes: int


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
        reading: see above.
        inv_freq: RoPE's inverse frequencies [D / 2], for policies with contiguous positions; None = they aren't fixed.
        workspace: memory for the working copy; None = fresh memory.
    """

    def __init__(
        self,
        state: PrefillState,
        panel: Sequence[Policy],
        prompt_lengths: Tensor | None = None,
        reading: Reading = Reading(),
        inv_freq: Tensor | None = None,
        workspace: Workspace | None = None,
    ) -> None:
        self._geometry = state.geometry
        prompt_lengths = state.lengths.tokens if prompt_lengths is None else prompt_lengths
        if inv_freq is None and any(policy.positions == "contiguous" for policy in panel):
            raise ValueError(
                "this model's RoPE frequencies depend on the length: keys in the cache can't be re-indexed; use "
                "positions=original"
            )
        workspace = Workspace() if workspace is None else workspace
        super().__init__(layers=[])
        self._hold(
            [
                _Bank(state, bank, panel, prompt_lengths, reading, inv_freq, workspace.of_bank(i))
                for i, bank in enumerate(state.banks)
            ]
        )

    def end_step(self, active: Tensor) -> None:
        """Call after each forward pass: the new token enters the stores, scores grow, tokens are demoted.

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

    def _hold(self, banks: list[_Bank]) -> None:
        self.banks = banks
        self.layers = [_CompressedLayer(bank, i) for bank in banks for i in range(len(bank.layers))]

    def usage(self) -> list[Usage]:
        """What each row holds now."""
        geometry = self._geometry
        per_token = geometry.layers * geometry.kv_heads * geometry.head_dim * 2 * 2  # keys and values, 2 bytes each
        rows = []
        for stores in zip(*(bank.stores for bank in self.banks), strict=True):
            nbytes: dict[str, Tensor] = {}
            for store in stores:
                for part, size in store.nbytes().items():
                    nbytes[part] = nbytes[part] + size if part in nbytes else size
            first = stores[0]
            for b, (seen, kept, compressed) in enumerate(
                zip(first.seen.tolist(), first.kept_tokens().tolist(), first.compressed_tokens().tolist(), strict=True)
            ):
                sizes = {part: int(size[b]) for part, size in nbytes.items()}
                rows.append(Usage(seen, kept, compressed, sizes, seen * per_token))
        return rows

    def tiers(self, begin: Tensor, end: Tensor) -> list[dict[str, float]]:
        """For each row the share of its tokens at positions begin <= p < end (int64 [R], on the CPU) by the bits of the tier
        that holds them, mean over layers and heads; "0" = evicted. Empty where there are no such tokens."""
        rows: list[dict[str, float]] = []
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
                rows.append(shares | gone)
        return rows


class _Bank:
    """The layers of one device: their stores, and what a decode step leaves behind."""

    def __init__(
        self,
        state: PrefillState,
        bank: PrefillBank,
        panel: Sequence[Policy],
        prompt_lengths: Tensor,
        reading: Reading,
        inv_freq: Tensor | None,
        workspace: Workspace,
    ) -> None:
        self.layers = bank.layers
        self.stores = [PolicyStore(policy, state, bank, prompt_lengths, reading.kernels) for policy in panel]
        self.columns = state.lengths.width
        self.padding = state.lengths.padding.repeat(len(panel))  # int64 [R]
        layers, _, heads, _, dim = bank.keys.shape
        self.keys = bank.keys.new_zeros((layers, len(self.padding), heads, dim))  # of the step that is under way
        self.values = torch.zeros_like(self.keys)
        self.mass: list[Tensor] = []
        self._reindex = None if inv_freq is None else Reindex(inv_freq)
        self._reading = reading
        self._workspace = workspace
        self.working: _Dense | None = None
        if reading.reader == "working":
            self.working = self._dense(layers)
            for chunk in layer_chunks(bank.keys.shape):
                self._fill(self.working, chunk, chunk)

    def rows(self) -> Iterator[tuple[PolicyStore, slice]]:
        """Each policy's store and its rows."""
        start = 0
        for store in self.stores:
            rows = slice(start, start + len(store.seen))
            yield store, rows
            start = rows.stop

    def attend(self, layer: int, query: Tensor, scaling: float) -> Tensor:
        """One decode step of one layer; the new pair is in self.keys / self.values."""
        read = self._attend_in_place if self._reading.reader == "kernel" else self._attend_dense
        out, mass = read(layer, query, scaling)
        self.mass.append(mass)
        return out

    def _attend_in_place(self, layer: int, query: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
        newest, columns = (self.keys[layer], self.values[layer]), self.columns + 1
        return kernel_read.attend(
            self.stores, layer, query, *newest, scaling, self.padding, columns, self._reading.attention, self._reindex
        )

    def _attend_dense(self, layer: int, query: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
        if self.working is None:
            dense, index = self._dense(1), 0
            self._fill(dense, slice(layer, layer + 1), slice(None))
        else:
            dense, index = self.working, layer
        dense.write_newest(index, self.columns, self.keys[layer], self.values[layer])
        keys, values, present = dense.view(index, self.columns + 1)
        replace = []
        for store, rows in self.rows():
            if store.policy.positions == "contiguous":
                assert self._reindex is not None
                gone = gone_after_columns(present[rows], self.padding[rows])
                replace.append((rows, self._reindex(keys[rows], gone, self.columns)))
        return decode_attention(query, keys, values, present, scaling, replace)

    def end_step(self, active: Tensor) -> None:
        mass = torch.stack(self.mass)
        self.mass = []
        self.columns += 1
        if self.working is not None:
            self.working.reserve(self.columns + 1)
        for store, rows in self.rows():
            padding = self.padding[rows]
            changes = store.step(self.keys[:, rows], self.values[:, rows], mass[:, rows], padding, active[rows])
            if self.working is not None:
                for change in changes:
                    self.working.apply(rows, change, padding)

    def fork(self, rows: Tensor) -> _Bank:
        forked = copy.copy(self)
        forked.mass = []
        forked.stores = []
        for store, mine in self.rows():
            local = rows[(rows >= mine.start) & (rows < mine.stop)] - mine.start
            if len(local):
                forked.stores.append(store.fork(local))
        forked.padding = self.padding[rows]
        there = rows.to(self.keys.device)
        forked.keys, forked.values = self.keys[:, there], self.values[:, there]
        if self.working is not None:
            forked.working = self.working.select(there)
        return forked

    def _dense(self, layers: int) -> _Dense:
        _, rows, heads, dim = self.keys.shape
        shape = (layers, rows, heads, 1 + self.columns + 1 + _GROW, dim)
        return _Dense(shape, self.keys.dtype, self.keys.device, self._workspace)

    def _fill(self, dense: _Dense, layers: slice, into: slice) -> None:
        """Write some layers of all stores into layers of a dense copy."""
        for store, rows in self.rows():
            for positions, used, keys, values in store.read(layers):
                dense.write(into, rows, positions, used, keys, values, self.padding[rows])


class _Dense:
    """Dequantized pairs in the order of columns: keys, values [L, R, H, 1 + S, D], present [L, R, H, 1 + S].

    The first column is a scratch place for writes that must go nowhere (unused slots, rows that have ended), so that
    every write is one scatter; it is never attended.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, workspace: Workspace) -> None:
        self.keys = workspace.take("keys", shape, dtype, device)
        self.values = workspace.take("values", shape, dtype, device)
        self.present = torch.zeros(shape[:-1], dtype=torch.bool, device=device)

    def view(self, layer: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
        """The first `columns` columns of a layer: [R, H, S, D] twice, bool [R, H, S]."""
        here = slice(1, 1 + columns)
        return self.keys[layer, :, :, here], self.values[layer, :, :, here], self.present[layer, :, :, here]

    def reserve(self, columns: int) -> None:
        have = self.keys.shape[3] - 1
        if columns <= have:
            return
        more = columns - have + _GROW
        self.keys = _extend(self.keys, more)
        self.values = _extend(self.values, more)
        self.present = _extend(self.present, more)

    def select(self, rows: Tensor) -> _Dense:
        """A copy of its own with some of the rows (int64)."""
        selected = copy.copy(self)
        selected.keys, selected.values = self.keys[:, rows], self.values[:, rows]
        selected.present = self.present[:, rows]
        return selected

    def write_newest(self, layer: int, column: int, keys: Tensor, values: Tensor) -> None:
        """The pair of the step under way: [R, H, D]."""
        self.keys[layer, :, :, 1 + column] = keys
        self.values[layer, :, :, 1 + column] = values
        self.present[layer, :, :, 1 + column] = True

    def write(
        self,
        layers: slice,
        rows: slice,
        positions: Tensor,
        used: Tensor,
        keys: Tensor,
        values: Tensor,
        padding: Tensor,
    ) -> None:
        """Slots of a store: positions [l, B, H, S], used bool [B, S], keys and values [l, B, H, S, D]."""
        device = self.keys.device
        columns = 1 + positions + padding.to(device)[None, :, None, None]
        where = at(keys.shape, torch.where(used.to(device)[None, :, None, :], columns, 0))
        self.keys[layers, rows][where] = keys.to(self.keys.dtype)
        self.values[layers, rows][where] = values.to(self.values.dtype)
        self.present[layers, rows][where] = True

    def apply(self, rows: slice, change: Change, padding: Tensor) -> None:
        """One token per layer, row and head is rewritten, or goes."""
        device = self.keys.device
        columns = 1 + change.positions + padding.to(device)[None, :, None]
        where = at(columns.shape, torch.where(change.where, columns, 0))
        if change.keys is None or change.values is None:
            self.present[:, rows][where] = False
            return
        self.keys[:, rows][where] = change.keys.to(self.keys.dtype)
        self.values[:, rows][where] = change.values.to(self.values.dtype)


def _extend(x: Tensor, more: int) -> Tensor:
    return torch.cat((x, x.new_zeros((*x.shape[:3], more, *x.shape[4:]))), dim=3)


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
            raise RuntimeError(f"a compressed cache is fed one token per row and step, not {key_states.shape[2]}")
        self._bank.keys[self._index] = key_states.squeeze(2)
        self._bank.values[self._index] = value_states.squeeze(2)
        return self, self

    def attend(self, query: Tensor, scaling: float) -> Tensor:
        return self._bank.attend(self._index, query, scaling)

    def get_seq_length(self) -> int:
        """Columns seen so far: what positions are counted from, whatever has been evicted."""
        return self._bank.columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._bank.columns + query_length, 0

    def get_max_length(self) -> int:
        return -1
