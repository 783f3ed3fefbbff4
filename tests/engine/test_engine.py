"""The engine: how prompts are split, fed and ended."""

from __future__ import annotations

import pytest
import torch
from conftest import NO_END, answers, engine, model, prompt, tokens
from torch import Tensor

from mikv.cache import prefill
from mikv.config import policy
from mikv.engine import Engine
from mikv.engine.requests import Decoding, Prompt
from mikv.importance.scores import ColumnSums
from mikv.quant.transforms.balance import Balance


def test_with_the_full_cache_a_hidden_question_changes_no_answer() -> None:
    """Where nothing is lost it does not matter when the cache is compressed: ids and answer are the same."""
    visible, hidden = prompt(40, question=1), prompt(40, question=11)
    assert [*visible.context, *visible.question] == [*hidden.context, *hidden.question]
    assert answers(engine(), [visible], [policy("full")]) == answers(engine(), [hidden], [policy("full")])


@pytest.mark.parametrize(("question", "wanted"), [(1, 12), (8, 9)])
def test_a_fixed_budget_is_a_share_of_the_prompt(question: int, wanted: int) -> None:
    """The held-back token belongs to the prompt; a hidden question is not known when the budget is fixed."""
    h2o = policy("h2o", {"keep": 0.3, "budget": "fixed"})
    (got,) = engine().generate([prompt(40, question=question)], [h2o], Decoding(30))[0]
    assert got.usage.kept_tokens == wanted  # floor(0.3 * 40) of the prompt, floor(0.3 * 32) of the context


def test_an_answer_ends_with_an_end_token_or_at_the_limit() -> None:
    (free,) = engine().generate([prompt(20)], [policy("full")], Decoding(10))[0]
    assert (len(free.tokens), free.ended) == (10, False)
    (ended,) = Engine(model(), {free.tokens[4]}, 257).generate([prompt(20)], [policy("full")], Decoding(10))[0]
    assert ended.ended
    assert ended.tokens == free.tokens[: free.tokens.index(free.tokens[4])]


def test_a_prompt_needs_something_to_feed() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        Prompt([1, 2], [])


@pytest.mark.parametrize(("query_heads", "kv_heads"), [(4, 4), (6, 2), (8, 1)])
def test_the_balancers_maxima_are_over_the_whole_group(
    query_heads: int, kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Tensor, Tensor]] = []
    attend = prefill.causal_attention

    def spy(query: Tensor, key: Tensor, *rest: object) -> Tensor:
        seen.append((query.clone(), key.clone()))
        return attend(query, key, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(prefill, "causal_attention", spy)
    shape = {"query_heads": query_heads, "kv_heads": kv_heads, "hidden_size": 16 * query_heads}
    run = Engine(model(**shape), NO_END, 257)
    state = run.prefill([tokens(30)], {ColumnSums()})
    bank, store = state.banks[0], run.compress(state, [policy("mikv")]).banks[0].stores[0]
    for layer, (query, key) in enumerate(seen):
        for head in range(kv_heads):
            group = query[0, head * query_heads // kv_heads : (head + 1) * query_heads // kv_heads]
            assert torch.equal(bank.query_absmax[layer, 0, head], group.abs().amax(dim=(0, 1)))
            assert torch.allclose(bank.query_squares[layer, 0, head], group.square().sum(dim=(0, 1)), rtol=1e-4)
            b = (group.abs().amax(dim=(0, 1)) / key[0, head].abs().amax(dim=0)).sqrt()
            assert torch.equal(store.sides["keys", (Balance(),)]["balancer"][layer, 0, head], b)
