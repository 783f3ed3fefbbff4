"""Storing vectors in few bits, in torch: balance, quantize and pack a prompt's keys or values, and move single vectors from
one tier into another. The Triton kernels have the same signatures and give the same bits."""

from __future__ import annotations

import torch
from torch import Tensor

from mikv.kernels.decode_reference import read
from mikv.kernels.segments import Vectors
from mikv.quant.codec import Codec, Parts, storage_dtype
from mikv.quant.packing import PACKED_BITS


def encode(x: Tensor, bits: int, groups: int, balancer: Tensor | None = None, take: Tensor | None = None) -> Vectors:
    """Store exact vectors at `bits` bits.

    Args:
        x: [R, H, T, D], any float dtype; finite.
        bits: 16, 8, 4, 3 or 2.
        groups: scales per vector; divides D.
        balancer: float32 [R, H, D], multiplied in before; None = nothing.
        take: int32 [R, H, S], the tokens to store, in this order; None = all.

    Raises:
        ValueError: shapes or dtypes that don't fit.
    """
    check_encode(x, bits, groups, balancer, take)
    if take is not None:
        x = x.gather(2, take.long()[..., None].expand(*take.shape, x.shape[-1]))
    if balancer is not None:
        x = x.float() * balancer[:, :, None]
    dim = x.shape[-1]
    return _vectors(bits, Codec(bits, dim // groups, dim, storage_dtype(x.dtype)).encode(x))


def demote(
    source: Vectors,
    target: Vectors,
    take: Tensor,
    put: Tensor,
    where: Tensor | None = None,
    balancer: Tensor | None = None,
) -> None:
    """Move one vector per row and head from a tier into a lower one, in place: source[take] -> target[put].

    Args:
        source: [R, H, S, ...]; not changed.
        target: [R, H, S', ...]; one slot per row and head is overwritten.
        take, put: int32 [R, H], slots of source and target.
        where: bool [R, H], False = nothing moves there (take and put may be anything); None = all move.
        balancer: float32 [R, H, D]: of keys. Quantized ones in `source` are balanced already; those in `target` will be.

    Raises:
        ValueError: shapes or dtypes that don't fit.
    """
    dim = check_demote(source, target, take, put, where, balancer)
    where = torch.ones_like(take, dtype=torch.bool) if where is None else where
    row, head = where.nonzero(as_tuple=True)
    here = (row, head, take[row, head].long())
    scale, zero = (None if part is None else part[here] for part in (source.scale, source.zero))
    one = Vectors(source.bits, source.data[here], scale, zero)
    x = read(one, dim)
    if balancer is not None:
        if source.bits < 16:
            x = x / balancer[row, head]
        x = x * balancer[row, head]
    new = _vectors(target.bits, Codec(target.bits, dim // target.groups, dim, target.data.dtype).encode(x))
    there = (row, head, put[row, head].long())
    for part, moved in zip(parts_of(target), parts_of(new), strict=True):
        part[there] = moved


def parts_of(vectors: Vectors) -> list[Tensor]:
    """The tensors there are: data, and scale and zero if it is codes."""
    return [part for part in (vectors.data, vectors.scale, vectors.zero) if part is not None]


def _vectors(bits: int, parts: Parts) -> Vectors:
    return Vectors(16, parts["raw"]) if bits == 16 else Vectors(bits, parts["codes"], parts["scale"], parts["zero"])


def check_encode(x: Tensor, bits: int, groups: int, balancer: Tensor | None, take: Tensor | None) -> None:
    """Refuse what a kernel would misread."""
    rows, heads, _, dim = x.shape
    if bits != 16 and bits not in PACKED_BITS:
        raise ValueError(f"{bits} bits; choose from 16, {', '.join(map(str, PACKED_BITS))}")
    if groups < 1 or dim % groups:
        raise ValueError(f"{groups} scales can't share {dim} channels evenly")
    if balancer is not None and (balancer.dtype != torch.float32 or balancer.shape != (rows, heads, dim)):
        raise ValueError(f"balancer must be float32 {[rows, heads, dim]}")
    if take is not None and (take.dtype != torch.int32 or take.shape[:2] != (rows, heads) or take.dim() != 3):
        raise ValueError(f"take must be int32 [{rows}, {heads}, tokens], not {take.dtype} {list(take.shape)}")


def check_demote(
    source: Vectors, target: Vectors, take: Tensor, put: Tensor, where: Tensor | None, balancer: Tensor | None
) -> int:
    """Refuse what a kernel would misread; D."""
    pairs = source.data.shape[:2]
    dims = [
        v.data.shape[3] if v.bits in (16, 8) else v.data.shape[3] * 16 // v.bits for v in (source, target)
    ]  # fmt: skip
    if target.data.shape[:2] != pairs or dims[0] != dims[1]:
        raise ValueError(f"source {list(source.data.shape)} and target {list(target.data.shape)} don't belong together")
    for name, slots in (("take", take), ("put", put)):
        if slots.dtype != torch.int32 or slots.shape != pairs:
            raise ValueError(f"{name} must be int32 {list(pairs)}, not {slots.dtype} {list(slots.shape)}")
    if where is not None and (where.dtype != torch.bool or where.shape != pairs):
        raise ValueError(f"where must be bool {list(pairs)}")
    if balancer is not None and (balancer.dtype != torch.float32 or balancer.shape != (*pairs, dims[0])):
        raise ValueError(f"balancer must be float32 {[*pairs, dims[0]]}")
    for vectors in (source, target):
        if not all(part.is_contiguous() for part in parts_of(vectors)):
            raise ValueError("source and target must be contiguous: they are used where they lie")
    return dims[0]
