"""The balancer: equal maxima, harmless where there is nothing to balance, and worth its bytes where there are outliers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mikv.quant.affine import dequantize, quantize
from mikv.quant.transforms.balance import balancer


def queries_and_keys(outlier: float = 1.0, tokens: int = 64, dim: int = 32) -> tuple[Tensor, Tensor]:
    """Random queries and keys [T, D]; in every eighth channel keys are `outlier` times as large."""
    random = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, tokens, dim, generator=random)
    k[:, ::8] *= outlier
    return q, k


def maxima(x: Tensor) -> Tensor:
    return x.abs().amax(dim=-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_maxima_of_queries_and_keys_become_equal_in_every_channel(dtype: torch.dtype) -> None:
    q, k = (x.to(dtype) for x in queries_and_keys(outlier=30.0))
    b = balancer(maxima(q), maxima(k))
    assert b.dtype == torch.float32
    assert b.shape == (32,)
    torch.testing.assert_close(maxima(q / b), maxima(k * b))
    torch.testing.assert_close(maxima(k * b), (maxima(q).float() * maxima(k).float()).sqrt())


def test_each_row_head_and_layer_has_its_own() -> None:
    q, k = torch.rand(2, 2, 3, 4, 16, generator=torch.Generator().manual_seed(1)) + 0.1
    b = balancer(q, k)
    assert b.shape == (2, 3, 4, 16)
    assert torch.equal(b[1, 2, 3], balancer(q[1, 2, 3], k[1, 2, 3]))


@pytest.mark.parametrize(("q", "k"), [(0.0, 0.0), (0.0, 5.0), (5.0, 0.0), (float("inf"), 1.0), (1.0, float("inf"))])
def test_a_maximum_that_is_zero_or_infinite_gives_one(q: float, k: float) -> None:
    b = balancer(torch.tensor([q, 4.0]), torch.tensor([k, 1.0]))
    assert b.tolist() == [1.0, 2.0]


@pytest.mark.parametrize("q", [2.0**-24, 1.0, 65504.0])
@pytest.mark.parametrize("k", [2.0**-24, 1.0, 65504.0])
def test_no_overflow_anywhere_in_the_range_of_fp16(q: float, k: float) -> None:
    absmax = torch.tensor([q], dtype=torch.float16), torch.tensor([k], dtype=torch.float16)
    b = balancer(*absmax)
    for value in (b, absmax[0] / b, absmax[1] * b):
        assert value.isfinite().all()
        assert (value > 0).all()
    torch.testing.assert_close(absmax[0] / b, absmax[1] * b)


def test_logits_are_unchanged_where_nothing_is_quantized() -> None:
    q, k = queries_and_keys(outlier=30.0)
    b = balancer(maxima(q), maxima(k))
    torch.testing.assert_close((q / b) @ (k * b).T, q @ k.T, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("bits", [2, 4])
def test_with_outlier_channels_the_logits_lose_less_than_without_balancer(bits: int) -> None:
    """Shared outliers: a step as wide as the outlier channel's range buries the other channels of its group."""
    q, k = queries_and_keys(outlier=20.0)
    exact = q @ k.T

    def error(b: Tensor) -> float:
        stored = dequantize(quantize(k * b, bits, 16))
        return float(((q / b) @ stored.T - exact).square().mean().sqrt())

    balanced, plain = error(balancer(maxima(q), maxima(k))), error(torch.ones(32))
    assert balanced < 0.7 * plain
