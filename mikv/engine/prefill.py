"""The model's two forward passes: whole contexts at once, with exact attention; then one token per row, through compressed
caches."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mikv.cache.backend import Backend, decide
from mikv.cache.compressed import CompressedCache, Workspace
from mikv.cache.prefill import PrefillCache, PrefillState
from mikv.importance.base import Observer
from mikv.kernels.verify import verify
from mikv.models.architecture import geometry, layer_devices, output_projection, rope_inv_freq
from mikv.policy import Policy
from mikv.randomness import number_of
from mikv.rope import Rope
from mikv.types import Lengths


@dataclass
class Forward:
    """A model of transformers with the project's attention (`attn_implementation="mikv"`), and how to run it.

    Args:
        model: the causal LM.
        end_tokens: ids that end an answer.
        pad_token: id for padding; never attended.
        reader, attention: how compressed caches are read, see mikv.cache.backend.
    """

    model: Any
    end_tokens: Collection[int]
    pad_token: int = 0
    reader: str | None = None
    attention: str | None = None

    def __post_init__(self) -> None:
        self.geometry = geometry(self.model.config)
        self._devices = layer_devices(self.model)
        self._prefix: tuple[tuple[tuple[int, ...], frozenset[Observer]], PrefillState] | None = None

    @property
    def backend(self) -> Backend:
        """How compressed caches are read.

        Raises:
            ValueError: what is asked for can't be done with this model.
        """
        return decide(self.reader, self.attention, self.model.device, self.model.dtype, lambda: self.geometry.head_dim)

    def verify_kernels(self, panel: Sequence[Policy]) -> None:
        """Before anything is measured: where Triton's kernels will read the caches of a panel, are they right on this machine?

        Raises:
            KernelsDisagree: they aren't.
        """
        if panel and self.backend.attention == "triton":
            shape = self.geometry
            read = [policy for policy in panel if self.backend.reader_of(policy) == "kernel"]
            tiers = {(tier.k, tier.v, tier.kind) for policy in read for tier in policy.tiers if not tier.evicted}
            heads = (shape.query_heads, shape.kv_heads, shape.head_dim)
            verify(sorted(tiers | {(16, 16, "affine")}), *heads, self.model.dtype, self.model.device)

    @torch.inference_mode()
    def prefill(self, contexts: Sequence[Sequence[int]], observers: Collection[Observer] = (), shared: int = 0) -> PrefillState:
        """One exact forward pass over the contexts, left-padded. Empty contexts are allowed.

        shared: so many first tokens are the same in all contexts, and none of them ends there. They are prefilled once,
        also for the next calls with the same ones.
        """
        lengths = Lengths(torch.tensor([len(c) for c in contexts]), max(map(len, contexts)))
        shared = min([shared, *(min(map(len, contexts)) - o.last for o in observers if o.last is not None)])
        attended = any(observer.shown == "attended" for observer in observers)
        shared = 0 if attended else max(0, shared)  # the queries that an observer asks for are not in the prefix
        prefix = self._shared_prefix(contexts[0][:shared], frozenset(observers)) if shared else None
        inv_freq = rope_inv_freq(self.model)
        rope = None if inv_freq is None else Rope(inv_freq)
        cache = PrefillCache(
            self.geometry, self._devices, self.model.dtype, lengths, list(observers), prefix, self.backend.kernels, rope
        )
        if lengths.width:
            ids = [[self.pad_token] * (lengths.width - len(c)) + list(c[shared:]) for c in contexts]
            positions = lengths.positions(self.model.device)[:, shared:]
            with self._shown(cache) if attended else nullcontext():
                self.model(
                    input_ids=torch.tensor(ids, device=self.model.device),
                    attention_mask=(positions >= shared).long(),
                    position_ids=positions.clamp(min=0),
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                )
        projection = partial(output_projection, self.model)
        return cache.state(torch.tensor([number_of(context) for context in contexts]), rope, projection)

    @contextmanager
    def _shown(self, cache: PrefillCache) -> Iterator[None]:
        """Every layer's attention is shown to the cache, after it."""

        def show(module: Any, _: Any, given: dict[str, Any], __: Any) -> None:
            cache.attended(module, self.model, given["hidden_states"], given["position_embeddings"])

        layers = self.model.get_decoder().layers
        hooks = [layer.self_attn.register_forward_hook(show, with_kwargs=True) for layer in layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _shared_prefix(self, tokens: Sequence[int], observers: frozenset[Observer]) -> PrefillState:
        key = (tuple(tokens), observers)
        if self._prefix is None or self._prefix[0] != key:
            self._prefix = None  # first the old one goes
            self._prefix = (key, self.prefill([tokens], observers))
        return self._prefix[1]

    def forget_prefix(self) -> None:
        """Let go of the last shared prefix: nothing more is to come that begins with it."""
        self._prefix = None

    def compress(
        self,
        state: PrefillState,
        panel: Sequence[Policy],
        prompt_lengths: Tensor | None = None,
        workspace: Workspace | None = None,
    ) -> CompressedCache:
        """Every policy's compressed cache of a prefill. The state is not changed."""
        return CompressedCache(state, panel, prompt_lengths, self.backend, workspace)

    @torch.inference_mode()
    def step(self, cache: CompressedCache, tokens: Tensor, positions: Tensor, active: Tensor) -> Tensor:
        """Feed one token per row (int64 [R], at positions int64 [R]) and return the logits that follow, [R, vocabulary].

        Rows that are not active (bool [R]) are computed along, but their cache stays as it is.
        """
        logits = self.model(
            input_ids=tokens[:, None].to(self.model.device),
            position_ids=positions[:, None].to(self.model.device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        cache.end_step(active)
        return logits
