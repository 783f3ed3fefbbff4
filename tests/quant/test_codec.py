"""The paper's codes: 16 bits are the model's own numbers, fewer are quantizer and packing, and both can be read back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mikv.quant.affine import dequantize, quantize
from mikv.quant.base import storage_dtype
from mikv.quant.codes.affine import Affine
from mikv.quant.codes.exact import Exact

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def vectors(dtype: torch.dtype, *shape: int) -> Tensor:
    return (3 * torch.randn(*shape, generator=torch.Generator().manual_seed(0))).to(dtype)


@pytest.mark.parametrize(
    ("compute", "stored"),
    [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16), (torch.float32, torch.float16)],
)
def test_16_bits_are_the_models_own_and_fp16_for_a_float32_model(compute: torch.dtype, stored: torch.dtype) -> None:
    x = vectors(compute, 2, 5, 64)
    parts = Exact().encode(x, storage_dtype(compute))
    assert set(parts) == {"raw"}
    assert parts["raw"].dtype == stored
    assert torch.equal(parts["raw"], x.to(stored))
    back = Exact().decode(parts)
    assert back.dtype == torch.float32
    assert torch.equal(back, x.to(stored).float())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize(("dim", "group"), [(64, 32), (80, 40), (128, 128), (16, 8)])
def test_fewer_bits_read_back_what_the_quantizer_says(dim: int, group: int, bits: int, dtype: torch.dtype) -> None:
    x = vectors(dtype, 2, 3, dim)
    code = Affine(bits, group)
    parts = code.encode(x, storage_dtype(dtype))
    assert set(parts) == {"codes", "scale", "zero"}
    assert torch.equal(code.decode(parts), dequantize(quantize(x, bits, group)))


@pytest.mark.parametrize("bits", [16, 8, 4, 3, 2])
def test_bytes_of_a_token_are_codes_and_four_bytes_per_group(bits: int) -> None:
    """T8: "2 bit, group 32" is 3.0 bits per element once scale and minimum are counted."""
    parts = (Exact() if bits == 16 else Affine(bits, 32)).encode(vectors(torch.float32, 5, 64), torch.float16)
    per_token = sum(part.shape[-1] * part.element_size() for part in parts.values())
    assert per_token == 64 * bits / 8 + (0 if bits == 16 else 2 * 4)


def test_a_float32_value_beyond_fp16_saturates_at_16_bits_as_it_does_at_8() -> None:
    """An infinite key makes every logit of its head NaN; the quantizer clamps, the 16-bit tier must too."""
    x = torch.tensor([1e5, -1e5, 1.0, 0.0] * 4)
    for bits in (8, 16):
        code = Exact() if bits == 16 else Affine(bits, 8)
        assert code.decode(code.encode(x, torch.float16)).isfinite().all(), f"{bits} bits"
