"""A compressed cache is a cache of transformers: its own `generate` decodes from it, or is told why it can't."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import POLICIES, Decoding, engine, model, policy, tokens

from mikv.cache.compressed import CompressedCache
from mikv.engine.requests import Prompt
from mikv.policy import Policy

STEPS = 12


def compressed(contexts: list[list[int]], *panel: Policy) -> CompressedCache:
    run = engine()
    return run.compress(run.prefill(contexts, [o for chosen in panel for o in chosen.observers]), panel)


def generated(prompts: list[list[int]], cache: Any, **options: Any) -> list[list[int]]:
    """By transformers, left-padded; what follows the prompts."""
    width = max(map(len, prompts))
    ids = torch.tensor([[257] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    out = model().generate(
        input_ids=ids, attention_mask=mask, past_key_values=cache, max_new_tokens=STEPS, eos_token_id=None, pad_token_id=257,
        **{"do_sample": False, **options},
    )  # fmt: skip
    return out[:, width:].tolist()


@pytest.mark.parametrize("name", POLICIES)
def test_transformers_decodes_from_it_as_the_engine_does(name: str) -> None:
    """Nobody calls end_step there; unequal prompts, the last token held back."""
    prompts = [tokens(40), tokens(27, seed=1)]
    wanted = engine().generate([Prompt(p[:-1], p[-1:]) for p in prompts], [policy(name)], Decoding(STEPS))[0]
    run, one = engine(), policy(name)
    state = run.prefill([p[:-1] for p in prompts], one.observers)
    cache = run.compress(state, [one], torch.tensor([len(p) for p in prompts]))  # budgets are of the prompt, as in the engine
    assert generated(prompts, cache) == [g.tokens for g in wanted]
    assert [usage.seen_tokens for usage in cache.usage()] == [len(p) - 1 + STEPS for p in prompts]
    assert cache.usage() == [g.usage for g in wanted]  # the last step is ended when it is asked


def test_sampled_answers_and_several_at_once_are_those_of_the_stock_cache() -> None:
    prompts = [tokens(30), tokens(30, seed=1)]
    for options in ({"do_sample": True, "temperature": 0.7}, {"do_sample": True, "top_k": 5}):
        answers = []
        for cache in (None, compressed([p[:-1] for p in prompts], policy("full"))):
            torch.manual_seed(0)
            answers.append(generated(prompts, cache, **options))
        assert answers[0] == answers[1]


def test_beam_search_is_that_of_the_stock_cache() -> None:
    prompts = [tokens(30), tokens(30, seed=1)]
    cache = compressed([p[:-1] for p in prompts], policy("full"))
    cache.batch_repeat_interleave(3)
    assert generated(prompts, cache, num_beams=3) == generated(prompts, None, num_beams=3)
    cache = compressed([p[:-1] for p in prompts], policy("mikv"))
    cache.batch_repeat_interleave(3)
    assert len(generated(prompts, cache, num_beams=3)[0]) == STEPS


def test_what_can_not_be_is_refused_with_the_reason() -> None:
    prompts = [tokens(30), tokens(30, seed=1)]
    held_back = [p[:-1] for p in prompts]
    with pytest.raises(RuntimeError, match=r"one token per row and step, not 5: compress the prompt without its last token"):
        generated(prompts, compressed([p[:-5] for p in prompts], policy("mikv")))
    with pytest.raises(ValueError, match=r"4 rows \(2 policies\), and is fed 2 tokens"):
        generated(prompts, compressed(held_back, policy("full"), policy("mikv")))
    with pytest.raises(ValueError, match=r"2 rows .* is fed 6 tokens"):
        generated(prompts, compressed(held_back, policy("full")), num_beams=3)
    cache = compressed(held_back, policy("full"), policy("mikv"))
    with pytest.raises(NotImplementedError, match="several policies can't follow beams"):
        cache.reorder_cache(torch.tensor([1, 0, 3, 2]))
    with pytest.raises(NotImplementedError, match="can't be cut back"):
        cache.crop(10)
    with pytest.raises(NotImplementedError, match="can't be emptied"):
        cache.reset()


def test_a_step_that_nobody_ended_is_ended_once() -> None:
    """By whichever comes first: the next step, a question, a fork; and not again by the engine's own call."""
    run, everyone = engine(), torch.ones(1, dtype=torch.bool)
    plain, asked = (compressed([tokens(30)], policy("mikv")) for _ in range(2))
    for step in range(6):
        run.step(plain, torch.tensor([step]), torch.tensor([30 + step]), everyone)
        model()(input_ids=torch.tensor([[step]]), position_ids=torch.tensor([[30 + step]]), past_key_values=asked)
        assert asked.get_seq_length() == 31 + step
        if step % 2:
            assert asked.usage() == asked.fork(torch.tensor([0])).usage() == plain.usage()
    assert asked.usage() == plain.usage()
