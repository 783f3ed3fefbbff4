"""Log-probabilities of given token sequences: question and continuations are fed through the compressed caches.

One forward pass over prompt and continuation, as harnesses do it, would never read a compressed cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mikv.cache.compressed import CompressedCache
from mikv.engine.prefill import Forward
from mikv.engine.requests import Fidelity, Prompt, Scored, Scores

# At most so many continuations are fed at a time, each in a row of its own per policy.
_FORKS = 16


def score_continuations(
    forward: Forward,
    cache: CompressedCache,
    prompts: Sequence[Prompt],
    wanted: Sequence[Sequence[Sequence[int]]],
    policies: int,
    watch: Callable[[float], None],
) -> list[list[Scores]]:
    """Feed every row its question. Where one has been read, fork its row for those of its continuations that have more than one
    token, and feed these, before the others go on with their questions. The cache is used up: no row is held twice.

    Args:
        forward: the model.
        cache: of the prompts' contexts, R = policies * prompts rows, a policy's next to each other.
        prompts, policies: what is asked, and by how many policies.
        wanted: of each prompt its continuations.
        watch: is told which share is done (0..1, of the tokens to be fed).

    Returns:
        By policy and prompt.
    """
    batch = len(prompts)
    of_rows = cache.usage()
    compressed_tokens, usages = [usage.compressed_tokens for usage in of_rows], list(of_rows)
    owners = [b for b, continuations in enumerate(wanted) for _ in continuations]
    tally = Tally(policies, [tokens for continuations in wanted for tokens in continuations], forward.model.device)
    count = _Count(sum(len(prompt.question) for prompt in prompts) + sum(len(tokens) - 1 for tokens in tally.tokens), watch)
    reading = list(range(batch))  # prompts whose question goes on
    step = 0
    while reading:
        count.add(len(reading))
        fed = torch.tensor([prompts[b].question[step] for b in reading])
        positions = torch.tensor([len(prompts[b].context) + step for b in reading])
        active = torch.ones(policies * len(reading), dtype=torch.bool)
        logits = forward.step(cache, fed.repeat(policies), positions.repeat(policies), active).unflatten(0, (policies, -1))
        step += 1
        read = [b for b in reading if len(prompts[b].question) == step]
        if not read:
            continue
        place = {b: i for i, b in enumerate(reading)}
        of_rows = cache.usage()
        for p in range(policies):
            for b in read:
                usages[p * batch + b] = of_rows[p * len(reading) + place[b]]
        mine = torch.tensor([i for i, b in enumerate(owners) if b in read])
        for some in mine.split(_FORKS):
            tally.add(logits[:, [place[owners[i]] for i in some.tolist()]], some, 0)
        going_on = [b for b in reading if b not in read]
        part = _taken_out(cache, [place[b] for b in read], [place[b] for b in going_on], policies)
        starts = {b: (i, prompts[b].tokens) for i, b in enumerate(read)}
        _feed(forward, part, {i: starts[owners[i]] for i in mine.tolist()}, len(read), policies, tally, count)
        reading = going_on
    results = []
    for p, scored in enumerate(tally.result()):
        left = iter(scored)
        rows = enumerate(range(p * batch, (p + 1) * batch))
        results.append([Scores([next(left) for _ in wanted[b]], compressed_tokens[r], usages[r]) for b, r in rows])
    return results


class _Count:
    """Reports to `watch` how much of `total` has been begun."""

    def __init__(self, total: int, watch: Callable[[float], None]) -> None:
        self._total, self._watch, self._done = total, watch, 0

    def add(self, number: int) -> None:
        self._watch(self._done / self._total)
        self._done += number


def _rows(policies: int, prompts: int, some: Sequence[int]) -> Tensor:
    """Rows (int64) of some of the prompts, for every policy."""
    return (torch.arange(policies)[:, None] * prompts + torch.tensor(some)).flatten()


def _taken_out(cache: CompressedCache, some: Sequence[int], others: Sequence[int], policies: int) -> CompressedCache:
    """A cache of some of the prompts; `cache` goes on with the others (where there are any: else it is the one returned)."""
    prompts = len(some) + len(others)
    if not others:
        return cache
    part = cache.fork(_rows(policies, prompts, some))
    cache.batch_select_indices(_rows(policies, prompts, others))
    return part


def _feed(
    forward: Forward,
    cache: CompressedCache,
    starts: dict[int, tuple[int, int]],
    prompts: int,
    policies: int,
    tally: Tally,
    count: _Count,
) -> None:
    """Feed the continuations that have more than one token, each in a row of its own per policy. The cache is used up.

    starts: of each continuation the prompt, by its place in the cache, and the position of its first token.
    """
    longer = sorted((i for i in starts if len(tally.tokens[i]) > 1), key=lambda i: -len(tally.tokens[i]))
    for begin in range(0, len(longer), _FORKS):
        some = longer[begin : begin + _FORKS]  # the longest first: those of like length end together
        rows = _rows(policies, prompts, [starts[i][0] for i in some])
        if begin + _FORKS < len(longer):
            part = cache.fork(rows)
        else:  # the other rows are not needed any more
            cache.batch_select_indices(rows)
            part = cache
        positions = torch.tensor([starts[i][1] for i in some])
        lengths = torch.tensor([len(tally.tokens[i]) for i in some])
        for step in range(1, int(lengths[0])):
            active = step < lengths
            going_on = int(active.sum())
            count.add(going_on)
            if going_on <= len(some) // 2:
                part.batch_select_indices(_rows(policies, len(some), range(going_on)))
                some = some[:going_on]
                lengths, positions, active = (x[:going_on] for x in (lengths, positions, active))
            fed = [tally.tokens[i][step - 1] if step < len(tally.tokens[i]) else forward.pad_token for i in some]
            logits = forward.step(
                part, torch.tensor(fed).repeat(policies), (positions + step - 1).repeat(policies), active.repeat(policies)
            )
            tally.add(logits.unflatten(0, (policies, -1))[:, :going_on], torch.tensor(some[:going_on]), step)


class Tally:
    """Adds up what is asked of continuations, token by token, for all policies; the first one is the others' baseline.

    Args:
        policies: P.
        tokens: ids of each continuation.
        device: of the logits.
    """

    def __init__(self, policies: int, tokens: Sequence[Sequence[int]], device: torch.device) -> None:
        self.tokens = tokens
        # they stay on the model's device until the result: a look at each step would make a GPU wait
        shape = (policies, len(tokens))
        self._logprob, self._kl, self._same = (torch.zeros(shape, dtype=torch.float64, device=device) for _ in range(3))
        self._greedy = torch.ones(shape, dtype=torch.bool, device=device)

    def add(self, logits: Tensor, some: Tensor, step: int) -> None:
        """Token `step` of continuations `some` (int64 [n]), predicted by logits [P, n, vocabulary]."""
        target = torch.tensor([self.tokens[i][step] for i in some.tolist()], device=logits.device)
        some = some.to(logits.device)
        baseline: Tensor | None = None
        for p, mine in enumerate(logits):  # one policy at a time: vocabularies are large
            log_probs = torch.log_softmax(mine.float(), dim=-1)
            baseline = log_probs if baseline is None else baseline
            best = log_probs.argmax(dim=-1)
            self._logprob[p, some] += log_probs.gather(-1, target[:, None]).squeeze(-1).double()
            self._greedy[p, some] &= best == target
            self._kl[p, some] += (baseline.exp() * (baseline - log_probs)).sum(dim=-1).double()
            self._same[p, some] += (best == baseline.argmax(dim=-1)).double()

    def result(self) -> list[list[Scored]]:
        """By policy and continuation."""
        counts = [len(tokens) for tokens in self.tokens]
        lengths = torch.tensor(counts, device=self._kl.device)
        columns = zip(
            self._logprob.tolist(),
            self._greedy.tolist(),
            (self._kl / lengths).clamp(min=0).tolist(),  # rounding can leave a KL just below 0
            (self._same / lengths).tolist(),
            ((self._logprob[0] - self._logprob) / lengths).tolist(),
            strict=True,
        )
        return [
            [Scored(n, logprob, greedy, Fidelity(*rest)) for n, logprob, greedy, *rest in zip(counts, *of_policy, strict=True)]
            for of_policy in columns
        ]
