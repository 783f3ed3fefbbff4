"""The exact keys and values of a batch of prompts, and what importance and balancer need to know about them.

Made once by one forward pass, read by every policy, never changed. Layers that live on one device form a *bank*: their
tensors are stacked, so that compressing and demoting is one operation for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from mikv.attention.fused import fused_causal_attention
from mikv.attention.reference import causal_attention
from mikv.importance.base import Attended, Observer, ObserverState
from mikv.importance.scores import ColumnSumsState
from mikv.kernels import pick
from mikv.rope import Rope
from mikv.types import Geometry, Lengths

# Queries of each prompt that are kept: what is stored is measured by them.
_LAST = 16


@dataclass(frozen=True)
class PrefillBank:
    """Prefill of the layers of one device.

    layers int64 [L] (their indices); keys, values [L, B, H, T, D] in the model's dtype, keys after RoPE; query_absmax,
    query_squares float32 [L, B, H, D], the largest |q| and the sum of q^2 over real tokens and the query heads of a group;
    observed: float32 [L, B, H, T, ...] per observer, of queries [L, B, H, ...]; last_queries [L, B, H, G, W, D]: of the last W
    columns (fewer where there are not so many behind a shared prefix), after RoPE, in the model's dtype.
    """

    layers: Tensor
    keys: Tensor
    values: Tensor
    query_absmax: Tensor
    query_squares: Tensor
    observed: dict[Observer, Tensor]
    last_queries: Tensor


@dataclass(frozen=True)
class PrefillState:
    """Prefill of a batch. prompts int64 [B]: a number that names each (for seeded scores); rope: of the model, None where its
    frequencies are not fixed; output_projection: see mikv.importance.base.Context."""

    banks: tuple[PrefillBank, ...]
    lengths: Lengths
    prompts: Tensor
    geometry: Geometry
    dtype: torch.dtype
    rope: Rope | None = None
    output_projection: Callable[[int], Tensor] | None = None


class PrefillCache(Cache):
    """Collects a PrefillState during one forward pass of the model over a left-padded batch.

    With a `prefix` the pass is fed only what follows it: few-shot prompts share most of their tokens, and these are
    prefilled once. The result is that of the whole prompts (up to rounding: other matrix shapes).

    Args:
        geometry: of the model.
        devices: where each layer lives.
        dtype: of keys and values.
        lengths: of the whole prompts, the prefix included.
        observers: what must be watched.
        prefix: prefill of one row (watched by the same observers) that all prompts begin with; each is longer than it.
        rope: of the model, for observers of queries.
        kernels: `triton` = where column sums are all that is watched its kernel makes them, and attention is torch's fused one:
            no probabilities are ever written. (Not behind a prefix, whose queries are not there any more.)
    """

    def __init__(
        self,
        geometry: Geometry,
        devices: Sequence[torch.device],
        dtype: torch.dtype,
        lengths: Lengths,
        observers: Sequence[Observer],
        prefix: PrefillState | None = None,
        kernels: str = "reference",
        rope: Rope | None = None,
    ) -> None:
        self._geometry, self._dtype, self._lengths = geometry, dtype, lengths
        self._collecting: list[_CollectingBank] = []
        layers: list[_PrefillLayer] = []
        for device, indices in groupby(range(geometry.layers), key=lambda layer: devices[layer]):
            before = None if prefix is None else prefix.banks[len(self._collecting)]
            bank = _CollectingBank(list(indices), geometry, device, dtype, lengths, observers, before, kernels, rope)
            self._collecting.append(bank)
            layers += [_PrefillLayer(bank, i) for i in range(len(bank.layers))]
        super().__init__(layers=layers)

    def attended(self, module: Any, model: Any, hidden: Tensor, cosines: tuple[Tensor, Tensor]) -> None:
        """Show a layer's attention, after it, to the observers that want to see it."""
        layer = self.layers[module.layer_idx]
        assert isinstance(layer, _PrefillLayer)
        bank, index = layer.place
        for state in bank.of_attended:
            shown = Attended(module, model, hidden, bank.keys[index], bank.values[index], cosines, bank.real)
            state.attended(index, shown)

    def state(
        self, prompts: Tensor, rope: Rope | None = None, output_projection: Callable[[int], Tensor] | None = None
    ) -> PrefillState:
        """What was collected. Arguments: see PrefillState."""
        banks = tuple(bank.finish() for bank in self._collecting)
        return PrefillState(banks, self._lengths, prompts, self._geometry, self._dtype, rope, output_projection)


class _CollectingBank:
    def __init__(
        self,
        layers: list[int],
        geometry: Geometry,
        device: torch.device,
        dtype: torch.dtype,
        lengths: Lengths,
        observers: Sequence[Observer],
        prefix: PrefillBank | None,
        kernels: str,
        rope: Rope | None,
    ) -> None:
        self.layers = torch.tensor(layers, device=device)
        batch, heads, dim = len(lengths.tokens), geometry.kv_heads, geometry.head_dim
        shape = (len(layers), batch, heads, lengths.width, dim)
        # zeros: with a prefix nothing is written to the columns of padding, and 0 times what lies there must be 0
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.query_absmax = torch.zeros((len(layers), batch, heads, dim), device=device)
        self.query_squares = torch.zeros_like(self.query_absmax)
        self.real = lengths.positions(device) >= 0
        self.padding = self.real if lengths.padding.any() else None
        geometry = geometry._replace(layers=len(layers))
        self.states: dict[Observer, ObserverState] = {o: o.start(geometry, lengths, device) for o in observers}
        self.watching = {observer: state for observer, state in self.states.items() if observer.shown == "block"}
        self.of_queries = [state for observer, state in self.states.items() if observer.shown == "queries"]
        self.of_attended = [state for observer, state in self.states.items() if observer.shown == "attended"]
        if self.of_queries and rope is None:
            raise ValueError("the queries before RoPE are asked for, and this model's RoPE has no fixed frequencies")
        self.rope = rope
        sums = [
            state for observer, state in self.watching.items() if isinstance(state, ColumnSumsState) and observer.last is None
        ]
        by_kernel = kernels == "triton" and prefix is None and len(sums) == len(self.watching)
        self.sums = sums if by_kernel else None
        self.shift = lengths.padding.to(device, torch.int32)
        self.prefix, self.shared = prefix, 0
        if prefix is not None:
            self.shared = prefix.keys.shape[3]
            self._padding = lengths.padding.tolist()
            self.query_absmax += prefix.query_absmax
            self.query_squares += prefix.query_squares
            self._place(prefix.keys, self.keys)
            self._place(prefix.values, self.values)
        group, last = geometry.query_heads // heads, min(_LAST, lengths.width - self.shared)
        self.last_queries = torch.zeros((len(layers), batch, heads, group, last, dim), dtype=dtype, device=device)
        # columns that the pass is fed; in rows with padding the first of them belong to the prefix
        self.fed_positions = lengths.positions(device)[:, self.shared :]
        self.fed = self.fed_positions >= self.shared

    def _place(self, prefix: Tensor, whole: Tensor) -> None:
        """Copy [L, 1, H, T0, ...] of the prefix to where it lies in each row of [L, B, H, T, ...]."""
        for row, padding in enumerate(self._padding):
            whole[:, row, :, padding : padding + self.shared] = prefix[:, 0]

    def finish(self) -> PrefillBank:
        observed = {observer: state.result() for observer, state in self.states.items()}
        if self.prefix is not None:
            for observer, after in observed.items():
                if observer.last is not None:
                    continue  # none of its queries lies in the prefix
                before = self.prefix.observed[observer]
                if observer.shown == "block":
                    self._place(before, before := torch.zeros_like(after))
                observed[observer] = observer.combine(before, after)
        statistics = self.query_absmax, self.query_squares, observed
        return PrefillBank(self.layers, self.keys, self.values, *statistics, self.last_queries)


class _PrefillLayer(CacheLayerMixin):
    """One layer's part of a PrefillCache, and the handle that attends for it."""

    is_sliding = False

    def __init__(self, bank: _CollectingBank, index: int) -> None:
        super().__init__()
        self._bank, self._index = bank, index
        self._seen = bank.shared

    @property
    def place(self) -> tuple[_CollectingBank, int]:
        """Its bank, and which of the bank's layers it is."""
        return self._bank, self._index

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        bank = self._bank
        if self._seen != bank.shared or bank.shared + key_states.shape[2] != bank.keys.shape[3]:
            raise RuntimeError("a PrefillCache takes all that follows the prefix in one forward pass")
        self.lazy_initialization(key_states, value_states)
        self._seen += key_states.shape[2]
        for whole, fed in ((bank.keys, key_states), (bank.values, value_states)):
            place = whole[self._index, :, :, bank.shared :]
            place.copy_(fed if bank.prefix is None else torch.where(bank.fed[:, None, :, None], fed, place))
        return self, self

    def attend(self, query: Tensor, scaling: float) -> Tensor:
        """Exact causal attention, watched by the observers."""
        bank, layer = self._bank, self._index
        key, value = bank.keys[layer], bank.values[layer]
        absmax, squares = _moments(query, bank.fed, key.shape[1])
        bank.query_absmax[layer] = torch.maximum(bank.query_absmax[layer], absmax)
        bank.query_squares[layer] += squares
        last = bank.last_queries.shape[4]
        bank.last_queries[layer] = query[:, :, query.shape[2] - last :].unflatten(1, (key.shape[1], -1))
        if bank.of_queries:
            assert bank.rope is not None
            places = bank.fed_positions.clamp(min=0)[:, None].expand(query.shape[:3])
            plain = bank.rope.turn_back(query, places, bank.keys.shape[3]).unflatten(1, (key.shape[1], -1))
            for state in bank.of_queries:
                state.queries(layer, plain, bank.fed_positions.masked_fill(~bank.fed, -1))

        def watch(probs: Tensor, first: int) -> None:
            start, end = first - bank.shared, first + probs.shape[3]
            real_queries = bank.fed[:, start : start + probs.shape[3]]
            for observer, state in bank.watching.items():
                wanted = real_queries
                if observer.last is not None:  # prompts end in the last column
                    outside = key.shape[2] - observer.last
                    if end <= outside:
                        continue
                    wanted = wanted & (torch.arange(first, end, device=wanted.device) >= outside)
                state.block(layer, probs, first, wanted)

        if bank.sums is not None:
            for state in bank.sums:
                state.add(layer, pick.column_sums(query, key, None, scaling, bank.shift, "triton"))
            return fused_causal_attention(query, key, value, scaling, bank.padding)
        # in 16 bits the fused kernel rounds otherwise, and a panel that is watched would not be its policies alone
        if bank.watching or query.dtype != torch.float32:
            return causal_attention(query, key, value, scaling, bank.padding, watch if bank.watching else None)
        return fused_causal_attention(query, key, value, scaling, bank.padding)

    def get_seq_length(self) -> int:
        return self._seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._seen + query_length, 0

    def get_max_length(self) -> int:
        return -1


def _moments(query: Tensor, real: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Over the real tokens (bool [B, T]) of queries [B, Hq, T, D], and over the query heads of a group: max |q| and sum q^2,
    float32 [B, H, D]."""
    counted = query.masked_fill(~real[:, None, :, None], 0)
    squares = torch.linalg.vector_norm(counted, dim=2, dtype=torch.float32).square()
    absmax = counted.abs().amax(dim=2).float()
    return absmax.unflatten(1, (heads, -1)).amax(dim=2), squares.unflatten(1, (heads, -1)).sum(dim=2)
