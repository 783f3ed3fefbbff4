"""Column sums of causal attention and the log-sum-exp they rest on, kernel and reference against float64 matrices."""

from __future__ import annotations

import pytest
import torch
from kernel_inputs import guard_is_whole, poisoned
from torch import Tensor

from mikv.kernels import columns_launch, columns_reference

# Largest error of a sum over the number of queries and heads in it, and of a log-sum-exp. The inputs' rounding is none of
# it: products of 16-bit numbers are exact in FP32.
TOLERANCE = 2e-6
IMPLEMENTATIONS = [columns_reference, columns_launch]


def inputs(batch: int, heads: tuple[int, int], tokens: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    query = torch.randn((batch, heads[0], tokens, dim), generator=generator) * 2
    key = torch.randn((batch, heads[1], tokens, dim), generator=generator)
    return poisoned(query.to(dtype)), poisoned(key.to(dtype))


def naive(query: Tensor, key: Tensor, scaling: float, padding: Tensor | None) -> tuple[Tensor, Tensor]:
    """float64 sums [B, H, T] and log-sum-exps [B, Hq, T] from whole matrices."""
    group = query.shape[1] // key.shape[1]
    logits = query.double() @ key.double().repeat_interleave(group, dim=1).transpose(2, 3) * scaling
    place = torch.arange(query.shape[2])
    seen = (place <= place[:, None])[None].repeat(len(query), 1, 1)
    if padding is not None:
        seen &= (place >= padding[:, None])[:, None]
    logits = logits.masked_fill(~seen[:, None], -torch.inf)
    probs = logits.softmax(dim=-1).nan_to_num(0.0)
    return probs.sum(dim=2).unflatten(1, (-1, group)).sum(dim=2), logits.logsumexp(dim=-1)


def check(query: Tensor, key: Tensor, padding: list[int] | None = None) -> None:
    scaling = query.shape[-1] ** -0.5
    pad = None if padding is None else torch.tensor(padding, dtype=torch.int32)
    wanted, wanted_lse = naive(query, key, scaling, pad)
    for implementation in IMPLEMENTATIONS:
        lse = implementation.log_sum_exp(query, key, scaling, pad)
        assert lse.dtype == torch.float32
        assert torch.equal(lse == -torch.inf, wanted_lse == -torch.inf)
        real = wanted_lse > -torch.inf
        assert (lse.double() - wanted_lse)[real].abs().max() <= TOLERANCE * 8
        got = implementation.column_sums(query, key, poisoned(lse), scaling, pad)
        error = (got.double() - wanted).abs().max() / (query.shape[2] * query.shape[1] // key.shape[1])
        assert error <= TOLERANCE, implementation.__name__


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 127, 128, 129, 300])
def test_lengths(tokens: int, dtype: torch.dtype) -> None:
    check(*inputs(1, (2, 1), tokens, 64, dtype))


@pytest.mark.parametrize("group", [1, 3, 4, 8])
@pytest.mark.parametrize("dim", [64, 128])
def test_grouped_query_heads(group: int, dim: int) -> None:
    check(*inputs(2, (2 * group, 2), 70, dim, torch.float16))


@pytest.mark.parametrize("padding", [[0, 1], [127, 128], [129, 259], [130, 130]])
def test_padding_counts_neither_as_key_nor_as_query(padding: list[int]) -> None:
    check(*inputs(2, (2, 1), 260, 64, torch.float16), padding)


def test_tiles_of_other_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of keys and queries need not be equally large."""
    query, key = inputs(1, (1, 1), 150, 64, torch.float16)
    wanted, _ = naive(query, key, 0.125, None)
    lse = columns_reference.log_sum_exp(query, key, 0.125)
    for keys, queries in ((32, 64), (64, 32)):
        constants = {"G": 1, "D": 64, "BK": keys, "BQ": queries, "STAGES": 2}
        monkeypatch.setattr(columns_launch, "columns_constants", lambda *_, c=constants: c)
        monkeypatch.setattr(columns_launch, "TILE", keys)
        got = columns_launch.column_sums(query, key, lse, 0.125)
        assert (got.double() - wanted).abs().max() <= TOLERANCE * 150


def test_nothing_is_written_around_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key = inputs(1, (2, 1), 130, 64, torch.float16)
    lse = columns_reference.log_sum_exp(query, key, 0.125)
    buffers: list[Tensor] = []

    def empty(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
        buffers.append(poisoned(torch.zeros(shape, dtype=dtype, device=device)))
        return buffers[-1]

    monkeypatch.setattr(columns_launch.torch, "empty", empty)
    columns_launch.column_sums(query, key, lse, 0.125)
    columns_launch.log_sum_exp(query, key, 0.125)
    assert len(buffers) == 2
    assert all(guard_is_whole(buffer) for buffer in buffers)


def test_memory_of_the_reference_is_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """No block of logits has more rows than a block of queries."""
    sizes = []
    blocks = columns_reference._blocks

    def watched(*arguments: object) -> object:
        for block in blocks(*arguments):  # type: ignore[arg-type]
            sizes.append(block.logits.shape[-2])
            yield block

    monkeypatch.setattr(columns_reference, "_blocks", watched)
    query, key = inputs(1, (1, 1), 300, 64, torch.float16)
    columns_reference.log_sum_exp(query, key, 0.125)
    assert sizes == [128, 128, 44]


def test_what_does_not_fit_is_refused() -> None:
    query, key = inputs(2, (4, 2), 9, 64, torch.float16)
    lse = torch.zeros(2, 4, 9)
    wrong = {
        "don't belong": (query, key[:, :, :8], lse, None),
        "keys are": (query, key.float(), lse, None),
        "padding must": (query, key, lse, torch.zeros(2, dtype=torch.int64)),
        "lse must": (query, key, lse[:, :2], None),
    }
    for message, (q, k, one, padding) in wrong.items():
        with pytest.raises(ValueError, match=message):
            columns_reference.column_sums(q, k, one, 0.125, padding)
