"""The engine: requests and a panel of policies in, responses out. One prefill for all policies, one batch for all rows.

The compressed cache is really read. A prompt is split into a *context*, which is prefilled with exact attention and then
compressed, and a *question* of at least one token, which is fed through the compressed cache token by token; the answer
follows it. With a visible question the split is before the prompt's last token (so that even the first token of an
answer comes from the compressed cache); with a hidden one the cache is compressed before the question has been seen.

requests.py   what is asked and answered; which requests share a batch, a prefix, a prompt
prefill.py    the model's forward passes
generate.py   answers
score.py      log-probabilities of continuations
"""

from __future__ import annotations

import gc
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, Generic

import torch

from mikv.cache.compressed import CompressedCache, Workspace
from mikv.cache.distance import worst_layers
from mikv.cache.prefill import PrefillState
from mikv.engine.generate import decode_answers
from mikv.engine.prefill import Forward
from mikv.engine.requests import (
    Batch,
    Decoding,
    Generation,
    Name,
    Prompt,
    Request,
    Response,
    Scores,
    Scoring,
    plan,
)
from mikv.engine.score import score_continuations
from mikv.policy import Policy

# Which share of a batch's work is done after its phases, roughly: for progress bars.
_PREFILLED, _DECODED = 0.3, 0.7

# What a machine that has run out of memory says, by device. Torch has an exception of its own for GPUs only.
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


class OutOfMemory(RuntimeError):
    """Even a single prompt does not fit; the message says what to do."""


@dataclass
class Seconds:
    """Time spent by phase, for all policies of a panel together: they share one prefill and one decode. fidelity: feeding
    the full cache's answers through every cache."""

    prefill: float = 0.0
    compress: float = 0.0
    decode: float = 0.0
    fidelity: float = 0.0


@dataclass
class Served(Generic[Name]):
    """Requests of one name, all answered.

    responses: by policy and request; seconds: their share of the time, by phase; prompts: how many were in the (largest) batch.
    """

    name: Name
    responses: list[list[Response]]
    seconds: Counter[str] = field(default_factory=Counter)
    prompts: int = 0


@dataclass
class Engine(Forward):
    """A model, and how it answers.

    watch: is told, again and again while prompts are served, which share of the work is done (0..1, an estimate).
    measuring: whether responses tell their worst layer. `serve` measures its first batch: a look at all that is stored.
    """

    seconds: Seconds = field(default_factory=Seconds)
    watch: Callable[[float], None] = lambda _: None
    measuring: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._workspace = Workspace()

    def serve(
        self,
        requests: Mapping[Name, Sequence[Request]],
        panel: Sequence[Policy],
        batch_size: int,
        fidelity: bool,
        watch: Callable[[float], None] = lambda _: None,
    ) -> Iterator[list[Served[Name]]]:
        """Answer all requests by all policies, batch by batch. What runs out of memory is tried again in halves, with the
        failed attempt's memory freed; later batches are no larger.

        Args:
            requests: in any order, of any kind, those that belong together under one name.
            panel: the first policy is the one that the others are compared with.
            batch_size: prompts at a time, at most. It changes speed and memory, and the last digits of all numbers.
            fidelity: see `generate`; scores always have it.
            watch: is told, again and again, which share of all prompts is done (0..1).

        Returns:
            After each batch the names whose last request was in it; each comes exactly once.

        Raises:
            OutOfMemory: a single prompt does not fit.
        """
        waiting = deque(plan(requests, batch_size))
        every = sum(len(batch.prompts) for batch in waiting)
        fits, done = batch_size, 0
        gathering = _Gathering(requests, len(panel))
        try:
            while waiting:
                batch = waiting.popleft()
                if len(batch.prompts) > fits:
                    waiting.extendleft(reversed(batch.parts(fits)))
                    continue
                self.watch = partial(_part, watch, done / every, len(batch.prompts) / every)
                self.measuring = not done
                responses = self._answered(batch, panel, fidelity)
                if responses is None:
                    self._release()
                    fits = (len(batch.prompts) + 1) // 2
                    print(f"out of memory with {len(batch.prompts)} prompts at a time; going on with at most {fits}")
                    waiting.appendleft(batch)
                    continue
                done += len(batch.prompts)
                watch(done / every)
                yield gathering.add(batch, responses, self.take_seconds())
        finally:
            self.measuring = False
            self.forget_prefix()

    def _answered(self, batch: Batch[Name], panel: Sequence[Policy], fidelity: bool) -> Sequence[Sequence[Response]] | None:
        """Responses by policy and prompt of a batch; None where memory ran out."""
        prompts = [asked.prompt for asked in batch.prompts]
        try:
            if batch.decoding is None:
                scorings = [Scoring(asked.prompt, list(asked.continuations)) for asked in batch.prompts]
                return self.score(scorings, panel, batch.shared)
            return self.generate(prompts, panel, batch.decoding, batch.shared, fidelity)
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            if len(prompts) == 1:
                raise OutOfMemory(
                    f"out of memory with a single prompt of {prompts[0].tokens} tokens and {len(panel)} policies. "
                    "Finished samples are kept. Ways out: a smaller panel, reader=packed or kernel (no dense "
                    "working copy), fidelity=false, shorter prompts, a larger machine."
                ) from error
            return None

    def _release(self) -> None:
        """Let go of all memory that is kept for the next batch: a smaller one is to be tried."""
        self._prefix, self._workspace = None, Workspace()
        gc.collect()  # the failed attempt's tensors hung on the traceback
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Prompt],
        panel: Sequence[Policy],
        decoding: Decoding,
        shared: int = 0,
        fidelity: bool = False,
    ) -> list[list[Generation]]:
        """Answers of one batch: for each policy of the panel, one per prompt.

        shared: first tokens that all contexts have in common, see `prefill`. fidelity: feed the answers of the panel's first
        policy, end tokens included, through the others' caches as well.
        """
        state, cache, worst = self._prepared(prompts, panel, shared)
        if not fidelity:
            del state  # its exact keys and values are not needed while decoding
        with self._timed("decode"):
            watch = partial(_part, self.watch, _PREFILLED, (_DECODED if fidelity else 1) - _PREFILLED)
            answers = _with(worst, decode_answers(self, cache, prompts, len(panel), decoding, self.end_tokens, watch))
        if not fidelity:
            return answers
        with self._timed("fidelity"):  # the first cache is used up: one packed cache at a time
            said = [[[*full.tokens, *([] if full.end is None else [full.end])]] for full in answers[0]]
            cache = self._compressed(state, prompts, panel)
            del state
            scores = score_continuations(
                self, cache, prompts, said, len(panel), partial(_part, self.watch, _DECODED, 1 - _DECODED)
            )
        return [
            [replace(g, fidelity=s.continuations[0].fidelity) for g, s in zip(of_policy, scored, strict=True)]
            for of_policy, scored in zip(answers, scores, strict=True)
        ]

    @torch.inference_mode()
    def score(self, scorings: Sequence[Scoring], panel: Sequence[Policy], shared: int = 0) -> list[list[Scores]]:
        """Log-probabilities of continuations, of one batch: for each policy of the panel, one result per prompt."""
        prompts = [scoring.prompt for scoring in scorings]
        wanted = [scoring.continuations for scoring in scorings]
        state, cache, worst = self._prepared(prompts, panel, shared)
        del state  # its exact keys and values are not needed any more
        with self._timed("decode"):
            scores = score_continuations(
                self, cache, prompts, wanted, len(panel), partial(_part, self.watch, _PREFILLED, 1 - _PREFILLED)
            )
        return _with(worst, scores)

    def _prepared(
        self, prompts: Sequence[Prompt], panel: Sequence[Policy], shared: int
    ) -> tuple[PrefillState, CompressedCache, list[list[tuple[int, float]]]]:
        """The contexts' exact state, every policy's compressed cache of them, and its worst layer of each prompt."""
        observers = set().union(*(policy.observers for policy in panel))
        with self._timed("prefill"):
            state = self.prefill([prompt.context for prompt in prompts], observers, shared)
        self.watch(_PREFILLED)
        with self._timed("compress"):
            cache = self._compressed(state, prompts, panel)
        # a measurement, and no part of the method: it is not timed
        return state, cache, worst_layers(cache, state) if self.measuring else []

    def _compressed(self, state: PrefillState, prompts: Sequence[Prompt], panel: Sequence[Policy]) -> CompressedCache:
        # a held-back last token belongs to the prompt; a hidden question is not known when budgets are fixed
        lengths = [p.tokens if len(p.question) == 1 else len(p.context) for p in prompts]
        return self.compress(state, panel, torch.tensor(lengths), self._workspace)

    def take_seconds(self) -> Seconds:
        """Time spent since the last call."""
        spent, self.seconds = self.seconds, Seconds()
        return spent

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        started = self._clock()
        yield
        setattr(self.seconds, phase, getattr(self.seconds, phase) + self._clock() - started)

    def _clock(self) -> float:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


class _Gathering(Generic[Name]):
    """Puts the responses to requests of one name together."""

    def __init__(self, requests: Mapping[Name, Sequence[Request]], policies: int) -> None:
        self._requests, self._policies = requests, policies
        self._responses: dict[tuple[Name, int], list[Response]] = {}
        self._left = {name: len(own) for name, own in requests.items()}
        self._served = {name: Served[Name](name, []) for name in requests}

    def add(self, batch: Batch[Name], responses: Sequence[Sequence[Response]], seconds: Seconds) -> list[Served[Name]]:
        """Take in a batch's responses, by policy and prompt. Returns those that are complete now."""
        complete = []
        tags = sum(len(asked.tags) for asked in batch.prompts)
        for b, asked in enumerate(batch.prompts):
            for name, index in asked.tags:
                request = self._requests[name][index]
                self._responses[name, index] = [asked.response_to(request, of_policy[b]) for of_policy in responses]
                served = self._served[name]
                served.prompts = max(served.prompts, len(batch.prompts))
                served.seconds.update({phase: spent / tags for phase, spent in asdict(seconds).items()})
                self._left[name] -= 1
                if not self._left[name]:
                    mine = [self._responses.pop((name, i)) for i in range(len(self._requests[name]))]
                    served.responses = [list(of_policy) for of_policy in zip(*mine, strict=True)]
                    complete.append(self._served.pop(name))
        return complete


def _with(worst: Sequence[Sequence[tuple[int, float]]], responses: list[list[Any]]) -> list[list[Any]]:
    """Responses, by policy and prompt, that say which layer was the worst, where that was measured."""
    if not worst:
        return responses
    pairs = (zip(layers, own, strict=True) for layers, own in zip(worst, responses, strict=True))
    return [[replace(response, worst_layer=layer) for layer, response in of_policy] for of_policy in pairs]


def _part(watch: Callable[[float], None], begun: float, part: float, share: float) -> None:
    """A share of a part of the work, told as a share of all of it."""
    watch(begun + part * share)


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return any(sign in str(error).lower() for sign in _OUT_OF_MEMORY)
