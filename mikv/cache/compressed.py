"""A compressed cache that transformers' models decode from: a whole panel of policies, as rows of one batch.

The packed stores are the truth: what they hold is what is counted and what is read. How it is read:

    working   a dense copy stands beside the store; each token is dequantized once, when it enters its tier. On a CPU
              unpacking every code at every step costs more than it saves. It costs memory: use it to evaluate.
    packed    the store is unpacked for every layer at every step, nothing dense is kept.

Both give the same answers bit for bit, because the same attention runs on the same numbers in the same places.
A pair is exact in the step that computes it, as in prefill; the store has it from then on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from mikv.attention.reference import decode_attention
from mikv.cache.policy_store import PolicyStore
from mikv.cache.prefill import PrefillBank, PrefillState
from mikv.policy import Policy, check_choice

READERS = ("working", "packed")
# Columns are added in steps of this many when a decode runs on.
_GROW = 64


class CompressedCache(Cache):
    """Rows are policy-major: row p * B + b is prompt b under policy p.

    Args:
        state: the prefill of the B prompts; may be empty (no real token in any row).
        panel: the P policies.
        prompt_lengths: int64 [B]: lengths that budgets of kind `fixed` are shares of; None = the prefill's.
        reader: see above.
        inv_freq: RoPE's inverse frequencies [D / 2], for policies with contiguous positions.
    """

    def __init__(
        self,
        state: PrefillState,
        panel: Sequence[Policy],
        prompt_lengths: Tensor | None = None,
        reader: str = "working",
        inv_freq: Tensor | None = None,
    ) -> None:
        check_choice("reader", reader, READERS)
        self.panel = tuple(panel)
        self.geometry = state.geometry
        self._lengths = state.lengths
        prompt_lengths = state.lengths.tokens if prompt_lengths is None else prompt_lengths
        if inv_freq is None and any(policy.positions == "contiguous" for policy in panel):
            raise ValueError("contiguous positions need the model's RoPE frequencies (inv_freq)")
        self.banks = [_Bank(state, bank, self.panel, prompt_lengths, reader, inv_freq) for bank in state.banks]
        layers = [_CompressedLayer(bank, i) for bank in self.banks for i in range(len(bank.layers))]
        super().__init__(layers=layers)

    def end_step(self, active: Tensor) -> None:
        """Call after each forward pass: the new token enters the stores, scores grow, tokens are demoted.

        active: bool [R] on the CPU; rows that have ended stay as they are.
        """
        for bank in self.banks:
            bank.end_step(active)

    def stores(self, policy: int) -> list[PolicyStore]:
        """The stores of one policy, one per bank."""
        return [bank.stores[policy] for bank in self.banks]

    def nbytes(self, policy: int) -> dict[str, Tensor]:
        """Stored bytes by part of each prompt under one policy, int64 [B]."""
        total: dict[str, Tensor] = {}
        for store in self.stores(policy):
            for kind, size in store.nbytes().items():
                total[kind] = total.get(kind, 0) + size
        return total

    def full_nbytes(self, policy: int) -> Tensor:
        """Bytes of the 16-bit cache of the same tokens, at KV heads, int64 [B]."""
        geometry = self.geometry
        per_token = geometry.layers * geometry.kv_heads * geometry.head_dim * 2 * 2  # keys and values, 2 bytes each
        return self.stores(policy)[0].seen * per_token


class _Bank:
    """The layers of one device: their stores, and what a decode step leaves behind."""

    def __init__(
        self,
        state: PrefillState,
        bank: PrefillBank,
        panel: Sequence[Policy],
        prompt_lengths: Tensor,
        reader: str,
        inv_freq: Tensor | None,
    ) -> None:
        self.layers = bank.layers
        self.stores = [PolicyStore(policy, state, bank, prompt_lengths) for policy in panel]
        self.batch = len(state.lengths.tokens)
        self.columns = state.lengths.width
        self.padding = state.lengths.padding
        layers, _, heads, _, dim = bank.keys.shape
        rows = len(panel) * self.batch
        self.keys = bank.keys.new_zeros((layers, rows, heads, dim))  # of the step that is under way
        self.values = torch.zeros_like(self.keys)
        self.mass: list[Tensor] = []
        self._shape = (rows, heads, dim)
        self._dtype = state.dtype
        self._reindexed = _Reindex.of(panel, self.batch, inv_freq)
        self.working: _Dense | None = None
        if reader == "working":
            self.working = self._dense(layers)
            self._fill(self.working, slice(None))

    def attend(self, layer: int, query: Tensor, scaling: float) -> Tensor:
        """One decode step of one layer; the new pair is in self.keys / self.values."""
        if self.working is None:
            dense, index = self._dense(1), 0
            self._fill(dense, slice(layer, layer + 1))
        else:
            dense, index = self.working, layer
        dense.write_newest(index, self.columns, self.keys[layer], self.values[layer])
        keys, values, present = dense.view(index, self.columns + 1)
        if self._reindexed is not None:
            keys = self._reindexed(keys, present, self.padding)
        out, mass = decode_attention(query, keys, values, present, scaling)
        self.mass.append(mass)
        return out

    def end_step(self, active: Tensor) -> None:
        mass = torch.stack(self.mass)
        self.mass = []
        self.columns += 1
        if self.working is not None:
            self.working.reserve(self.columns + 1)
        for p, store in enumerate(self.stores):
            rows = slice(p * self.batch, (p + 1) * self.batch)
            changes = store.step(self.keys[:, rows], self.values[:, rows], mass[:, rows], self.padding, active[rows])
            if self.working is not None:
                for change in changes:
                    self.working.apply(rows, change.positions, change.keys, change.values, change.rows, self.padding)

    def _dense(self, layers: int) -> _Dense:
        return _Dense(layers, *self._shape, self.columns + 1, self._dtype, self.layers.device)

    def _fill(self, dense: _Dense, layers: slice) -> None:
        for p, store in enumerate(self.stores):
            rows = slice(p * self.batch, (p + 1) * self.batch)
            for positions, used, keys, values in store.read(layers):
                dense.write(rows, positions, used, keys, values, self.padding)


class _Dense:
    """Dequantized pairs in the order of columns: keys, values [L, R, H, 1 + S, D], present [L, R, H, 1 + S].

    The first column is a scratch place for writes that must go nowhere (unused slots, rows that have ended), so that
    every write is one scatter; it is never attended.
    """

    def __init__(
        self, layers: int, rows: int, heads: int, dim: int, columns: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.keys = torch.zeros((layers, rows, heads, 1 + columns, dim), dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)
        self.present = torch.zeros((layers, rows, heads, 1 + columns), dtype=torch.bool, device=device)

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

    def write_newest(self, layer: int, column: int, keys: Tensor, values: Tensor) -> None:
        """The pair of the step under way: [R, H, D]."""
        self.keys[layer, :, :, 1 + column] = keys
        self.values[layer, :, :, 1 + column] = values
        self.present[layer, :, :, 1 + column] = True

    def write(
        self, rows: slice, positions: Tensor, used: Tensor, keys: Tensor, values: Tensor, padding: Tensor
    ) -> None:
        """Slots of a store: positions [L, B, H, S], used bool [B, S], keys and values [L, B, H, S, D]."""
        device = self.keys.device
        columns = 1 + positions + padding.to(device)[None, :, None, None]
        columns = torch.where(used.to(device)[None, :, None, :], columns, 0)
        at = columns[..., None].expand(keys.shape)
        self.keys[:, rows].scatter_(3, at, keys.to(self.keys.dtype))
        self.values[:, rows].scatter_(3, at, values.to(self.values.dtype))
        self.present[:, rows].scatter_(3, columns, True)

    def apply(
        self,
        rows: slice,
        positions: Tensor,
        keys: Tensor | None,
        values: Tensor | None,
        happened: Tensor,
        padding: Tensor,
    ) -> None:
        """A Change of a store: one token per layer, row and head is rewritten, or goes (keys None)."""
        columns = 1 + positions + padding.to(positions.device)[None, :, None]
        columns = torch.where(happened.to(positions.device)[None, :, None], columns, 0)[..., None]
        if keys is None or values is None:
            self.present[:, rows].scatter_(3, columns, False)
            return
        at = columns[..., None].expand(*columns.shape, keys.shape[-1])
        self.keys[:, rows].scatter_(3, at, keys.to(self.keys.dtype).unsqueeze(3))
        self.values[:, rows].scatter_(3, at, values.to(self.values.dtype).unsqueeze(3))


def _extend(x: Tensor, more: int) -> Tensor:
    return torch.cat((x, x.new_zeros((*x.shape[:3], more, *x.shape[4:]))), dim=3)


class _Reindex:
    """Positions inside the cache, for the rows that want them.

    With n tokens evicted after a key, a re-indexed cache shows it n places nearer to the query than its own position
    says. Rotating the stored key (RoPE already applied) by n more places does just that, and only relative places matter.
    """

    def __init__(self, rows: Tensor, inv_freq: Tensor) -> None:
        self._rows, self._inv_freq = rows, inv_freq.float()

    @classmethod
    def of(cls, panel: Sequence[Policy], batch: int, inv_freq: Tensor | None) -> _Reindex | None:
        rows = [
            p * batch + b for p, policy in enumerate(panel) if policy.positions == "contiguous" for b in range(batch)
        ]
        return cls(torch.tensor(rows), inv_freq) if rows and inv_freq is not None else None

    def __call__(self, keys: Tensor, present: Tensor, padding: Tensor) -> Tensor:
        """keys [R, H, S, D], present [R, H, S], padding int64 [B] -> keys, rotated in the re-indexed rows."""
        device = keys.device
        rows = self._rows.to(device)
        columns = torch.arange(keys.shape[2], device=device)
        real = columns >= padding.to(device)[rows % len(padding)][:, None, None]
        gone = (real & ~present[rows]).long()
        gone_after = gone.flip(-1).cumsum(-1).flip(-1) - gone
        angle = gone_after[..., None].float() * self._inv_freq.to(device)
        cos, sin = torch.cat((angle, angle), -1).cos(), torch.cat((angle, angle), -1).sin()
        own = keys[rows].float()
        left, right = own.chunk(2, dim=-1)
        rotated = own * cos + torch.cat((-right, left), dim=-1) * sin
        return keys.index_copy(0, rows, rotated.to(keys.dtype))


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
