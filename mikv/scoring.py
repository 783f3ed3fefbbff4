"""Scores of given token sequences: what the engine's logits say of them, for all policies of a panel at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


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
