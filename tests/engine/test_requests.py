"""Requests in any order and of any kind: each is answered once, and shared work is done once."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from conftest import engine, prompt, tokens
from memory_limit import MemoryLimit

from mikv.cache.compressed import Usage
from mikv.cache.policy_store import PolicyStore
from mikv.config import policy
from mikv.engine import Engine, OutOfMemory
from mikv.engine.requests import (
    Batch,
    Decoding,
    Fidelity,
    Generating,
    Generation,
    Prompt,
    Request,
    Response,
    Sampling,
    Scored,
    Scores,
    Scoring,
    plan,
)
from mikv.policy import Policy

PANEL = [policy("full"), policy("mikv")]


def few_shot(shared: int, suffix: int, seed: int = 0, prefix_seed: int = 9) -> Prompt:
    return Prompt([*tokens(shared, seed=prefix_seed), *tokens(suffix, seed=seed)], [7])


def named(requests: Sequence[Request]) -> dict[int, list[Request]]:
    """Each request under a name of its own: its place."""
    return {i: [request] for i, request in enumerate(requests)}


def batches(requests: Sequence[Request], size: int = 4) -> list[Batch[int]]:
    return list(plan(named(requests), size))


def served(
    run: Engine, requests: Sequence[Request], batch_size: int, fidelity: bool = False, panel: Sequence[Policy] = PANEL
) -> dict[int, list[Response]]:
    """Responses by request and policy."""
    complete = [one for some in run.serve(named(requests), panel, batch_size, fidelity) for one in some]
    assert len({one.name for one in complete}) == len(complete)
    return {one.name: [responses[0] for responses in one.responses] for one in complete}


def test_prefixes_that_fill_no_batch_of_answers_are_not_shared() -> None:
    """Two of each of six system prompts: three full batches, not six halves; scores have no steps to share."""
    prompts = [few_shot(60, 5 + i, seed=i, prefix_seed=kind) for kind in range(6) for i in range(2)]
    generating = batches([Generating(one, Decoding(3)) for one in prompts])
    assert [len(batch.prompts) for batch in generating] == [4, 4, 4]
    assert all(batch.shared == 0 for batch in generating)
    scoring = batches([Scoring(one, [[1]]) for one in prompts])
    assert [len(batch.prompts) for batch in scoring] == [2] * 6
    assert all(batch.shared >= 60 for batch in scoring)
    few = batches([Generating(one, Decoding(3)) for one in prompts[:2]])
    assert [(len(batch.prompts), batch.shared >= 60) for batch in few] == [(2, True)]  # there is no fuller batch to be had


def test_every_request_is_in_one_batch_and_kinds_do_not_mix() -> None:
    ways = [Decoding(3), Decoding(4), Decoding(3, Sampling())]
    requests: list[Request] = [Generating(prompt(20 + i, seed=i), ways[i % 3]) for i in range(10)]
    requests += [Scoring(prompt(20 + i, seed=50 + i), [[1], [2, 3]]) for i in range(7)]
    planned = batches(requests)
    tags = [tag for batch in planned for asked in batch.prompts for tag in asked.tags]
    assert sorted(tags) == [(i, 0) for i in range(17)]
    for batch in planned:
        assert 1 <= len(batch.prompts) <= 4
        for asked in batch.prompts:
            for name, _ in asked.tags:
                request = requests[name]
                assert batch.decoding == (request.decoding if isinstance(request, Generating) else None)
    scoring = [asked.prompt.tokens for batch in planned if batch.decoding is None for asked in batch.prompts]
    assert scoring == sorted(scoring, reverse=True)  # the longest first


def test_equal_prompts_are_one_and_equal_continuations_too() -> None:
    same = prompt(20)
    requests: list[Request] = [
        Scoring(same, [[1], [2, 3]]),
        Scoring(prompt(20, seed=1), [[1]]),
        Scoring(Prompt(list(same.context), list(same.question)), [[4], [2, 3], [1]]),
    ]
    (batch,) = batches(requests)
    asked = next(one for one in batch.prompts if len(one.tags) == 2)
    assert asked.tags == [(0, 0), (2, 0)]
    assert list(asked.continuations) == [(1,), (2, 3), (4,)]
    usage = Usage(20, 20.0, 0.0, {}, 0, 0)
    of_all = Scores([Scored(n, -float(n), False, Fidelity(0, 1, 0)) for n in (1, 2, 3)], 0.0, usage)
    for request, wanted in ((requests[0], [1, 2]), (requests[2], [3, 2, 1])):
        mine = asked.response_to(request, of_all)
        assert isinstance(mine, Scores)
        assert [scored.tokens for scored in mine.continuations] == wanted


def test_sampled_repeats_are_prompts_of_their_own() -> None:
    once = prompt(20)
    sampled = Decoding(3, Sampling())
    requests: list[Request] = [Generating(Prompt(once.context, once.question, r), sampled) for r in (0, 1, 1)]
    (batch,) = batches(requests)
    assert sorted(asked.tags for asked in batch.prompts) == [[(0, 0)], [(1, 0), (2, 0)]]


@pytest.mark.parametrize(
    ("shared", "suffixes", "wanted"),
    [
        (40, (5, 9, 7), 40),
        (40, (35, 9, 7), 40),  # at least half of the longest
        (31, (5, 9, 7), 0),  # too short to be worth a pass
        (40, (60, 61, 62), 0),  # less than half of each
        (40, (5,), 0),  # nobody to share with
    ],
)
def test_long_common_prefixes_are_found(shared: int, suffixes: tuple[int, ...], wanted: int) -> None:
    requests: list[Request] = [Scoring(few_shot(shared, n, seed=n), [[1]]) for n in suffixes]
    for batch in batches(requests):
        first = batch.prompts[0].prompt.context
        assert batch.shared == wanted
        assert all(m.prompt.context[: batch.shared] == first[: batch.shared] for m in batch.prompts)
        assert all(len(m.prompt.context) > batch.shared for m in batch.prompts)


def test_subjects_with_prefixes_of_their_own_do_not_spoil_each_other() -> None:
    """As MMLU's: a common beginning of all, a long prefix of each subject."""
    start = tokens(12, seed=3)
    requests: list[Request] = []
    for subject in range(3):
        examples = [*start, *tokens(60, seed=100 + subject)]
        requests += [Scoring(Prompt([*examples, *tokens(8 + i, seed=10 * subject + i)], [7]), [[1]]) for i in range(5)]
    order = [0, 5, 10, 1, 6, 11, 2, 7, 12, 3, 8, 13, 4, 9, 14]
    planned = batches([requests[i] for i in order])
    assert sorted(len(batch.prompts) for batch in planned) == [1, 1, 1, 4, 4, 4]
    assert all(batch.shared == 72 for batch in planned)


def test_a_prompt_that_is_the_others_prefix_is_served() -> None:
    """Each prompt keeps a token of its own behind what is shared."""
    long = tokens(60, seed=9)
    requests: list[Request] = [Scoring(Prompt(long[:n], [7]), [[1], [2, 3]]) for n in (50, 51, 60, 50)]
    (batch,) = batches(requests)
    assert batch.shared == 49
    assert sorted(served(engine(), requests, 4)) == [0, 1, 2, 3]


def test_empty_and_one_token_contexts_are_served() -> None:
    requests: list[Request] = [Scoring(Prompt(c, [7]), [[1]]) for c in ([], [5], [], [5, 6])]
    done = served(engine(), requests, 4)
    assert sorted(done) == [0, 1, 2, 3]
    assert done[0] == done[2]


def mixed() -> list[Request]:
    requests: list[Request] = [Scoring(few_shot(40, 5 + i, seed=i), [[1], [2, 3, 4]]) for i in range(5)]
    requests += [Generating(few_shot(40, 5 + i, seed=i), Decoding(4)) for i in range(3)]
    requests += [Scoring(requests[1].prompt, [[9, 9], [1]]), Generating(prompt(11), Decoding(4))]
    return requests


def test_what_is_served_is_what_the_engine_says_to_each_alone() -> None:
    requests, run = mixed(), engine()
    done = served(run, requests, 3, fidelity=True)
    assert sorted(done) == list(range(len(requests)))
    for i, request in enumerate(requests):
        if isinstance(request, Generating):
            alone: Any = run.generate([request.prompt], PANEL, request.decoding, fidelity=True)
        else:
            alone = run.score([request], PANEL)
        for mine, (other,) in zip(done[i], alone, strict=True):
            assert mine.usage == other.usage
            if isinstance(mine, Generation):
                assert mine.tokens == other.tokens
                assert list(mine.fidelity or ()) == pytest.approx(list(other.fidelity), abs=2e-3)
            else:
                assert [c.logprob for c in mine.continuations] == pytest.approx(
                    [c.logprob for c in other.continuations], abs=1e-2
                )


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA"), MemoryError(), RuntimeError("not enough memory: you tried")])
@pytest.mark.parametrize("method", ["score", "generate"])
def test_out_of_memory_halves_the_batch(
    method: str, error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = getattr(Engine, method)
    sizes: list[int] = []

    def narrow(self: Engine, prompts: Any, *rest: Any) -> Any:
        sizes.append(len(prompts))
        if len(prompts) > 1:
            raise error
        return whole(self, prompts, *rest)

    monkeypatch.setattr(Engine, method, narrow)
    assert sorted(served(engine(), mixed(), 4)) == list(range(len(mixed())))
    assert max(sizes) > 2
    assert "out of memory with" in capsys.readouterr().out


# So many that their caches, not the attention of a prefill, take most of the memory.
MANY = [
    policy("full"),
    *(policy("mikv", {"keep": 0.1 * i}) for i in range(1, 9)),
    *(policy("uniform", {"tier.bits": b}) for b in (2, 3)),
]


def peak(requests: Sequence[Request], batch_size: int, fidelity: bool) -> int:
    """Most bytes that live at a time while these are served."""
    with MemoryLimit() as memory:
        served(engine(), requests, batch_size, fidelity, MANY)
    return memory.peak


@pytest.mark.parametrize("fidelity", [False, True])
def test_a_failed_attempts_memory_is_free_before_a_smaller_batch_is_tried_and_what_fitted_is_remembered(
    fidelity: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """A machine on which 4 prompts fit and 8 don't: 8 fails once, then all go by 4."""
    requests: list[Request] = [Generating(prompt(200, seed=i), Decoding(8)) for i in range(16)]
    # two batches of 4: the second finds memory taken that is kept for it
    with MemoryLimit(most=int(1.05 * peak(requests[:8], 4, fidelity))):
        of_batches = list(engine().serve(named(requests), MANY, 8, fidelity))
    assert [[one.prompts for one in complete] for complete in of_batches] == [[4] * 4] * 4
    assert sorted(one.name for complete in of_batches for one in complete) == list(range(16))
    assert capsys.readouterr().out.count("out of memory with 8 prompts at a time; going on with at most 4") == 1


@pytest.mark.parametrize("kind", ["answers", "continuations", "continuations after questions"])
def test_each_row_is_held_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fidelity decodes twice, rows end early, continuations are fed in forks: what goes on takes the place of what was."""
    step, most = Engine.step, []

    def rows() -> int:
        gc.collect()
        return sum(len(found.seen) for found in gc.get_objects() if type(found) is PolicyStore)

    def counting(self: Engine, *arguments: Any) -> Any:
        most.append(rows())
        return step(self, *arguments)

    monkeypatch.setattr(Engine, "step", counting)
    prompts = [prompt(40, seed=i, question=1 if kind == "continuations" else 1 + 3 * i) for i in range(4)]
    requests: list[Request] = [Generating(one, Decoding(8)) for one in prompts]
    if kind != "answers":
        requests = [Scoring(one, [tokens(3 + i, seed=i)]) for i, one in enumerate(prompts)]
    before = rows()
    assert served(engine(), requests, 4, fidelity=True)
    assert max(most) - before == 4 * len(PANEL)


def test_whoever_watches_sees_the_share_that_is_done_grow_within_a_batch() -> None:
    seen: list[float] = []
    for _ in engine().serve(named(mixed()), PANEL, 16, fidelity=True, watch=seen.append):
        pass
    assert seen == sorted(seen)
    assert seen[-1] == 1
    assert 0 < seen[0] < 0.3
    assert len(seen) > 10


def test_a_single_prompt_that_does_not_fit_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(Engine, "score", full)
    with pytest.raises(OutOfMemory, match=r"single prompt of 20 tokens and 2 policies.*reader=packed"):
        served(engine(), [Scoring(prompt(20), [[1]])], 4)


def test_no_prefix_is_kept_when_all_is_done() -> None:
    """It is as large as a prompt's exact cache."""
    run = engine()
    held = [run._prefix is not None for _ in run.serve(named(mixed()), PANEL, 3, fidelity=False)]
    assert any(held)
    assert run._prefix is None


def test_time_is_reported_with_each_batch() -> None:
    for complete in engine().serve(named(mixed()), PANEL, 3, fidelity=True):
        for one in complete:
            assert one.seconds["prefill"] > 0
            assert one.seconds["decode"] > 0
            kinds = {type(response) for of_policy in one.responses for response in of_policy}
            assert kinds in ({Scores}, {Generation})
            assert (one.seconds["fidelity"] > 0) == (kinds == {Generation})


def test_requests_of_one_name_come_together_when_the_last_is_answered() -> None:
    """In the order in which they were asked, though they are served longest first."""
    run = engine()
    requests: dict[str, list[Request]] = {
        "a": [
            Generating(prompt(20), Decoding(3)),
            Scoring(prompt(33, seed=1), [[1], [2, 3]]),
            Scoring(prompt(50, seed=2), [[4]]),
        ],
        "b": [Scoring(prompt(40, seed=3), [[5]])],
    }
    of_batches = list(run.serve(requests, PANEL, 2, fidelity=False))
    assert [[one.name for one in complete] for complete in of_batches] == [[], ["b"], ["a"]]
    (b,), (a,) = of_batches[1:]
    assert [(type(one), len(a.responses)) for one in a.responses[0]] == [(Generation, 2), (Scores, 2), (Scores, 2)]
    assert [len(one.continuations) for one in a.responses[1] if isinstance(one, Scores)] == [2, 1]
    assert (a.prompts, b.prompts) == (2, 2)
    alone = run.score([requests["a"][2]], PANEL)
    for mine, (other,) in zip((of_policy[2] for of_policy in a.responses), alone, strict=True):
        assert mine.usage == other.usage
    assert a.seconds["prefill"] > b.seconds["prefill"] > 0
