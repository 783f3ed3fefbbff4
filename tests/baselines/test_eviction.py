"""Which tokens the rivals' scores keep, against slow references written from the originals' definitions: left-padded prompts of
unequal length, a model with grouped queries."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from conftest import NO_END, engine, model, tokens
from torch import Tensor
from torch.nn.functional import avg_pool1d, normalize

from mikv.config import policy
from mikv.engine import Engine
from mikv.importance import pooled as pooled_scores
from mikv.importance.expected import Expected
from mikv.policy import Policy

SHAPE = {"layers": 3, "query_heads": 8, "kv_heads": 2, "head_dim": 16}
LENGTHS = (61, 80)
WINDOW, KERNEL = 6, 3
EPSILON = 0.01  # of CriticalKV: large enough here to be seen
SMALL = {"window": WINDOW, "kernel": KERNEL}


@cache
def inside(length: int) -> list[dict[str, Tensor]]:
    """Of a prompt alone, by layer: queries before RoPE and after it [Hq, T, D], keys, values [H, T, D], causal attention
    [Hq, T, T], the output projection [hidden, Hq, D]."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    plain = model(attention="eager", **SHAPE)
    taken: list[dict[str, Tensor]] = [{} for _ in plain.model.layers]
    hooks = []
    for layer, found in zip(plain.model.layers, taken, strict=True):
        attention = layer.self_attn
        for name in ("q_proj", "k_proj", "v_proj"):

            def keep(module: Any, given: Any, made: Tensor, name: str = name, found: dict[str, Tensor] = found) -> None:
                found[name] = made[0].unflatten(-1, (-1, SHAPE["head_dim"])).transpose(0, 1)

            hooks.append(getattr(attention, name).register_forward_hook(keep))
    with torch.inference_mode():
        plain(torch.tensor([ids(length)]))
        cos, sin = plain.model.rotary_emb(taken[0]["q_proj"], torch.arange(length)[None])
    for hook in hooks:
        hook.remove()
    found = []
    for layer, raw in zip(plain.model.layers, taken, strict=True):
        q, k = (x[0] for x in apply_rotary_pos_emb(raw["q_proj"][None], raw["k_proj"][None], cos, sin))
        logits = q @ k.repeat_interleave(len(q) // len(k), dim=0).transpose(1, 2) / SHAPE["head_dim"] ** 0.5
        logits = logits.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
        weight = layer.self_attn.o_proj.weight.detach().unflatten(1, (len(q), -1))
        parts = {"plain": raw["q_proj"], "queries": q, "keys": k, "values": raw["v_proj"]}
        found.append({**parts, "attention": logits.softmax(dim=-1), "output": weight})
    return found


def ids(length: int) -> list[int]:
    return tokens(length, seed=length)


def kept(one: Policy) -> Iterator[tuple[int, int, int, set[int]]]:
    """(length, layer, head, positions) of what a policy keeps of all prompts together."""
    run = Engine(model(**SHAPE), NO_END, 5)  # a token like any other as padding: it must count nothing
    cache = run.compress(run.prefill([ids(n) for n in LENGTHS], one.observers), [one])
    (store,) = cache.banks[0].stores
    positions, used = store.tiers[0].positions(), store.tiers[0].used().expand(store.tiers[0].positions().shape)
    for row, length in enumerate(LENGTHS):
        for layer in range(SHAPE["layers"]):
            for head in range(SHAPE["kv_heads"]):
                here = positions[layer, row, head][used[layer, row, head]]
                yield length, layer, head, set(here.tolist())


def group_mean(x: Tensor) -> Tensor:
    """[Hq, ...] -> [H, ...]"""
    return x.unflatten(0, (SHAPE["kv_heads"], -1)).mean(dim=1)


def window_attention(layer: dict[str, Tensor]) -> Tensor:
    """Of the last queries to what is before them, [Hq, W, T - W]."""
    return layer["attention"][:, -WINDOW:, :-WINDOW]


def with_window(scores: Tensor) -> Tensor:
    return torch.nn.functional.pad(scores, (0, WINDOW), value=float(scores.max()) + 1)


def pooled(x: Tensor) -> Tensor:
    return avg_pool1d(x, KERNEL, stride=1, padding=KERNEL // 2)


def snapkv(layer: dict[str, Tensor], keep: float) -> Tensor:
    return with_window(group_mean(pooled(window_attention(layer).mean(dim=1))))


def output_norms(layer: dict[str, Tensor]) -> Tensor:
    values = layer["values"].repeat_interleave(len(layer["queries"]) // SHAPE["kv_heads"], dim=0)
    return group_mean(torch.einsum("htd,ohd->hto", values, layer["output"]).abs().sum(dim=-1))


def criticalkv(layer: dict[str, Tensor], keep: float) -> Tensor:
    scores = snapkv(layer, keep)
    first = scores.topk(int(int(keep * scores.shape[-1]) / 2), dim=-1).indices
    return ((scores + EPSILON) * output_norms(layer)).scatter(-1, first, 1e30)


def tova(layer: dict[str, Tensor], keep: float) -> Tensor:
    return layer["attention"][:, -1].mean(dim=0).expand(SHAPE["kv_heads"], -1)


def knorm(layer: dict[str, Tensor], keep: float) -> Tensor:
    return -layer["keys"].norm(dim=-1)


def keydiff(layer: dict[str, Tensor], keep: float) -> Tensor:
    keys = layer["keys"]
    return -torch.nn.functional.cosine_similarity(keys, normalize(keys, dim=-1).mean(dim=1, keepdim=True), dim=-1)


def expected_attention(layer: dict[str, Tensor], keep: float) -> Tensor:
    """Sinks 4; the rotations' mean by summing 512 matrices."""
    queries, keys, values, dim = layer["plain"][:, 4:], layer["keys"], layer["values"], SHAPE["head_dim"]
    length = keys.shape[1]
    rotation = torch.zeros(dim, dim)
    frequencies = model(**SHAPE).model.rotary_emb.inv_freq
    for position in range(length, length + 512):
        angle = position * frequencies
        for i in range(dim // 2):
            rotation[i, i] += angle[i].cos() / 512
            rotation[i + dim // 2, i + dim // 2] += angle[i].cos() / 512
            rotation[i, i + dim // 2] -= angle[i].sin() / 512
            rotation[i + dim // 2, i] += angle[i].sin() / 512
    found = []
    for head, q in enumerate(queries):
        mean, covariance = rotation @ q.mean(dim=0), rotation @ q.T.cov(correction=0) @ rotation.T
        k = keys[head // (len(queries) // len(keys))][4:]
        logits = k @ mean / dim**0.5 + torch.stack([one @ covariance @ one for one in k]) / (2 * dim)
        found.append(logits.softmax(dim=-1))
    scores = group_mean(torch.stack(found)) * values[:, 4:].norm(dim=-1)
    return torch.nn.functional.pad(scores, (4, 0), value=float(scores.max()) + 1)


def defensivekv(layer: dict[str, Tensor], keep: float) -> Tensor:
    """The authors' steps, one head at a time where they are."""
    seen = window_attention(layer)
    length, heads = layer["keys"].shape[1], SHAPE["kv_heads"]
    mean = group_mean(seen.mean(dim=1))
    spread = pooled(seen)
    spread = spread / spread.sum(dim=-1, keepdim=True) * seen.sum(dim=-1, keepdim=True)
    worst = spread.unflatten(0, (heads, -1)).amax(dim=(1, 2))
    worst = worst.clamp(min=worst.mean(dim=-1, keepdim=True))
    norms = output_norms(layer)[:, :-WINDOW]
    scores = worst * norms / norms.sum(dim=0, keepdim=True)
    threshold = 0.9 - float(seen[..., -WINDOW:].sum(dim=-1).mean())
    for head in range(heads):
        share, order = (mean[head] / mean[head].sum()).sort(descending=True)
        count = min(int((share.cumsum(dim=0) >= threshold).int().argmax()), int(length * keep) - WINDOW)
        scores[head, order[:count]] = 1e30
    return torch.nn.functional.pad(scores, (0, WINDOW), value=1e30)


PER_HEAD: dict[str, tuple[Callable[[dict[str, Tensor], float], Tensor], dict[str, Any]]] = {
    "snapkv": (snapkv, SMALL),
    "criticalkv": (criticalkv, {**SMALL, "epsilon": EPSILON}),
    "tova": (tova, {}),
    "knorm": (knorm, {}),
    "keydiff": (keydiff, {}),
    "expected_attention": (expected_attention, {}),
}


@pytest.mark.parametrize("name", PER_HEAD)
@pytest.mark.parametrize("keep", [0.25, 0.6])
def test_the_best_of_each_head_stay(name: str, keep: float) -> None:
    score, options = PER_HEAD[name]
    for length, layer, head, mine in kept(policy(name, {"keep": keep, **options})):
        number = int(keep * length)
        theirs = score(inside(length)[layer], keep)[head].topk(number).indices
        assert mine == set(theirs.tolist())


@pytest.mark.parametrize(("name", "score", "least"), [("adakv", snapkv, 0.2), ("defensivekv", defensivekv, 0.0)])
@pytest.mark.parametrize("keep", [0.25, 0.6])
def test_the_best_of_a_layer_stay(
    name: str, score: Callable[[dict[str, Tensor], float], Tensor], least: float, keep: float
) -> None:
    """AdaKV's sharing: what is surely kept of each head, then the best of all heads."""
    found = {(length, layer, head): mine for length, layer, head, mine in kept(policy(name, {"keep": keep, **SMALL}))}
    for length in LENGTHS:
        for layer in range(SHAPE["layers"]):
            scores = score(inside(length)[layer], keep).clone()
            number = int(keep * length)
            sure = scores.topk(int(number * least), dim=-1).indices
            scores.scatter_(-1, sure, 1e31)
            best = scores.flatten().topk(number * len(scores)).indices
            for head in range(SHAPE["kv_heads"]):
                wanted = {int(i) % length for i in best if int(i) // length == head}
                assert found[length, layer, head] == wanted
    differ = any(len(mine) != int(keep * length) for (length, _, _), mine in found.items())
    assert differ or (name, keep) == ("defensivekv", 0.25)  # where 0.9 of the attention is more than all are to keep


def test_lower_layers_keep_more() -> None:
    """PyramidKV at kvpress's rules: most and fewest tokens, and a line between them."""
    keep = 0.5
    for length, layer, _, mine in kept(policy("pyramidkv", {"keep": keep, "beta": 4, **SMALL})):
        mean = keep * length
        fewest = mean / 4
        most = min(2 * mean - fewest, length - WINDOW)
        fewest = 2 * mean - most
        assert len(mine) == round(most - layer * (most - fewest) / (SHAPE["layers"] - 1))
    alike = {len(mine) for length, _, _, mine in kept(policy("pyramidkv", {"keep": 0.25, "beta": 20, **SMALL})) if length == 80}
    assert alike == {20}  # a twentieth is less than the window: all layers alike


def test_heads_of_a_layer_hold_the_same_tokens_with_tova() -> None:
    """At each step the token that the last query attends to least goes, of all heads."""
    run, one = engine(**SHAPE), policy("tova", {"keep": 0.5, "budget": "fixed"})
    state = run.prefill([ids(n) for n in LENGTHS], one.observers)
    cache = run.compress(state, [one])
    for step in range(5):
        run.step(cache, torch.tensor([step, step + 1]), torch.tensor(LENGTHS) + step, torch.ones(2, dtype=torch.bool))
    (store,) = cache.banks[0].stores
    positions, used = store.tiers[0].positions(), store.tiers[0].used()
    held = positions.masked_fill(~used, -1).sort(dim=-1).values
    assert torch.equal(held[:, :, 0], held[:, :, 1])
    assert store.tiers[0].count.unique(dim=1).shape[1] == 2
    assert store.tiers[0].count[0, :, 0].tolist() == [30, 40]


def test_queries_behind_a_shared_prefix_count_as_all_do() -> None:
    """What Expected Attention knows of queries is that of the whole prompt, with and without a prefix that prompts share."""
    run, one = engine(**SHAPE), policy("expected_attention", {"keep": 0.5})
    prompts = [ids(50) + tokens(9, seed=1), ids(50) + tokens(20, seed=2)]
    (observer,) = one.observers
    alone = run.prefill(prompts, one.observers).banks[0].observed[observer]
    shared = run.prefill(prompts, one.observers, shared=50).banks[0].observed[observer]
    assert torch.allclose(alone, shared, rtol=1e-3, atol=1e-3 * float(alone.abs().max()))
    assert float(alone.abs().max()) > 1


def test_what_policies_of_a_panel_have_in_common_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The norms of values behind the output projection, and what queries let expect, at three budgets."""
    calls: list[str] = []
    norms, score = pooled_scores._output_norms, Expected._expected
    monkeypatch.setattr(pooled_scores, "_output_norms", lambda context: (calls.append("norms"), norms(context))[1])
    monkeypatch.setattr(Expected, "_expected", lambda self, context: (calls.append("expected"), score(self, context))[1])
    panel = [
        policy(name, {"keep": keep}) for name in ("criticalkv", "defensivekv", "expected_attention") for keep in (0.2, 0.3)
    ]
    panel.append(policy("expected_attention", {"epsilon": 0.1}))
    run = engine(**SHAPE)
    for _ in range(2):  # nothing of a prompt is left for the next
        calls.clear()
        run.compress(run.prefill([ids(70)], set().union(*(one.observers for one in panel))), panel)
        assert sorted(calls) == ["expected", "expected", "norms"]
