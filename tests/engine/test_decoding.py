"""How tokens are chosen: against transformers' own processors, and the same alone and in any batch."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from conftest import engine, model, prompt
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mikv.config import policy
from mikv.engine import Engine
from mikv.engine.generate import choose, penalized
from mikv.engine.requests import Decoding, Prompt, Sampling
from mikv.randomness import uniform

LOGITS = torch.randn((5, 300), generator=torch.Generator().manual_seed(0)) * 3
PANEL = [policy("full"), policy("h2o")]


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=0.3),
        Sampling(top_k=7),
        Sampling(temperature=2.0, top_p=0.6),
        Sampling(min_p=0.05),
        Sampling(temperature=1.5, top_k=20, top_p=0.8, min_p=0.02),
    ],
)
def test_sampling_follows_the_distribution_of_transformers(sampling: Sampling) -> None:
    scores = TemperatureLogitsWarper(sampling.temperature)(None, LOGITS)
    if sampling.top_k:
        scores = TopKLogitsWarper(sampling.top_k)(None, scores)
    scores = TopPLogitsWarper(sampling.top_p)(None, scores)
    if sampling.min_p:
        scores = MinPLogitsWarper(sampling.min_p)(None, scores)
    wanted = torch.softmax(scores.double(), dim=-1)
    draws = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000  # evenly spread: counts are probabilities
    for row in range(len(LOGITS)):
        chosen = choose(LOGITS[row].expand(len(draws), -1), sampling, draws)
        got = torch.bincount(chosen, minlength=300) / len(draws)
        assert (got - wanted[row]).abs().max() < 2e-4


def test_extreme_draws_choose_a_possible_token() -> None:
    draws = torch.tensor([0.0, 1 - 2**-53, 0.5, 0.0, 1.0], dtype=torch.float64)
    logits = torch.where(torch.arange(300) % 3 == 0, LOGITS, -torch.inf)
    chosen = choose(logits, Sampling(top_k=5), draws)
    assert all(logits[row, token] > -torch.inf for row, token in enumerate(chosen))
    assert all((logits[row] > logits[row, token]).sum() < 5 for row, token in enumerate(chosen))


def test_greedy_takes_the_most_probable() -> None:
    assert torch.equal(choose(LOGITS, None, torch.zeros(5)), LOGITS.argmax(-1))
    assert torch.equal(choose(LOGITS, Sampling(top_k=1), torch.rand(5).double()), LOGITS.argmax(-1))


def test_the_repetition_penalty_is_that_of_transformers() -> None:
    ids = torch.randint(0, 300, (5, 40), generator=torch.Generator().manual_seed(1))
    seen = torch.zeros_like(LOGITS, dtype=torch.bool).scatter_(1, ids, True)
    assert torch.equal(penalized(LOGITS, seen, 1.3), RepetitionPenaltyLogitsProcessor(1.3)(ids, LOGITS.clone()))


def test_repetition_penalty_while_answering_is_what_transformers_generates() -> None:
    asked = prompt(30)
    (got,) = engine().generate([asked], [policy("full")], Decoding(20, repetition_penalty=1.5))[0]
    stock = model(attention="eager")
    ids = torch.tensor([[*asked.context, *asked.question]])
    said = stock.generate(ids, max_new_tokens=20, do_sample=False, repetition_penalty=1.5, eos_token_id=None, pad_token_id=257)
    assert got.tokens == said[0, 30:].tolist()
    assert got.tokens != engine().generate([asked], [policy("full")], Decoding(20))[0][0].tokens


def test_the_penalty_forgets_nothing_and_counts_no_question_in_advance() -> None:
    """A hidden question is read token by token: what the model would have said meanwhile was never said."""
    visible, hidden = prompt(30), prompt(30, question=9)
    one, other = (
        engine().generate([p], [policy("full")], Decoding(15, repetition_penalty=1.5))[0][0] for p in (visible, hidden)
    )
    assert one.tokens == other.tokens


def test_sampled_answers_are_the_same_alone_and_in_a_batch_and_differ_by_seed_and_repeat() -> None:
    prompts = [prompt(30), prompt(21, seed=1, question=5), prompt(30, seed=2)]
    ways = Decoding(12, Sampling(seed=3))
    together = engine().generate(prompts, PANEL, ways)
    for b, one in enumerate(prompts):
        alone = engine().generate([one], PANEL, ways)
        assert [row[0].tokens for row in alone] == [row[b].tokens for row in together]
    other_seed = engine().generate(prompts, PANEL, Decoding(12, Sampling(seed=4)))
    again = [Prompt(p.context, p.question, repeat=1) for p in prompts]
    repeated = engine().generate(again, PANEL, ways)
    greedy = engine().generate(prompts, PANEL, Decoding(12))
    for other in (other_seed, repeated, greedy):
        assert all(a.tokens != b.tokens for a, b in zip(together[0], other[0], strict=True))
    hidden = [Prompt([*p.context, *p.question][:-7], [*p.context, *p.question][-7:]) for p in prompts]
    assert [g.tokens for g in engine().generate(hidden, PANEL[:1], ways)[0]] == [g.tokens for g in together[0]]


def test_draws_are_uniform_and_independent() -> None:
    steps = torch.arange(4000)
    rows = torch.stack([uniform(name * 0x5851F42D4C957F2D + steps * 0x2545F4914F6CDD1D + 7) for name in torch.arange(4)])
    assert rows.dtype == torch.float64
    assert 0 <= rows.min() < 0.002
    assert 0.998 < rows.max() < 1
    assert (torch.corrcoef(rows) - torch.eye(4)).abs().max() < 0.07
    assert torch.bincount((rows.flatten() * 16).long()).float().std() < 80  # 1000 expected in each of 16 bins


def test_draws_are_splitmix64s() -> None:
    """Its finalizer written out in Python's unbounded integers."""
    mask = 2**64 - 1
    for counter in (0, 1, -1, 12345, -(2**63), 2**63 - 1, 0x5851F42D4C957F2D):
        x = counter & mask
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        x ^= x >> 31
        assert uniform(torch.tensor([counter])).item() == (x >> 11) / 2**53


@dataclass(frozen=True)
class After:
    """Stops when a token was said a number of times."""

    token: int
    times: int = 1

    def __call__(self, tokens: list[int]) -> bool:
        return tokens.count(self.token) >= self.times


def test_a_stop_condition_ends_an_answer() -> None:
    (free,) = engine().generate([prompt(20)], [policy("full")], Decoding(10))[0]
    (got,) = engine().generate([prompt(20)], [policy("full")], Decoding(10, stop=After(free.tokens[4])))[0]
    assert (got.ended, got.end) == (True, None)
    assert got.tokens == free.tokens[: free.tokens.index(free.tokens[4]) + 1]  # what stopped it is part of it


def test_an_end_token_is_named() -> None:
    (free,) = engine().generate([prompt(20)], [policy("full")], Decoding(10))[0]
    (got,) = Engine(model(), {free.tokens[4]}, 257).generate([prompt(20)], [policy("full")], Decoding(10))[0]
    assert (got.ended, got.end) == (True, free.tokens[4])
    assert (free.ended, free.end) == (False, None)


@pytest.mark.parametrize(
    "options", [{"temperature": 0.0}, {"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}, {"min_p": -0.1}]
)
def test_impossible_sampling_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Sampling(**options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_new_tokens"):
        Decoding(0)
