"""Log-likelihoods under compression, and fidelity to the full cache: two phases, and nothing of the full cache leaks in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from conftest import POLICIES, engine, model, prompt, tokens
from rounding import assert_scores_alike

from mikv.config import policy
from mikv.engine import Engine
from mikv.engine.requests import Decoding, Prompt, Scoring
from mikv.policy import Policy

PANEL = [policy("full"), policy("mikv"), policy("h2o"), policy("uniform", {"tier.bits": 2}), policy("streaming_llm")]


def scoring(length: int, continuations: Sequence[int], seed: int = 0, question: int = 1) -> Scoring:
    """A random prompt and random continuations of the given lengths."""
    wanted = [tokens(n, seed=100 + 17 * seed + i) for i, n in enumerate(continuations)]
    return Scoring(prompt(length, seed, question), wanted)


def stock_logprobs(asked: Scoring, **shape: int) -> list[tuple[float, bool]]:
    """What one forward pass of the stock model says about each continuation."""
    stock = model(attention="eager", **shape)
    before = [*asked.prompt.context, *asked.prompt.question]
    result = []
    for continuation in asked.continuations:
        with torch.inference_mode():
            logits = stock(torch.tensor([[*before, *continuation]])).logits[0, len(before) - 1 : -1]
        log_probs = torch.log_softmax(logits.float(), dim=-1)
        wanted = torch.tensor(continuation)
        logprob = log_probs.gather(-1, wanted[:, None]).sum().item()
        result.append((logprob, bool((log_probs.argmax(-1) == wanted).all())))
    return result


@pytest.mark.parametrize(("query_heads", "kv_heads"), [(4, 4), (6, 2), (4, 1), (8, 1)])
@pytest.mark.parametrize("question", [1, 7])
def test_the_full_cache_scores_like_the_stock_model(query_heads: int, kv_heads: int, question: int) -> None:
    shape = {"query_heads": query_heads, "kv_heads": kv_heads, "hidden_size": 16 * query_heads}
    asked = [scoring(33, [1, 5, 2, 1]), scoring(12, [3], seed=1, question=question), scoring(27, [1, 1, 9], seed=2)]
    stock = Engine(model(**shape), frozenset(), 257)
    for mine, one in zip(stock.score(asked, [policy("full")])[0], asked, strict=True):
        for scored, (logprob, greedy) in zip(mine.continuations, stock_logprobs(one, **shape), strict=True):
            # the 16-bit tier of a float32 model stores float16
            assert scored.logprob == pytest.approx(logprob, abs=0.02)
            assert scored.greedy == greedy


def test_a_greedy_continuation_is_recognized() -> None:
    run, asked = engine(), prompt(30)
    said = run.generate([asked], [policy("full")], Decoding(6))[0][0].tokens
    other = [*said[:5], (said[5] + 1) % 256]
    (scores,) = run.score([Scoring(asked, [said, other, said[:1]])], [policy("full")])[0]
    assert [scored.greedy for scored in scores.continuations] == [True, False, True]


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "full"])
def test_the_first_scored_token_feels_the_compressed_cache(name: str) -> None:
    """The hole of one-forward scoring: the logits of even a one-token continuation must move under an absurd policy."""
    lossy = {
        "uniform": {"tier.bits": 2},
        "mikv": {"keep": 0.0, "low.bits": 2},
        "kvarn": {"tier.bits": 2, "tile": 16, "sinks": 0},
        "kvtuner": {"rest.bits": 2},
        "kivi": {"residual": 32},
        "hf_quantized": {"bits": 2},
        "turboquant": {"preset": "3bit_nc", "boundary": 0},
    }.get(name, {"keep": 0.1})
    exact, compressed = (
        s[0].continuations[0] for s in engine().score([scoring(60, [1])], [policy("full"), policy(name, lossy)])
    )
    assert abs(exact.logprob - compressed.logprob) > 1e-3
    assert compressed.fidelity.kl > 1e-4
    assert compressed.fidelity.nll_change == pytest.approx(exact.logprob - compressed.logprob, abs=1e-5)


def test_a_batch_is_its_rows_one_by_one(any_policy: Policy) -> None:
    run, panel = engine(), [policy("full"), any_policy]
    asked = [scoring(41, [1, 4]), scoring(17, [6, 1, 2], seed=1, question=5), scoring(1, [3], seed=2), scoring(30, [1], seed=3)]
    together = run.score(asked, panel)
    alone = [run.score([one], panel) for one in asked]
    for p in range(len(panel)):
        assert_scores_alike(together[p], [one[p][0] for one in alone])


def test_a_panel_is_its_policies_alone(any_policy: Policy) -> None:
    run, asked = engine(), [scoring(41, [1, 4, 3]), scoring(29, [2], seed=1), scoring(35, [5, 1], seed=2)]
    together = run.score(asked, [*PANEL, any_policy])[-1]
    assert_scores_alike(together, run.score(asked, [policy("full"), any_policy])[1])


def test_many_continuations_are_each_one_alone(any_policy: Policy) -> None:
    """Forks share the prefill, the compression and the question, and nothing else."""
    run, panel = engine(), [policy("full"), any_policy]
    asked = scoring(37, [*range(1, 20), *range(19, 0, -1)])  # more than fit one set of forks
    together = run.score([asked], panel)
    alone = [run.score([Scoring(asked.prompt, [continuation])], panel) for continuation in asked.continuations]
    for p, (many,) in enumerate(together):
        each = [replace(many, continuations=many.continuations[i : i + 1]) for i in range(len(alone))]
        assert_scores_alike(each, [one[p][0] for one in alone])


def test_both_readers_score_alike(any_policy: Policy) -> None:
    asked, panel = [scoring(41, [1, 4, 3]), scoring(29, [2], seed=1)], [policy("full"), any_policy]
    assert engine("working").score(asked, panel) == engine("packed").score(asked, panel)


def test_scores_are_those_of_decoding_step_by_step(any_policy: Policy) -> None:
    """The slow and obvious way: feed one row token by token and read the logits."""
    asked, run = scoring(31, [5]), engine()
    (continuation,) = asked.continuations
    observers = any_policy.observers
    logits: dict[str, list[torch.Tensor]] = {}
    for one in (policy("full"), any_policy):
        cache = run.compress(run.prefill([asked.prompt.context], observers), [one], torch.tensor([31]))
        logits[one.label] = [
            torch.log_softmax(
                run.step(cache, torch.tensor([fed]), torch.tensor([30 + i]), torch.tensor([True]))[0].double(), -1
            )
            for i, fed in enumerate([*asked.prompt.question, *continuation[:-1]])
        ]
    full, mine = logits["full"], logits[any_policy.label]
    got = run.score([asked], [policy("full"), any_policy])[1][0].continuations[0]
    assert got.logprob == pytest.approx(sum(m[t].item() for m, t in zip(mine, continuation, strict=True)), abs=1e-3)
    kl = [(f.exp() * (f - m)).sum().item() for f, m in zip(full, mine, strict=True)]
    assert got.fidelity.kl == pytest.approx(sum(kl) / 5, abs=1e-4)
    agree = [(f.argmax() == m.argmax()).item() for f, m in zip(full, mine, strict=True)]
    assert got.fidelity.agreement == pytest.approx(sum(agree) / 5)


def test_the_full_caches_own_answer_is_what_fidelity_is_measured_on(any_policy: Policy) -> None:
    """For generation: the full cache's answer, end token included, is scored for every policy."""
    prompts, panel = [prompt(40), prompt(23, seed=1, question=4)], [policy("full"), any_policy]
    free = engine().generate(prompts, [policy("full")], Decoding(6))[0]
    ending = Engine(model(), {free[0].tokens[3]}, 257)  # one answer ends early, the other at the limit
    answers = ending.generate(prompts, panel, Decoding(6), fidelity=True)
    said = [[*a.tokens, a.end] if a.end is not None else a.tokens for a in answers[0]]
    assert len(said[0]) <= 4
    scored = ending.score([Scoring(p, [s]) for p, s in zip(prompts, said, strict=True)], panel)
    for of_policy, scores in zip(answers, scored, strict=True):
        for answer, score in zip(of_policy, scores, strict=True):
            assert answer.fidelity == score.continuations[0].fidelity
    assert all(a.fidelity == (0, 1, 0) for a in answers[0])
    plain = ending.generate(prompts, panel, Decoding(6))
    assert [[a.tokens for a in row] for row in plain] == [[a.tokens for a in row] for row in answers]
    assert all(a.fidelity is None for row in plain for a in row)


def test_nothing_to_score_is_refused() -> None:
    for continuations in ([], [[]], [[1], []]):
        with pytest.raises(ValueError, match="at least one token"):
            Scoring(Prompt([1], [2]), continuations)


@pytest.mark.parametrize("lengths", [(40, 40), (31, 45, 32), (90,)])
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_a_shared_prefix_changes_nothing(lengths: tuple[int, ...], architecture: str) -> None:
    """Prefilled once and forked, or in each prompt anew: the same state, up to rounding."""
    shared = tokens(30, seed=9)
    contexts = [[*shared, *tokens(n - 30, seed=i)] for i, n in enumerate(lengths)]
    observers = set().union(*(policy.observers for policy in PANEL))
    run = Engine(model(architecture), frozenset(), 257)
    whole, forked = run.prefill(contexts, observers), run.prefill(contexts, observers, shared=30)
    again = run.prefill(contexts, observers, shared=30)
    real = whole.lengths.positions(torch.device("cpu")) >= 0
    for mine, other, third in zip(whole.banks, forked.banks, again.banks, strict=True):
        for name in ("keys", "values"):
            a, b, c = (getattr(bank, name).permute(1, 3, 0, 2, 4)[real] for bank in (mine, other, third))
            assert torch.allclose(a, b, atol=1e-4)
            assert torch.equal(b, c)
        assert torch.allclose(mine.query_absmax, other.query_absmax, atol=1e-4)
        assert torch.allclose(mine.query_squares, other.query_squares, rtol=1e-3, atol=1e-4)
        for observer, sums in mine.observed.items():
            assert torch.allclose(sums, other.observed[observer], atol=1e-3)
    assert torch.equal(whole.prompts, forked.prompts)


def test_nothing_of_unwritten_memory_gets_in() -> None:
    """Columns of padding are never written behind a shared prefix; 0 times what lies there must be 0."""
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN
    try:
        shared = tokens(30, seed=9)
        asked = [Scoring(Prompt([*shared, *tokens(n, seed=n)], [7]), [[1, 2]]) for n in (3, 11)]
        for scores in engine().score(asked, PANEL, shared=30):
            assert all(c.logprob == c.logprob and c.fidelity.kl == c.fidelity.kl for s in scores for c in s.continuations)
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_shared_prefix_is_prefilled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    run = engine()
    fed: list[int] = []
    forward = run.model.forward
    monkeypatch.setattr(run.model, "forward", lambda *a, **k: (fed.append(k["input_ids"].shape[1]), forward(*a, **k))[1])
    shared = tokens(30, seed=9)
    for seed in range(3):
        run.prefill([[*shared, *tokens(5, seed=seed)]], shared=30)
    run.prefill([[*shared[:20], *tokens(5)]], shared=20)
    assert fed == [30, 5, 5, 5, 20, 5]


def test_answers_after_a_shared_prefix_are_the_same(any_policy: Policy) -> None:
    shared, run = tokens(40, seed=9), engine()
    prompts = [Prompt([*shared, *tokens(n, seed=n)], [7]) for n in (3, 11, 1)]
    panel = [policy("full"), any_policy]
    for mine, other in zip(
        run.generate(prompts, panel, Decoding(8)), run.generate(prompts, panel, Decoding(8), shared=40), strict=True
    ):
        assert [(g.tokens, g.usage) for g in mine] == [(g.tokens, g.usage) for g in other]
