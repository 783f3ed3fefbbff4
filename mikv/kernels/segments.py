"""What decode attention reads: segments of a cache, each a tier's packed keys and values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Of codes that the kernels read, with a scale and a minimum, and with levels; the others go through a dense copy.
PACKED_BITS = (8, 4, 3, 2)
LEVEL_BITS = (5, 4, 3, 2, 1)
# FP32 for the torch implementations only: the newest pair of a 32-bit model is exact.
RAW_TYPES = (torch.float16, torch.bfloat16, torch.float32)


class Vectors(NamedTuple):
    """Keys or values of S slots.

    bits: 16, 8, 5, 4, 3, 2 or 1. data: [R, H, S, ...]: at 16 bits the vectors themselves, FP16 or BF16 [..., D] (FP32: see
    RAW_TYPES); else codes as mikv/quant/packing.py packs them, uint8 [..., D] at 8 bits and int16 [..., D * bits / 16] below.
    scale, zero: FP16 [R, H, S, groups]; None at 16 bits. A channel's number is code * scale + zero.
    levels: FP32 or FP16 [2^bits], of a codebook, or [2^(bits + 1)], of a trellis (mikv/quant/codes); then there is no zero and
    one scale per vector, and a channel's number is its level times the scale.
    """

    bits: int
    data: Tensor
    scale: Tensor | None = None
    zero: Tensor | None = None
    levels: Tensor | None = None

    @property
    def kind(self) -> str:
        """raw, affine, codebook or trellis."""
        if self.levels is None:
            return "raw" if self.bits == 16 else "affine"
        return "codebook" if len(self.levels) == 2**self.bits else "trellis"

    @property
    def groups(self) -> int:
        """Scales per vector; 1 where there are none."""
        return 1 if self.scale is None else self.scale.shape[-1]


class Segment(NamedTuple):
    """Pairs of one tier, in slots.

    stop: int32 [R, H], slots from here on hold nothing (whatever bytes lie there are never used). balancer: FP32 [R, H, D],
    what the keys were multiplied by before they were quantized; None = nothing. wants_mass: the attention that each slot
    receives is returned. What other transforms of keys and values leave to be done: query: float [R, Hq, D], in the place of
    the query of all segments (a balancer is divided out of it, too); shift: FP32 [R, H, G or 1, S or 1], added to the logits
    before they are scaled; output: what is made of sum_t p_t v_t (FP32 [R, H, G, D]) and sum_t p_t (FP32 [R, H, G, 1]).

    An evicted tier is no segment, or one without slots.
    """

    keys: Vectors
    values: Vectors
    stop: Tensor
    balancer: Tensor | None = None
    wants_mass: bool = False
    query: Tensor | None = None
    shift: Tensor | None = None
    output: Callable[[Tensor, Tensor], Tensor] | None = None

    @property
    def slots(self) -> int:
        return self.keys.data.shape[2]

    @property
    def groups(self) -> int:
        return max(self.keys.groups, self.values.groups)


class Attention(NamedTuple):
    """out [R, Hq, D], in the query's dtype; a head that sees no slot at all gets zeros. mass: for each segment FP32
    [R, H, S], the attention that its slots received, summed over the query heads of a group and 0 where nothing is held;
    None where it was not wanted."""

    out: Tensor
    mass: list[Tensor | None]


def check_segments(query: Tensor, segments: Sequence[Segment]) -> None:
    """Refuse what a kernel would misread. query [R, Hq, D]."""
    rows, query_heads, dim = query.shape
    for number, segment in enumerate(segments):
        where = f"segment {number}"
        heads = segment.keys.data.shape[1]
        if query_heads % heads:
            raise ValueError(f"{where}: {query_heads} query heads can't share {heads} key/value heads evenly")
        shape = (rows, heads, segment.slots)
        for name, vectors in (("keys", segment.keys), ("values", segment.values)):
            _check_vectors(f"{where}, {name}", vectors, shape, dim)
        both = segment.keys.scale is not None and segment.values.scale is not None
        if both and segment.keys.groups != segment.values.groups:
            raise ValueError(f"{where}: keys have {segment.keys.groups} scales per vector, values {segment.values.groups}")
        stop = segment.stop
        if stop.dtype != torch.int32 or stop.shape != (rows, heads) or not stop.is_contiguous():
            raise ValueError(f"{where}: stop must be int32 [{rows}, {heads}], not {stop.dtype} {list(stop.shape)}")
        balancer = segment.balancer
        if balancer is not None and (balancer.dtype != torch.float32 or balancer.shape != (rows, heads, dim)):
            raise ValueError(f"{where}: balancer must be float32 {[rows, heads, dim]}")
        if balancer is not None and segment.keys.bits == 16:
            raise ValueError(f"{where}: 16-bit keys are stored as they are; a balancer belongs to quantized ones")


def _check_vectors(name: str, vectors: Vectors, shape: tuple[int, int, int], dim: int) -> None:
    bits, data = vectors.bits, vectors.data
    if bits == 16:
        if data.dtype not in RAW_TYPES:
            raise ValueError(f"{name}: 16-bit vectors are float16 or bfloat16 (or float32), not {data.dtype}")
        width = dim
    elif bits in (PACKED_BITS if vectors.levels is None else LEVEL_BITS):
        if data.dtype != (torch.uint8 if bits == 8 else torch.int16):
            raise ValueError(f"{name}: {bits}-bit codes are {'uint8' if bits == 8 else 'int16'}, not {data.dtype}")
        width = dim if bits == 8 else dim * bits // 16
    else:
        known = ", ".join(map(str, PACKED_BITS if vectors.levels is None else LEVEL_BITS))
        raise ValueError(f"{name}: {bits} bits; choose from 16, {known}")
    if data.shape != (*shape, width):
        raise ValueError(f"{name}: {list(data.shape)} where {[*shape, width]} was expected")
    metadata = (vectors.scale, vectors.zero) if vectors.levels is None else (vectors.scale,)
    if any((part is None) != (bits == 16) for part in metadata):
        raise ValueError(f"{name}: scale and zero belong to codes, and only to them")
    levels = vectors.levels
    fit = levels is None or (levels.dtype in RAW_TYPES and len(levels) in (2**bits, 2 ** (bits + 1)))
    if not fit or (levels is not None and (vectors.groups > 1 or vectors.zero is not None)):
        raise ValueError(f"{name}: wanted {2**bits} or {2 ** (bits + 1)} levels, one scale per vector, and no zero")
    for part in metadata:
        if part is not None and (part.dtype != torch.float16 or part.shape[:3] != shape or dim % part.shape[-1]):
            raise ValueError(f"{name}: scale and zero must be float16 {list(shape)} x groups that divide {dim} channels")
    for part in (data, *metadata):
        if part is not None and not part.is_contiguous():
            raise ValueError(f"{name}: not contiguous; a hidden copy would read the cache twice")
