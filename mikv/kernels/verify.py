"""Whether Triton's kernels agree with the torch reference on the machine at hand, and how closely they must.

A compiler, a driver or a new GPU can break a kernel that passed every test elsewhere; numbers from a broken one look like
numbers. A run that is going to use the kernels asks first: it takes as long as compiling them, which must be done anyway.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mikv.kernels import pick
from mikv.kernels.segments import Segment, Vectors
from mikv.quant.codes.codebook import Codebook
from mikv.quant.codes.trellis import Trellis

# Largest error over the largest number that could come out (max |value|). FP16: probabilities and queries are rounded to
# 11 bits; BF16: to 8, and the output as well.
TOLERANCE = {torch.float16: 1.5e-3, torch.bfloat16: 1e-2}
# The same for attention mass, which no 16-bit number enters on the way out; per query head.
MASS_TOLERANCE = 2e-3
LARGEST = 4  # value of a random segment


class KernelsDisagree(RuntimeError):
    """The kernels compute something else than the reference here; the message says how far off they are."""


def random_segment(
    rows: int,
    heads: int,
    slots: int,
    dim: int,
    key_bits: int,
    value_bits: int,
    device: torch.device,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float16,
    kind: str = "affine",
) -> Segment:
    """A tier full of random codes with two scales per vector, values within LARGEST: for its kernel as good as a real one,
    and made in no time. Mass is wanted of a 16-bit tier. kind: of codes; codebook and trellis have one scale, and logits that
    are shifted."""

    def vectors(bits: int) -> Vectors:
        shape = (rows, heads, slots)
        if bits == 16:
            raw = torch.randn((*shape, dim), generator=generator, device=device, dtype=dtype)
            return Vectors(16, raw.clamp(-LARGEST, LARGEST))
        width, stored, low, high = (dim, torch.uint8, 0, 256) if bits == 8 else (dim * bits // 16, torch.int16, -(2**15), 2**15)
        codes = torch.randint(low, high, (*shape, width), generator=generator, device=device, dtype=stored)
        if kind != "affine":
            table = (Codebook(bits) if kind == "codebook" else Trellis(bits)).table(device, half=True)
            scale = (torch.rand((*shape, 1), generator=generator, device=device) + 1) / 2 * LARGEST / table.max().float()
            return Vectors(bits, codes, scale.half(), levels=table)
        zero = -2 * torch.rand((*shape, 2), generator=generator, device=device) - 1
        scale = -2 * zero / (2**bits - 1)
        return Vectors(bits, codes, scale.half(), zero.half())

    stop = torch.full((rows, heads), slots, dtype=torch.int32, device=device)
    segment = Segment(vectors(key_bits), vectors(value_bits), stop, wants_mass=key_bits == 16)
    if kind == "affine":
        return segment
    return segment._replace(shift=torch.randn((rows, heads, 1, slots), generator=generator, device=device))


def decode_errors(query: Tensor, segments: Sequence[Segment]) -> tuple[float, float]:
    """How far Triton is from the reference over random segments: outputs as a share of LARGEST, mass per query head."""
    one, other = (pick.decode_attention(query, segments, query.shape[-1] ** -0.5, which) for which in ("triton", "reference"))
    out = float((one.out.float() - other.out.float()).abs().max() / LARGEST)
    group = query.shape[1] // segments[0].keys.data.shape[1]
    mass = [(a - b).abs().max() / group for a, b in zip(one.mass, other.mass, strict=True) if a is not None and b is not None]
    return out, float(torch.stack(mass).max()) if mass else 0.0  # NaN stays NaN


def verify(
    tiers: Sequence[tuple[int, int, str]], query_heads: int, heads: int, dim: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Attend to a small random cache of the given tiers (bits of keys, of values, kind of their codes: affine, codebook,
    trellis) by Triton and by the reference.

    Raises:
        KernelsDisagree: they don't agree. NaN is no agreement.
    """
    generator = torch.Generator(device).manual_seed(0)
    query = torch.randn((2, query_heads, dim), generator=generator, device=device).to(dtype)
    for key_bits, value_bits, kind in tiers:
        segment = random_segment(2, heads, 333, dim, key_bits, value_bits, device, generator, dtype, kind)
        out, mass = decode_errors(query, [segment])
        if not (out <= TOLERANCE[dtype] and mass <= MASS_TOLERANCE):
            raise KernelsDisagree(
                f"the Triton kernel for keys of {key_bits} and values of {value_bits} bits ({kind}) is wrong on this machine: "
                f"off by {out:.1e} of the largest value ({TOLERANCE[dtype]:.0e} is allowed), attention by {mass:.1e}. Choose "
                "attention=reference or reader=working; scripts/bench_kernels.py compares all kernels"
            )
