"""What is asked of the engine and what it answers; and how requests are ordered so that shared work is done once.

equal prompts            are one prompt (the choices of a question, two tasks that ask the same)
long common prefixes     are prefilled once and forked (few-shot examples, system prompts)
the longest come first   what does not fit the memory fails at the start, and the progress bar errs on the safe side
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, NamedTuple, Protocol, TypeVar

from mikv.cache.compressed import Usage

# A prefix is worth a pass of its own from so many tokens on, and if it is at least half of each prompt that has it.
_MIN_SHARED = 32

Name = TypeVar("Name", bound=Hashable)
"""What the caller calls requests that belong together."""


@dataclass(frozen=True)
class Prompt:
    """Token ids: `context` is compressed, `question` (at least one token) is fed through the compressed cache.

    repeat: counts sampled answers to the same prompt, each of which gets its own random numbers.
    watched: first and last (exclusive) position of the context's tokens whose tiers are reported, as of a system prompt.
    """

    context: Sequence[int]
    question: Sequence[int]
    repeat: int = 0
    watched: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        if not 0 <= self.watched[0] <= self.watched[1] <= len(self.context):
            raise ValueError(f"watched tokens {self.watched} are not within a context of {len(self.context)} tokens")
        if not self.question:
            raise ValueError("a prompt needs at least one token that is fed through the compressed cache")

    @property
    def tokens(self) -> int:
        return len(self.context) + len(self.question)


class Stop(Protocol):
    """Whether an answer is over although no end token came; hashable, so that equal ways to decode share a batch."""

    def __call__(self, tokens: Sequence[int]) -> bool: ...

    def __hash__(self) -> int: ...


@dataclass(frozen=True)
class Sampling:
    """Parameters as in transformers' GenerationConfig.

    Args:
        temperature: above 0.
        top_k: only the k most probable tokens; 0 = all.
        top_p: only the most probable tokens that together reach this probability.
        min_p: only tokens that have this share of the most probable one's probability.
        seed: of the random numbers.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature}: above 0; greedy answers are do_sample=false")
        if self.top_k < 0 or not 0 < self.top_p <= 1 or not 0 <= self.min_p <= 1:
            raise ValueError(f"top_k={self.top_k}, top_p={self.top_p}, min_p={self.min_p}: top_k from 0, the others in 0..1")


@dataclass(frozen=True)
class Decoding:
    """How to answer.

    Args:
        max_new_tokens: limit of an answer, at least 1.
        sampling: None = greedy.
        repetition_penalty: above 1 = tokens of the prompt and the answer get less probable (as transformers does it).
        stop: ends an answer, besides the model's end tokens.
    """

    max_new_tokens: int
    sampling: Sampling | None = None
    repetition_penalty: float = 1.0
    stop: Stop | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens}: at least 1")


@dataclass(frozen=True)
class Generating:
    """A prompt to be answered."""

    prompt: Prompt
    decoding: Decoding


@dataclass(frozen=True)
class Scoring:
    """A prompt, and token sequences (each at least one) whose log-probabilities after it are wanted."""

    prompt: Prompt
    continuations: Sequence[Sequence[int]]

    def __post_init__(self) -> None:
        if not self.continuations or not all(self.continuations):
            raise ValueError("nothing to score: each continuation needs at least one token")


Request = Scoring | Generating


class Fidelity(NamedTuple):
    """How far a policy is from the panel's first one (the full-cache baseline) while both are fed the same tokens.

    kl: mean over the tokens of KL(baseline || policy) between next-token distributions, in nats; agreement: share of tokens at
    which both have the same most probable token; nll_change: mean change of the tokens' negative log-likelihood, in nats
    (positive = less probable than with the baseline).
    """

    kl: float
    agreement: float
    nll_change: float


class Scored(NamedTuple):
    """One continuation: how many tokens, the sum of their log-probabilities, whether each was the most probable one."""

    tokens: int
    logprob: float
    greedy: bool
    fidelity: Fidelity


@dataclass(frozen=True)
class Scores:
    """The continuations of one prompt under one policy, in the request's order.

    usage: of the cache when the question has been fed; compressed_tokens, worst_layer: see Generation.
    """

    continuations: list[Scored]
    compressed_tokens: float
    usage: Usage
    worst_layer: tuple[int, float] | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Generation:
    """An answer of one policy to one prompt.

    tokens: without the end token; end: the end token, or None where something else ended the answer; ended: by an end token
    or the stop condition, not by the limit; usage: of the cache at the end of the answer; compressed_tokens: how many tokens
    of the context were not at 16 bits when the first token was fed through the compressed cache (0 = the policy was not
    exercised); watched_tiers: share of the prompt's watched tokens by the bits at which they were held then ("0" = evicted),
    mean over layers and heads; fidelity: on the first policy's answer, where that was asked for; worst_layer: the layer in
    which the attention of the context's last queries was moved most, and how far (mikv.cache.distance), where it was measured.
    """

    tokens: list[int]
    end: int | None
    ended: bool
    compressed_tokens: float
    usage: Usage
    watched_tiers: dict[str, float] = field(default_factory=dict)
    fidelity: Fidelity | None = None
    worst_layer: tuple[int, float] | None = field(default=None, compare=False)


Response = Scores | Generation
"""What a policy makes of a request: Scores of a Scoring, Generation of a Generating."""


@dataclass
class Asked(Generic[Name]):
    """One prompt, asked by one or several requests.

    tags: of these requests: the name that they go by, and which of its requests it is; continuations: of all of them, each
    once, with its place among them.
    """

    prompt: Prompt
    tags: list[tuple[Name, int]] = field(default_factory=list)
    continuations: dict[tuple[int, ...], int] = field(default_factory=dict)

    def add(self, tag: tuple[Name, int], request: Request) -> None:
        self.tags.append(tag)
        for continuation in request.continuations if isinstance(request, Scoring) else ():
            self.continuations.setdefault(tuple(continuation), len(self.continuations))

    def response_to(self, request: Request, response: Response) -> Response:
        """What one of the requests asked for, of the response to all of them."""
        if isinstance(request, Generating) or isinstance(response, Generation):
            return response
        mine = [response.continuations[self.continuations[tuple(wanted)]] for wanted in request.continuations]
        return replace(response, continuations=mine)


@dataclass(frozen=True)
class Batch(Generic[Name]):
    """Prompts that go through the model together. decoding None = their continuations are scored. shared: first tokens that
    all contexts have in common and that are prefilled once."""

    prompts: Sequence[Asked[Name]]
    decoding: Decoding | None
    shared: int

    def parts(self, size: int) -> list[Batch[Name]]:
        """The same in batches of at most so many prompts."""
        return [replace(self, prompts=self.prompts[i : i + size]) for i in range(0, len(self.prompts), size)]


def plan(requests: Mapping[Name, Sequence[Request]], batch_size: int) -> Iterator[Batch[Name]]:
    """Batches that hold every request once."""
    kinds: dict[Decoding | None, dict[Hashable, Asked[Name]]] = {}
    for name, own in requests.items():
        for index, request in enumerate(own):
            prompt = request.prompt
            same = kinds.setdefault(request.decoding if isinstance(request, Generating) else None, {})
            key = (tuple(prompt.context), tuple(prompt.question), prompt.repeat, prompt.watched)
            same.setdefault(key, Asked(prompt)).add((name, index), request)
    for decoding, same in kinds.items():
        alone: list[Asked[Name]] = []
        # A shared prefix saves prefill. Answers are many steps, each of which reads all weights for the rows of its batch: for
        # them a full batch is worth more than a prefix that fills none.
        least = 2 if decoding is None else min(batch_size, len(same))
        for run, shared in _sharing(list(same.values())):
            if len(run) < least:
                alone += run
            else:
                yield from _longest_first(run, decoding, shared, batch_size)
        yield from _longest_first(alone, decoding, 0, batch_size)


def _longest_first(
    run: Sequence[Asked[Name]], decoding: Decoding | None, shared: int, batch_size: int
) -> Iterator[Batch[Name]]:
    yield from Batch(sorted(run, key=lambda asked: -asked.prompt.tokens), decoding, shared).parts(batch_size)


def _sharing(prompts: Sequence[Asked[Name]]) -> Iterator[tuple[list[Asked[Name]], int]]:
    """Runs of prompts whose contexts begin alike, and how many tokens they share.

    At least one more follows in each: in this order a prompt comes before those that it is the beginning of.
    """
    run: list[Asked[Name]] = []
    shared = 0
    for asked in sorted(prompts, key=lambda asked: list(asked.prompt.context)):
        context = asked.prompt.context
        common = 0
        if run:
            common = min(shared, _common(run[-1].prompt.context, context))
        if common >= max(_MIN_SHARED, len(context) // 2):
            run.append(asked)
            shared = common
            continue
        if run:
            yield run, shared
        run, shared = [asked], len(context) - 1
    if run:
        yield run, shared


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many first tokens two sequences have in common."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))
