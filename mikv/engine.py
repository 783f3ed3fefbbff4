"""The engine: prompts and a panel of policies in, answers out. One prefill for all policies, one batch for all rows.

The compressed cache is really read. A prompt is split into a *context*, which is prefilled with exact attention and then
compressed, and a *question* of at least one token, which is fed through the compressed cache token by token; the answer
follows it. With a visible question the split is before the prompt's last token (so that even the first token of an
answer comes from the compressed cache); with a hidden one the cache is compressed before the question has been seen.
"""

from __future__ import annotations

import time
import zlib
from array import array
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mikv.cache.compressed import READERS as READERS  # what `Engine.reader` may be
from mikv.cache.compressed import CompressedCache, Usage, Workspace
from mikv.cache.prefill import PrefillCache, PrefillState
from mikv.importance.base import Observer
from mikv.models.architecture import geometry, layer_devices, rope_inv_freq
from mikv.policy import Policy
from mikv.types import Lengths


@dataclass(frozen=True)
class Prompt:
    """Token ids: `context` is compressed, `question` (at least one token) is fed through the compressed cache."""

    context: Sequence[int]
    question: Sequence[int]

    def __post_init__(self) -> None:
        if not self.question:
            raise ValueError("a prompt needs at least one token that is fed through the compressed cache")

    @property
    def tokens(self) -> int:
        return len(self.context) + len(self.question)


@dataclass(frozen=True)
class Generation:
    """An answer of one policy to one prompt.

    tokens: without the end token; ended: by an end token, not by the limit; usage: of the cache at the end of the answer;
    compressed_tokens: how many tokens of the context were not at 16 bits when the first token was fed through the
    compressed cache (0 = the policy was not exercised).
    """

    tokens: list[int]
    ended: bool
    compressed_tokens: int
    usage: Usage


@dataclass
class Seconds:
    """Time spent by phase, for all policies of a panel together: they share one prefill and one decode."""

    prefill: float = 0.0
    compress: float = 0.0
    decode: float = 0.0


@dataclass
class Engine:
    """A model of transformers with the project's attention (`attn_implementation="mikv"`), and how to run it.

    Args:
        model: the causal LM.
        end_tokens: ids that end an answer.
        pad_token: id for padding; never attended.
        reader: see mikv.cache.compressed.
    """

    model: Any
    end_tokens: Collection[int]
    pad_token: int = 0
    reader: str = "working"
    seconds: Seconds = field(default_factory=Seconds)

    def __post_init__(self) -> None:
        self.geometry = geometry(self.model.config)
        self._devices = layer_devices(self.model)
        self._workspace = Workspace()

    @torch.inference_mode()
    def prefill(self, contexts: Sequence[Sequence[int]], observers: Collection[Observer] = ()) -> PrefillState:
        """One exact forward pass over the contexts, left-padded. Empty contexts are allowed."""
        lengths = Lengths(torch.tensor([len(c) for c in contexts]), max(map(len, contexts)))
        cache = PrefillCache(self.geometry, self._devices, self.model.dtype, lengths, list(observers))
        if lengths.width:
            ids = [[self.pad_token] * (lengths.width - len(c)) + list(c) for c in contexts]
            positions = lengths.positions(self.model.device)
            self.model(
                input_ids=torch.tensor(ids, device=self.model.device),
                attention_mask=(positions >= 0).long(),
                position_ids=positions.clamp(min=0),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        names = [zlib.crc32(array("q", context).tobytes()) for context in contexts]
        return cache.state(torch.tensor(names))

    def compress(
        self,
        state: PrefillState,
        panel: Sequence[Policy],
        prompt_lengths: Tensor | None = None,
        workspace: Workspace | None = None,
    ) -> CompressedCache:
        """Every policy's compressed cache of a prefill. The state is not changed."""
        return CompressedCache(state, panel, prompt_lengths, self.reader, rope_inv_freq(self.model), workspace)

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Prompt], panel: Sequence[Policy], max_new_tokens: int) -> list[list[Generation]]:
        """Greedy answers: for each policy of the panel, one per prompt."""
        watched = {p.importance.observer for p in panel if p.importance is not None and p.importance.observer is not None}
        started = self._clock()
        state = self.prefill([prompt.context for prompt in prompts], watched)
        prefilled = self._clock()
        # a held-back last token belongs to the prompt; a hidden question is not known when budgets are fixed
        lengths = [p.tokens if len(p.question) == 1 else len(p.context) for p in prompts]
        cache = self.compress(state, panel, torch.tensor(lengths), self._workspace)
        del state  # its exact keys and values are not needed while decoding
        compressed = self._clock()
        answers = self._decode(cache, prompts, len(panel), max_new_tokens)
        self.seconds.prefill += prefilled - started
        self.seconds.compress += compressed - prefilled
        self.seconds.decode += self._clock() - compressed
        return answers

    def _decode(
        self, cache: CompressedCache, prompts: Sequence[Prompt], policies: int, max_new_tokens: int
    ) -> list[list[Generation]]:
        """Feed every row its question, then its own answer, one token a step, until all rows have ended."""
        rows = [(p, b) for p in range(policies) for b in range(len(prompts))]
        compressed_tokens = dict(zip(rows, (usage.compressed_tokens for usage in cache.usage()), strict=True))
        answers: dict[tuple[int, int], list[int]] = {row: [] for row in rows}
        ended = dict.fromkeys(rows, False)
        done: dict[tuple[int, int], Generation] = {}
        positions = torch.tensor([len(prompts[b].context) for _, b in rows])
        active = torch.ones(len(rows), dtype=torch.bool)

        def finish() -> None:
            for row, usage, going_on in zip(rows, cache.usage(), active.tolist(), strict=True):
                if not going_on:
                    done[row] = Generation(answers[row], ended[row], compressed_tokens[row], usage)

        step = 0
        while active.any():
            fed = [self._fed(prompts[row[1]].question, answers[row], step) for row in rows]
            chosen = self.step(cache, torch.tensor(fed), positions, active).argmax(dim=-1).tolist()
            for i in active.nonzero().squeeze(1).tolist():
                row = rows[i]
                if step < len(prompts[row[1]].question) - 1:
                    continue  # the question goes on: what the model would have said does not matter
                if chosen[i] in self.end_tokens:
                    ended[row] = True
                else:
                    answers[row].append(chosen[i])
                active[i] = not ended[row] and len(answers[row]) < max_new_tokens
            positions = positions + 1
            step += 1
            if active.sum() <= len(rows) // 2:
                finish()
                cache.keep(active)
                rows = [row for row, going_on in zip(rows, active.tolist(), strict=True) if going_on]
                positions, active = positions[active], active[active]
        return [[done[p, b] for b in range(len(prompts))] for p in range(policies)]

    def _fed(self, question: Sequence[int], answer: Sequence[int], step: int) -> int:
        """The token a row is fed: of its question, then the last of its answer (padding where there is none)."""
        if step < len(question):
            return question[step]
        return answer[-1] if answer else self.pad_token

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

    def take_seconds(self) -> Seconds:
        """Time spent since the last call."""
        spent, self.seconds = self.seconds, Seconds()
        return spent

    def _clock(self) -> float:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()
