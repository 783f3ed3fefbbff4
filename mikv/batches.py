"""Order requests so that shared work is done once, and serve them to the engine in batches.

equal prompts            are one prompt (the choices of a question, two tasks that ask the same)
long common prefixes     are prefilled once and forked (few-shot examples, system prompts)
the longest come first   what does not fit the memory fails at the start, and the progress bar errs on the safe side
out of memory            halves the batch and tries again, with the failed attempt's memory freed; later batches are no larger
"""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from mikv.decoding import Decoding
from mikv.engine import Engine, Generation, Prompt, Scores, Scoring, Seconds
from mikv.policy import Policy

# A prefix is worth a pass of its own from so many tokens on, and if it is at least half of each prompt that has it.
_MIN_SHARED = 32

# What a machine that has run out of memory says, by device. Torch has an exception of its own for GPUs only.
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


class OutOfMemory(RuntimeError):
    """Even a single prompt does not fit; the message says what to do."""


@dataclass(frozen=True)
class Generating:
    """A prompt to be answered."""

    prompt: Prompt
    decoding: Decoding


Request = Scoring | Generating
Response = Scores | Generation
"""What a policy makes of a request: Scores of a Scoring, with continuations in its order; Generation of a Generating."""


@dataclass(frozen=True)
class Served:
    """Requests (by index) that are done, each one's response by policy; prompts: how many were in their batch; seconds: the
    time they took together."""

    responses: dict[int, list[Response]]
    prompts: int
    seconds: Seconds


def serve(
    engine: Engine,
    requests: Sequence[Request],
    panel: Sequence[Policy],
    batch_size: int,
    fidelity: bool,
    watch: Callable[[float], None] = lambda _: None,
) -> Iterator[Served]:
    """Answer all requests by all policies, as they get done; each index comes exactly once.

    Args:
        engine: runs them.
        requests: in any order, of any kind.
        panel: the first policy is the one that the others are compared with.
        batch_size: prompts at a time, at most. It changes speed and memory, and the last digits of all numbers.
        fidelity: see Engine.generate; scores always have it.
        watch: is told, again and again, which share of all requests' prompts is done (0..1).

    Raises:
        OutOfMemory: a single prompt does not fit.
    """
    waiting = deque(plan(requests, batch_size))
    every = sum(len(batch.prompts) for batch in waiting)
    fits, done = batch_size, 0
    try:
        while waiting:
            batch = waiting.popleft()
            if len(batch.prompts) > fits:
                waiting.extendleft(reversed(batch.parts(fits)))
                continue
            engine.watch = partial(_share, watch, done, len(batch.prompts), every)
            responses = _answered(engine, batch, panel, fidelity)
            if responses is None:
                engine.release()
                gc.collect()  # the failed attempt's tensors hung on the traceback
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                fits = (len(batch.prompts) + 1) // 2
                print(f"out of memory with {len(batch.prompts)} prompts at a time; going on with at most {fits}")
                waiting.appendleft(batch)
                continue
            done += len(batch.prompts)
            watch(done / every)
            yield Served(batch.scatter(responses), len(batch.prompts), engine.take_seconds())
    finally:
        engine.forget_prefix()


def _share(watch: Callable[[float], None], done: int, here: int, every: int, share: float) -> None:
    watch((done + share * here) / every)


@dataclass
class Merged:
    """One prompt, asked by one or several requests.

    owners: their indices; continuations: of all of them, each once; places: for each owner, where its own are.
    """

    prompt: Prompt
    owners: list[int] = field(default_factory=list)
    continuations: list[tuple[int, ...]] = field(default_factory=list)
    places: list[list[int]] = field(default_factory=list)

    def add(self, owner: int, continuations: Sequence[Sequence[int]]) -> None:
        wanted = [tuple(continuation) for continuation in continuations]
        known = {continuation: i for i, continuation in enumerate(self.continuations)}
        for continuation in wanted:
            known.setdefault(continuation, len(known))
        self.continuations = list(known)
        self.owners.append(owner)
        self.places.append([known[continuation] for continuation in wanted])


@dataclass(frozen=True)
class Batch:
    """Prompts that go to the engine together. decoding None = their continuations are scored. shared: first tokens that all
    contexts have in common and that are prefilled once."""

    prompts: Sequence[Merged]
    decoding: Decoding | None
    shared: int

    def parts(self, size: int) -> list[Batch]:
        """The same in batches of at most so many prompts."""
        return [replace(self, prompts=self.prompts[i : i + size]) for i in range(0, len(self.prompts), size)]

    def scatter(self, responses: Sequence[Sequence[Response]]) -> dict[int, list[Response]]:
        """Responses by policy and prompt -> by request and policy."""
        by_request: dict[int, list[Response]] = {}
        for b, merged in enumerate(self.prompts):
            for owner, places in zip(merged.owners, merged.places, strict=True):
                by_request[owner] = [_only(of_policy[b], places) for of_policy in responses]
        return by_request


def _only(response: Response, places: Sequence[int]) -> Response:
    if isinstance(response, Generation):
        return response
    return replace(response, continuations=[response.continuations[place] for place in places])


def plan(requests: Sequence[Request], batch_size: int) -> Iterator[Batch]:
    """Batches that hold every request once."""
    kinds: dict[Decoding | None, dict[Hashable, Merged]] = {}
    for index, request in enumerate(requests):
        prompt = request.prompt
        same = kinds.setdefault(request.decoding if isinstance(request, Generating) else None, {})
        key = (tuple(prompt.context), tuple(prompt.question), prompt.repeat, prompt.watched)
        merged = same.setdefault(key, Merged(prompt))
        merged.add(index, request.continuations if isinstance(request, Scoring) else [])
    for decoding, same in kinds.items():
        alone: list[Merged] = []
        # A shared prefix saves prefill. Answers are many steps, each of which reads all weights for the rows of its batch: for
        # them a full batch is worth more than a prefix that fills none.
        least = 2 if decoding is None else min(batch_size, len(same))
        for run, shared in _sharing(list(same.values())):
            if len(run) < least:
                alone += run
            else:
                yield from _cut(run, decoding, shared, batch_size)
        yield from _cut(alone, decoding, 0, batch_size)


def _cut(run: Sequence[Merged], decoding: Decoding | None, shared: int, batch_size: int) -> Iterator[Batch]:
    ordered = sorted(run, key=lambda merged: -merged.prompt.tokens)
    for start in range(0, len(ordered), batch_size):
        yield Batch(ordered[start : start + batch_size], decoding, shared)


def _sharing(prompts: Sequence[Merged]) -> Iterator[tuple[list[Merged], int]]:
    """Runs of prompts whose contexts begin alike, and how many tokens they share.

    At least one more follows in each: in this order a prompt comes before those that it is the beginning of.
    """
    ordered = sorted(prompts, key=lambda merged: list(merged.prompt.context))
    run: list[Merged] = []
    shared = 0
    for merged in ordered:
        context = merged.prompt.context
        common = 0
        if run:
            common = min(shared, _common(run[-1].prompt.context, context))
        if common >= max(_MIN_SHARED, len(context) // 2):
            run.append(merged)
            shared = common
            continue
        if run:
            yield run, shared
        run, shared = [merged], len(context) - 1
    if run:
        yield run, shared


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many first tokens two sequences have in common."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))


def _answered(engine: Engine, batch: Batch, panel: Sequence[Policy], fidelity: bool) -> Sequence[Sequence[Response]] | None:
    """Responses of a batch; None where memory ran out."""
    try:
        if batch.decoding is None:
            scorings = [Scoring(merged.prompt, merged.continuations) for merged in batch.prompts]
            return engine.score(scorings, panel, batch.shared)
        prompts = [merged.prompt for merged in batch.prompts]
        return engine.generate(prompts, panel, batch.decoding, batch.shared, fidelity)
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        if len(batch.prompts) == 1:
            raise OutOfMemory(
                f"out of memory with a single prompt of {batch.prompts[0].prompt.tokens} tokens and {len(panel)} policies. "
                "Finished samples are kept. Ways out: a smaller panel, reader=packed or kernel (no dense "
                "working copy), fidelity=false, shorter prompts, a larger machine."
            ) from error
        return None


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return any(sign in str(error).lower() for sign in _OUT_OF_MEMORY)
