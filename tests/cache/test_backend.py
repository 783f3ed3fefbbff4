"""How a cache is read: what is decided, and that the kernels answer as the dense copy does."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from conftest import NO_END, POLICIES, Decoding, engine, model, policy, prompt, tokens

from mikv.cache.backend import Backend, decide
from mikv.cache.reindex import gone_after_columns, gone_after_slots
from mikv.engine import Engine
from mikv.engine.requests import Scoring
from mikv.importance.base import ObserverState
from mikv.importance.scores import ColumnSums
from mikv.kernels import pick
from mikv.types import Geometry, Lengths

CPU, GPU = torch.device("cpu"), torch.device("cuda")
HALF, SINGLE = torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Largest:
    """Observer of another kind: the largest attention that a key received, which no sum tells."""

    last = None
    shown = "block"

    def start(self, geometry: Geometry, lengths: Lengths, device: torch.device) -> LargestState:
        return LargestState(torch.zeros(geometry.layers, len(lengths.tokens), geometry.kv_heads, lengths.width, device=device))

    def combine(self, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        return torch.maximum(before, after)


@dataclass
class LargestState(ObserverState):
    found: torch.Tensor

    def block(self, layer: int, probs: torch.Tensor, first: int, real_queries: torch.Tensor) -> None:  # noqa: ARG002
        here = self.found[layer, :, :, : probs.shape[-1]]
        here.copy_(torch.maximum(here, (probs * real_queries[:, None, None, :, None]).amax(dim=(2, 3))))

    def result(self) -> torch.Tensor:
        return self.found


def unasked() -> int:
    raise AssertionError("the head's size does not matter here")


@pytest.mark.parametrize(
    ("reader", "attention", "device", "dtype", "head_dim", "wanted"),
    [
        (None, None, CPU, SINGLE, None, Backend("working")),
        ("packed", None, GPU, HALF, None, Backend("packed")),
        ("kernel", None, CPU, SINGLE, None, Backend("kernel")),
        (None, "reference", CPU, SINGLE, None, Backend("kernel", "reference")),
        (None, None, GPU, HALF, 128, Backend("kernel", "triton")),
        (None, None, GPU, HALF, 80, Backend("working")),  # no kernel for such heads
        (None, None, GPU, SINGLE, None, Backend("working")),
        ("kernel", None, GPU, HALF, 80, Backend("kernel", "reference")),
        ("kernel", None, GPU, SINGLE, None, Backend("kernel", "reference")),
        ("kernel", "triton", GPU, torch.float16, 64, Backend("kernel", "triton")),
        (None, "reference", GPU, HALF, None, Backend("kernel", "reference")),
    ],
)
def test_what_is_left_open_follows_from_device_and_model(
    reader: str | None, attention: str | None, device: torch.device, dtype: torch.dtype, head_dim: int | None, wanted: Backend
) -> None:
    assert decide(reader, attention, device, dtype, unasked if head_dim is None else lambda: head_dim) == wanted


def test_what_can_not_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="working or packed or kernel"):
        decide("dense", None, CPU, SINGLE, unasked)
    with pytest.raises(ValueError, match="reference or triton"):
        decide(None, "flash", CPU, SINGLE, unasked)
    with pytest.raises(ValueError, match="choose reader=kernel"):
        decide("working", "triton", GPU, HALF, unasked)
    with pytest.raises(ValueError, match=r"choose model.dtype=bfloat16"):
        decide(None, "triton", GPU, SINGLE, unasked)
    with pytest.raises(ValueError, match="head_dim 32, 64, 128 or 256, not 80"):
        decide(None, "triton", GPU, HALF, lambda: 80)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="needs a GPU"):
        decide(None, "triton", CPU, HALF, lambda: 64)


def test_only_what_rounds_otherwise_is_in_the_protocol() -> None:
    assert Backend("working").protocol == Backend("packed").protocol == {}
    protocols = [Backend("kernel", attention).protocol["attention"] for attention in (None, "reference", "triton")]
    assert protocols == ["cpu", "reference", "triton"]


@pytest.mark.parametrize("kernels", [None, "reference"])
@pytest.mark.parametrize("name", POLICIES)
def test_kernels_answer_as_the_dense_copy(name: str, kernels: str | None) -> None:
    """Every policy, re-indexed ones too; unequal lengths, tokens that move while the answer grows. They add up in another
    order (float32): the other reader's own answers must be as probable, sum by sum."""
    panel = [policy("full"), policy(name)]
    prompts = [prompt(61, question=2), prompt(23, seed=1, question=2)]
    decoding = Decoding(max_new_tokens=20)
    dense, read = engine("working"), engine("kernel", kernels)
    assert dense.generate(prompts, panel, decoding)[0] == read.generate(prompts, panel, decoding)[0]
    answers = [g.tokens for g in dense.generate(prompts, panel, decoding)[0]]
    scorings = [Scoring(p, [answer, answer[:3]]) for p, answer in zip(prompts, answers, strict=True)]
    for mine, other in zip(dense.score(scorings, panel), read.score(scorings, panel), strict=True):
        for a, b in zip(mine, other, strict=True):
            assert a.usage == b.usage
            for x, y in zip(a.continuations, b.continuations, strict=True):
                assert x.logprob == pytest.approx(y.logprob, abs=2e-3)
                assert x.fidelity.kl == pytest.approx(y.fidelity.kl, abs=1e-3)


def test_triton_serves_a_whole_panel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted: prefill packed by its kernel, decoded by its kernel, in 16 bits, beside torch's reference in 16 bits."""
    shape = {"dtype": torch.float16, "head_dim": 32, "query_heads": 4, "kv_heads": 2}
    panel = [policy(name) for name in ("full", "mikv", "streaming_llm", "h2o")]
    prompts = [prompt(40), prompt(17, seed=1)]
    one, other = (Engine(model(**shape), NO_END, 257, "kernel", kernels) for kernels in ("triton", "reference"))
    assert one.backend == Backend("kernel", "triton")
    packed: list[str] = []
    encode = pick.encode
    monkeypatch.setattr(pick, "encode", lambda *args: (packed.append(args[-1]), encode(*args))[1])
    scorings = [Scoring(p, [[7, 8, 9]]) for p in prompts]
    for mine, theirs in zip(one.score(scorings, panel), other.score(scorings, panel), strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert a.usage == b.usage
            assert a.continuations[0].logprob == pytest.approx(
                b.continuations[0].logprob, abs=0.1
            )  # h2o: a tie in 16 bits evicts another token
    assert set(packed) == {"triton"}  # of the one engine; the other's torch gives the same bits


def test_a_prefill_by_kernels_is_that_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Column sums of a left-padded batch, and what the next layer makes of the fused attention; an observer of another kind,
    or a shared prefix, is served by torch."""
    shape = {"dtype": torch.float16, "head_dim": 32, "query_heads": 4, "kv_heads": 2}
    one, other = (Engine(model(**shape), NO_END, 257, "kernel", kernels) for kernels in ("triton", "reference"))
    calls: list[object] = []
    column_sums = pick.column_sums
    monkeypatch.setattr(pick, "column_sums", lambda *args: (calls.append(args), column_sums(*args))[1])
    contexts = [tokens(150), tokens(131, seed=1)]
    mine, wanted = (run.prefill(contexts, {ColumnSums()}).banks[0] for run in (one, other))
    assert len(calls) == len(mine.layers)  # of the first engine alone
    assert torch.allclose(mine.observed[ColumnSums()], wanted.observed[ColumnSums()], atol=0.05)  # of up to 300
    assert (mine.observed[ColumnSums()][:, 1, :, :19] == 0).all()
    for got, exact in ((mine.keys[:, 1, :, 19:], wanted.keys[:, 1, :, 19:]), (mine.values[:, 0], wanted.values[:, 0])):
        assert torch.allclose(got, exact, atol=2e-2)
    one.prefill([[*contexts[0], 1], [*contexts[0], 2]], {ColumnSums()}, shared=150)
    assert len(calls) == 2 * len(mine.layers)  # of the prefix, not of what follows
    both = one.prefill(contexts, {ColumnSums(), Largest()}).banks[0].observed
    assert len(calls) == 2 * len(mine.layers)
    assert (both[Largest()][:, 0].amax(dim=-1) == 1).all()  # the first query sees one key
    assert torch.allclose(both[ColumnSums()], wanted.observed[ColumnSums()], atol=0.05)


def test_missing_tokens_are_counted_alike_in_columns_and_in_slots() -> None:
    """Head by head other tokens are held, in any order of slots; rows have padding on the left."""
    generator = torch.Generator().manual_seed(0)
    padding, seen = torch.tensor([0, 5]), torch.tensor([12, 7])
    present = torch.zeros(2, 3, 12, dtype=torch.bool)
    positions = torch.full((2, 3, 6), 99)  # of unused slots: anything
    count = torch.tensor([6, 4])
    for row in range(2):
        for head in range(3):
            held = torch.randperm(int(seen[row]), generator=generator)[: count[row]]
            positions[row, head, : count[row]] = held
            present[row, head, held + padding[row]] = True
    used = (torch.arange(6) < count[:, None])[:, None]
    slots = gone_after_slots(positions, used, seen)
    columns = gone_after_columns(present, padding)
    for row in range(2):
        for head in range(3):
            held = positions[row, head, : count[row]]
            missing = [sum(1 for p in range(at + 1, int(seen[row])) if p not in held.tolist()) for at in held.tolist()]
            assert slots[row, head, : count[row]].tolist() == missing
            assert columns[row, head, held + padding[row]].tolist() == missing
