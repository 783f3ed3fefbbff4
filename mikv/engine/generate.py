"""Answers: every row is fed its question, then its own answer, token by token, through its compressed cache.

Sampling is counter-based: the random number of a step is a hash of seed, prompt, repetition and step. A prompt therefore
gets the same numbers alone and in any batch, and all policies of a panel get the same ones: where their distributions
agree they say the same, so that a difference between two answers is a difference between two caches.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from mikv.cache.compressed import CompressedCache
from mikv.engine.prefill import Forward
from mikv.engine.requests import Decoding, Generation, Prompt, Sampling
from mikv.randomness import number_of, uniform


def decode_answers(
    forward: Forward,
    cache: CompressedCache,
    prompts: Sequence[Prompt],
    policies: int,
    decoding: Decoding,
    end_tokens: Collection[int],
    watch: Callable[[float], None],
) -> list[list[Generation]]:
    """Feed every row until all have ended. The cache is used up: rows that have ended leave it.

    Args:
        forward: the model.
        cache: of the prompts' contexts, R = policies * prompts rows, a policy's next to each other.
        prompts, policies, decoding: what is asked, and by how many policies.
        end_tokens: ids that end an answer.
        watch: is told which share is done (0..1, of the steps that an answer of full length takes).

    Returns:
        By policy and prompt.
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
    chooser = _TokenChooser(decoding, [prompts[b] for _, b in rows])

    def finish() -> None:
        for row, usage, going_on in zip(rows, cache.usage(), active.tolist(), strict=True):
            if not going_on:
                done[row] = Generation(answers[row], ends[row], ended[row], compressed_tokens[row], usage, watched[row])

    step, steps = 0, decoding.max_new_tokens + max(len(prompt.question) for prompt in prompts)
    while active.any():
        watch(step / steps)
        fed = [_fed(prompts[b].question, answers[p, b], step, forward.pad_token) for p, b in rows]
        chosen = chooser(forward.step(cache, torch.tensor(fed), positions, active), step).tolist()
        for i in active.nonzero().squeeze(1).tolist():
            row = rows[i]
            if step < len(prompts[row[1]].question) - 1:
                continue  # the question goes on: what the model would have said does not matter
            if chosen[i] in end_tokens:
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


def _fed(question: Sequence[int], answer: Sequence[int], step: int, pad_token: int) -> int:
    """The token a row is fed: of its question, then the last of its answer (padding where there is none)."""
    if step < len(question):
        return question[step]
    return answer[-1] if answer else pad_token


class _TokenChooser:
    """Chooses the next token of each row; prompts: the one of each row."""

    def __init__(self, decoding: Decoding, prompts: Sequence[Prompt]) -> None:
        self._decoding, self._prompts = decoding, prompts
        numbers = [number_of([*prompt.context, *prompt.question]) * 1_000_003 + prompt.repeat for prompt in prompts]
        self._numbers = torch.tensor(numbers)
        self._question_steps = torch.tensor([len(prompt.question) - 1 for prompt in prompts])
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
        draws = uniform(self._numbers * 0x5851F42D4C957F2D + place * 0x2545F4914F6CDD1D + seed)
        chosen = choose(logits, decoding.sampling, draws)
        if self._seen is not None:
            answering = (place >= 0).nonzero().squeeze(1).to(logits.device)
            self._seen[answering, chosen[answering]] = True
        return chosen

    def take(self, rows: Tensor) -> None:
        """Go on with some rows (int64)."""
        self._numbers = self._numbers[rows]
        self._prompts = [self._prompts[i] for i in rows.tolist()]
        self._question_steps = self._question_steps[rows]
        if self._seen is not None:
            self._seen = self._seen[rows.to(self._seen.device)]


def penalized(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits [R, V] of tokens that were seen (bool [R, V]) are divided by the penalty, negative ones multiplied."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def choose(logits: Tensor, sampling: Sampling | None, draws: Tensor) -> Tensor:
    """The next token of each row, int64 [R].

    Args:
        logits: [R, V].
        sampling: None = the most probable token.
        draws: float64 [R], in 0..1; unused when greedy.
    """
    if sampling is None:
        return logits.argmax(dim=-1)
    probs, tokens = torch.softmax(logits.double() / sampling.temperature, dim=-1).sort(dim=-1, descending=True, stable=True)
    kept = torch.ones_like(probs, dtype=torch.bool)
    if sampling.top_k:
        kept[:, sampling.top_k :] = False
    # each filter works on what the one before it left, as transformers' do
    left = torch.where(kept, probs, 0)
    left = left / left.sum(dim=-1, keepdim=True)
    kept &= left.cumsum(dim=-1) - left < sampling.top_p
    kept &= probs >= sampling.min_p * probs[:, :1]
    cumulative = torch.where(kept, probs, 0).cumsum(dim=-1)
    place = torch.searchsorted(cumulative, draws[:, None].to(logits.device) * cumulative[:, -1:], right=True)
    last = kept.sum(dim=-1, keepdim=True) - 1  # a draw of almost 1 may round up to the sum
    return tokens.gather(-1, torch.minimum(place, last)).squeeze(-1)
