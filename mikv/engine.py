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
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mikv.cache.backend import Backend, decide
from mikv.cache.compressed import CompressedCache, Usage, Workspace
from mikv.cache.prefill import PrefillCache, PrefillState
from mikv.decoding import Decoding, choose, penalized
from mikv.importance.base import Observer
from mikv.kernels.verify import verify
from mikv.models.architecture import geometry, layer_devices, output_projection, rope_inv_freq
from mikv.policy import Policy
from mikv.randomness import uniform
from mikv.rope import Rope
from mikv.scoring import Fidelity, Scored, Tally
from mikv.types import Lengths

# At most so many continuations are fed at a time, each in a row of its own per policy.
_FORKS = 16


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


@dataclass(frozen=True)
class Scoring:
    """A prompt, and token sequences (each at least one) whose log-probabilities after it are wanted."""

    prompt: Prompt
    continuations: Sequence[Sequence[int]]

    def __post_init__(self) -> None:
        if not self.continuations or not all(self.continuations):
            raise ValueError("nothing to score: each continuation needs at least one token")


@dataclass(frozen=True)
class Scores:
    """The continuations of one prompt under one policy.

    usage: of the cache when the question has been fed; compressed_tokens: see Generation.
    """

    continuations: list[Scored]
    compressed_tokens: float
    usage: Usage


@dataclass(frozen=True)
class Generation:
    """An answer of one policy to one prompt.

    tokens: without the end token; end: the end token, or None where something else ended the answer; ended: by an end token
    or the stop condition, not by the limit; usage: of the cache at the end of the answer; compressed_tokens: how many tokens
    of the context were not at 16 bits when the first token was fed through the compressed cache (0 = the policy was not
    exercised); watched_tiers: share of the prompt's watched tokens by the bits at which they were held then ("0" = evicted),
    mean over layers and heads; fidelity: on the first policy's answer, where that was asked for.
    """

    tokens: list[int]
    end: int | None
    ended: bool
    compressed_tokens: float
    usage: Usage
    watched_tiers: dict[str, float] = field(default_factory=dict)
    fidelity: Fidelity | None = None


@dataclass
class Seconds:
    """Time spent by phase, for all policies of a panel together: they share one prefill and one decode. fidelity: feeding
    the full cache's answers through every cache."""

    prefill: float = 0.0
    compress: float = 0.0
    decode: float = 0.0
    fidelity: float = 0.0


# What share of a batch's work its phases are, roughly: for whoever watches.
_PREFILLED, _DECODED = 0.3, 0.7


@dataclass
class Engine:
    """A model of transformers with the project's attention (`attn_implementation="mikv"`), and how to run it.

    Args:
        model: the causal LM.
        end_tokens: ids that end an answer.
        pad_token: id for padding; never attended.
        reader, attention: how compressed caches are read, see mikv.cache.backend.
        watch: is told, again and again while a batch is served, which share of its work is done (0..1, an estimate).
    """

    model: Any
    end_tokens: Collection[int]
    pad_token: int = 0
    reader: str | None = None
    attention: str | None = None
    seconds: Seconds = field(default_factory=Seconds)
    watch: Callable[[float], None] = lambda _: None

    def __post_init__(self) -> None:
        self.geometry = geometry(self.model.config)
        self._devices = layer_devices(self.model)
        self._workspace = Workspace()
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
            tiers = {(tier.k, tier.v) for policy in read for tier in policy.tiers if not tier.evicted}
            heads = (shape.query_heads, shape.kv_heads, shape.head_dim)
            verify(sorted(tiers | {(16, 16)}), *heads, self.model.dtype, self.model.device)

    @torch.inference_mode()
    def prefill(self, contexts: Sequence[Sequence[int]], observers: Collection[Observer] = (), shared: int = 0) -> PrefillState:
        """One exact forward pass over the contexts, left-padded. Empty contexts are allowed.

        shared: so many first tokens are the same in all contexts, and none of them ends there. They are prefilled once,
        also for the next calls with the same ones.
        """
        lengths = Lengths(torch.tensor([len(c) for c in contexts]), max(map(len, contexts)))
        shared = min([shared, *(min(map(len, contexts)) - o.last for o in observers if o.last is not None)])
        shared = max(0, shared)  # the queries that an observer asks for are not in the prefix
        prefix = self._shared_prefix(contexts[0][:shared], frozenset(observers)) if shared else None
        cache = PrefillCache(
            self.geometry, self._devices, self.model.dtype, lengths, list(observers), prefix, self.backend.kernels
        )
        if lengths.width:
            ids = [[self.pad_token] * (lengths.width - len(c)) + list(c[shared:]) for c in contexts]
            positions = lengths.positions(self.model.device)[:, shared:]
            self.model(
                input_ids=torch.tensor(ids, device=self.model.device),
                attention_mask=(positions >= shared).long(),
                position_ids=positions.clamp(min=0),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        self.watch(_PREFILLED)
        inv_freq = rope_inv_freq(self.model)
        rope = None if inv_freq is None else Rope(inv_freq)
        projection = partial(output_projection, self.model)
        return cache.state(torch.tensor([_name(context) for context in contexts]), rope, projection)

    def forget_prefix(self) -> None:
        """Let go of the last shared prefix: nothing more is to come that begins with it."""
        self._prefix = None

    def release(self) -> None:
        """Let go of all memory that is kept for the next batch: a smaller one is to be tried."""
        self._prefix, self._workspace = None, Workspace()

    def _shared_prefix(self, tokens: Sequence[int], observers: frozenset[Observer]) -> PrefillState:
        key = (tuple(tokens), observers)
        if self._prefix is None or self._prefix[0] != key:
            self._prefix = None  # first the old one goes
            self._prefix = (key, self.prefill([tokens], observers))
        return self._prefix[1]

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
    def generate(
        self,
        prompts: Sequence[Prompt],
        panel: Sequence[Policy],
        decoding: Decoding,
        shared: int = 0,
        fidelity: bool = False,
    ) -> list[list[Generation]]:
        """Answers: for each policy of the panel, one per prompt.

        shared: first tokens that all contexts have in common, see `prefill`. fidelity: feed the answers of the panel's first
        policy, end tokens included, through the others' caches as well.
        """
        with self._timed("prefill"):
            state = self._prefill_for(prompts, panel, shared)
        with self._timed("compress"):
            cache = self._compress_for(state, prompts, panel)
        if not fidelity:
            del state  # its exact keys and values are not needed while decoding
        with self._timed("decode"):
            answers = self._decode(cache, prompts, len(panel), decoding, _DECODED if fidelity else 1.0)
        if not fidelity:
            return answers
        with self._timed("fidelity"):  # the first cache is used up: one packed cache at a time
            said = [[[*full.tokens, *([] if full.end is None else [full.end])]] for full in answers[0]]
            cache = self._compress_for(state, prompts, panel)
            del state
            scores = self._score(cache, prompts, said, len(panel), _DECODED)
        return [
            [replace(g, fidelity=s.continuations[0].fidelity) for g, s in zip(of_policy, scored, strict=True)]
            for of_policy, scored in zip(answers, scores, strict=True)
        ]

    @torch.inference_mode()
    def score(self, scorings: Sequence[Scoring], panel: Sequence[Policy], shared: int = 0) -> list[list[Scores]]:
        """Log-probabilities of continuations: for each policy of the panel, one result per prompt.

        In two phases: the context is prefilled and compressed, then question and continuation are fed through the
        compressed cache. (One forward pass over both, as harnesses do it, would never read the compressed cache.)
        """
        prompts = [scoring.prompt for scoring in scorings]
        wanted = [scoring.continuations for scoring in scorings]
        with self._timed("prefill"):
            state = self._prefill_for(prompts, panel, shared)
        with self._timed("compress"):
            cache = self._compress_for(state, prompts, panel)
        del state  # its exact keys and values are not needed any more
        with self._timed("decode"):
            return self._score(cache, prompts, wanted, len(panel), _PREFILLED)

    def _prefill_for(self, prompts: Sequence[Prompt], panel: Sequence[Policy], shared: int) -> PrefillState:
        watched = {p.importance.observer for p in panel if p.importance is not None and p.importance.observer is not None}
        return self.prefill([prompt.context for prompt in prompts], watched, shared)

    def _compress_for(self, state: PrefillState, prompts: Sequence[Prompt], panel: Sequence[Policy]) -> CompressedCache:
        # a held-back last token belongs to the prompt; a hidden question is not known when budgets are fixed
        lengths = [p.tokens if len(p.question) == 1 else len(p.context) for p in prompts]
        return self.compress(state, panel, torch.tensor(lengths), self._workspace)

    def _decode(
        self, cache: CompressedCache, prompts: Sequence[Prompt], policies: int, decoding: Decoding, share: float
    ) -> list[list[Generation]]:
        """Feed every row its question, then its own answer, one token a step, until all rows have ended. The cache is used up.

        share: of the batch's work that is done then.
        """
        rows = [(p, b) for p in range(policies) for b in range(len(prompts))]
        compressed_tokens = dict(zip(rows, (usage.compressed_tokens for usage in cache.usage()), strict=True))
        begin, end = torch.tensor([prompts[b].watched for _, b in rows]).unbind(1)
        watched = dict(zip(rows, cache.tiers(begin, end), strict=True))
        answers: dict[tuple[int, int], list[int]] = {row: [] for row in rows}
        ends: dict[tuple[int, int], int | None] = dict.fromkeys(rows)
        ended = dict.fromkeys(rows, False)
        done: dict[tuple[int, int], Generation] = {}
        positions = torch.tensor([len(prompts[b].context) for _, b in rows])
        active = torch.ones(len(rows), dtype=torch.bool)
        chooser = _TokenChooser(decoding, prompts, rows)

        def finish() -> None:
            for row, usage, going_on in zip(rows, cache.usage(), active.tolist(), strict=True):
                if not going_on:
                    done[row] = Generation(answers[row], ends[row], ended[row], compressed_tokens[row], usage, watched[row])

        step, steps = 0, decoding.max_new_tokens + max(len(prompt.question) for prompt in prompts)
        while active.any():
            self.watch(_PREFILLED + (share - _PREFILLED) * step / steps)
            fed = [self._fed(prompts[row[1]].question, answers[row], step) for row in rows]
            chosen = chooser(self.step(cache, torch.tensor(fed), positions, active), step).tolist()
            for i in active.nonzero().squeeze(1).tolist():
                row = rows[i]
                if step < len(prompts[row[1]].question) - 1:
                    continue  # the question goes on: what the model would have said does not matter
                if chosen[i] in self.end_tokens:
                    ended[row], ends[row] = True, chosen[i]
                else:
                    answers[row].append(chosen[i])
                    ended[row] = decoding.stop is not None and decoding.stop(answers[row])
                active[i] = not ended[row] and len(answers[row]) < decoding.max_new_tokens
            positions = positions + 1
            step += 1
            if active.sum() <= len(rows) // 2:
                finish()
                going_on = active.nonzero().squeeze(1)
                cache.batch_select_indices(going_on)
                chooser.take(going_on)
                rows = [rows[i] for i in going_on.tolist()]
                positions, active = positions[going_on], active[going_on]
        return [[done[p, b] for b in range(len(prompts))] for p in range(policies)]

    def _fed(self, question: Sequence[int], answer: Sequence[int], step: int) -> int:
        """The token a row is fed: of its question, then the last of its answer (padding where there is none)."""
        if step < len(question):
            return question[step]
        return answer[-1] if answer else self.pad_token

    def _score(
        self,
        cache: CompressedCache,
        prompts: Sequence[Prompt],
        wanted: Sequence[Sequence[Sequence[int]]],
        policies: int,
        begun: float,
    ) -> list[list[Scores]]:
        """Feed every row its question, then fork it for the continuations that have more than one token and feed these.

        No row may wait for another's question (all rows of a cache grow together), so each length of question is a batch. The
        cache is used up. begun: which share of the batch's work is done.
        """
        batch = len(prompts)
        by_length: dict[int, list[int]] = {}
        for b, prompt in enumerate(prompts):
            by_length.setdefault(len(prompt.question), []).append(b)
        if len(by_length) > 1:
            merged: list[dict[int, Scores]] = [{} for _ in range(policies)]
            left = list(range(batch))
            for number, members in enumerate(by_length.values()):
                part = self._taken_out(cache, left, members, policies)
                left = [b for b in left if b not in members]
                done = begun + (1 - begun) * number / len(by_length)
                mine, theirs = [prompts[b] for b in members], [wanted[b] for b in members]
                scored = self._score(part, mine, theirs, policies, done)
                for of_policy, scores in zip(merged, scored, strict=True):
                    of_policy.update(zip(members, scores, strict=True))
            return [[of_policy[b] for b in range(batch)] for of_policy in merged]
        compressed_tokens = [usage.compressed_tokens for usage in cache.usage()]
        logits = self._read_questions(cache, prompts, policies)
        usages = cache.usage()
        flat = [(b, tokens) for b, continuations in enumerate(wanted) for tokens in continuations]
        tally = Tally(policies, [tokens for _, tokens in flat], logits.device)
        owner = torch.tensor([b for b, _ in flat])
        for some in torch.arange(len(flat)).split(_FORKS):
            tally.add(logits.unflatten(0, (policies, batch))[:, owner[some].to(logits.device)], some, 0)
        # the longest first: those of like length end together
        longer = sorted((i for i, (_, tokens) in enumerate(flat) if len(tokens) > 1), key=lambda i: -len(flat[i][1]))
        for start in range(0, len(longer), _FORKS):
            some = torch.tensor(longer[start : start + _FORKS])
            rows = (torch.arange(policies)[:, None] * batch + owner[some]).flatten()
            part = self._cut(cache, rows, last=start + _FORKS >= len(longer))
            starts = torch.tensor([prompts[b].tokens for b in owner[some].tolist()])
            share = (1 - begun) / len(longer)
            self._feed(part, starts, policies, some, tally, begun + share * start, share * len(some))
        return _by_prompt(tally.result(), owner, compressed_tokens, usages, batch)

    @staticmethod
    def _taken_out(cache: CompressedCache, held: Sequence[int], members: Sequence[int], policies: int) -> CompressedCache:
        """A cache of some of the prompts that `cache` holds, which goes on with the others: no row is held twice."""
        if list(members) == list(held):
            return cache
        first = torch.arange(policies)[:, None] * len(held)
        mine = torch.tensor([i for i, b in enumerate(held) if b in members])
        rest = torch.tensor([i for i, b in enumerate(held) if b not in members])
        part = cache.fork((first + mine).flatten())
        cache.batch_select_indices((first + rest).flatten())
        return part

    @staticmethod
    def _cut(cache: CompressedCache, rows: Tensor, last: bool) -> CompressedCache:
        """A cache of some rows: a fork, or the cache itself where nobody asks for the others any more."""
        if not last:
            return cache.fork(rows)
        cache.batch_select_indices(rows)
        return cache

    def _read_questions(self, cache: CompressedCache, prompts: Sequence[Prompt], policies: int) -> Tensor:
        """Feed all rows their questions, of one length. Returns the logits that follow, [R, vocabulary]."""
        questions = torch.tensor([prompt.question for prompt in prompts]).repeat(policies, 1)
        positions = torch.tensor([len(prompt.context) for prompt in prompts]).repeat(policies)
        everyone = torch.ones(len(questions), dtype=torch.bool)
        for step, fed in enumerate(questions.T):
            logits = self.step(cache, fed, positions + step, everyone)
        return logits

    def _feed(
        self,
        cache: CompressedCache,
        starts: Tensor,
        policies: int,
        some: Tensor,
        tally: Tally,
        begun: float,
        share: float,
    ) -> None:
        """Feed continuations `some` (int64 [n], the longest first), each in a row of its own per policy, from position `starts`
        (int64 [n]) on. The cache is used up. begun, share: of the batch's work, before and by this."""
        lengths = torch.tensor([len(tally.tokens[i]) for i in some.tolist()])
        longest = int(lengths[0])
        for step in range(1, longest):
            self.watch(begun + share * step / longest)
            n = len(some)
            active = step < lengths
            going_on = int(active.sum())
            if going_on <= n // 2:
                cache.batch_select_indices((torch.arange(policies)[:, None] * n + torch.arange(going_on)).flatten())
                some, lengths, starts, active, n = *(x[:going_on] for x in (some, lengths, starts, active)), going_on
            fed = torch.tensor(
                [tally.tokens[i][step - 1] if step < len(tally.tokens[i]) else self.pad_token for i in some.tolist()]
            )
            logits = self.step(cache, fed.repeat(policies), (starts + step - 1).repeat(policies), active.repeat(policies))
            tally.add(logits.unflatten(0, (policies, n))[:, :going_on], some[:going_on], step)

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

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        started = self._clock()
        yield
        setattr(self.seconds, phase, getattr(self.seconds, phase) + self._clock() - started)

    def _clock(self) -> float:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def _by_prompt(
    scored: Sequence[Sequence[Scored]], owner: Tensor, compressed_tokens: Sequence[float], usages: Sequence[Usage], batch: int
) -> list[list[Scores]]:
    """Scores by policy and prompt, from those by policy and continuation; owner int64: the prompt of each continuation."""
    results = []
    for p, of_policy in enumerate(scored):
        per_prompt: list[list[Scored]] = [[] for _ in range(batch)]
        for b, one in zip(owner.tolist(), of_policy, strict=True):
            per_prompt[b].append(one)
        rows = range(p * batch, (p + 1) * batch)
        results.append([Scores(per_prompt[b], compressed_tokens[r], usages[r]) for b, r in enumerate(rows)])
    return results


class _TokenChooser:
    """Chooses the next token of each row; a row is a (policy, prompt)."""

    def __init__(self, decoding: Decoding, prompts: Sequence[Prompt], rows: Sequence[tuple[int, int]]) -> None:
        self._decoding = decoding
        names = [_name([*prompt.context, *prompt.question]) * 1_000_003 + prompt.repeat for prompt in prompts]
        self._names = torch.tensor([names[b] for _, b in rows])
        self._prompts = [prompts[b] for _, b in rows]
        self._question_steps = torch.tensor([len(prompt.question) - 1 for prompt in self._prompts])
        self._seen: Tensor | None = None

    def __call__(self, logits: Tensor, step: int) -> Tensor:
        """The tokens that follow at a step, int64 [R]; of rows that are still reading their question: anything."""
        decoding = self._decoding
        place = step - self._question_steps  # in the answer
        if decoding.repetition_penalty != 1:
            if self._seen is None:
                self._seen = torch.zeros_like(logits, dtype=torch.bool)
                for row, prompt in enumerate(self._prompts):
                    self._seen[row, [*prompt.context, *prompt.question]] = True
            logits = penalized(logits, self._seen, decoding.repetition_penalty)
        seed = 0 if decoding.sampling is None else decoding.sampling.seed
        draws = uniform(self._names * 0x5851F42D4C957F2D + place * 0x2545F4914F6CDD1D + seed)
        chosen = choose(logits, decoding.sampling, draws)
        if self._seen is not None:
            answering = (place >= 0).nonzero().squeeze(1).to(logits.device)
            self._seen[answering, chosen[answering]] = True
        return chosen

    def take(self, rows: Tensor) -> None:
        """Go on with some rows (int64)."""
        self._names = self._names[rows]
        self._prompts = [self._prompts[i] for i in rows.tolist()]
        self._question_steps = self._question_steps[rows]
        if self._seen is not None:
            self._seen = self._seen[rows.to(self._seen.device)]


def _name(tokens: Sequence[int]) -> int:
    """A number that names a token sequence."""
    return zlib.crc32(array("q", tokens).tobytes())
