"""Codes of 1, 2, 3, 4, 5 or 8 bits in no more bytes than they need.

Codes of a token's head are packed along its channels into 16-bit words (the operand width of tensor cores, so that a
GPU kernel unpacks two operands per instruction). The fields of a word are *blocks* of
channels, not neighbours: with D channels and W = D * bits / 16 words,

    word w holds channel w in its lowest bits, then channel w + W, w + 2 W, ...

Worked example, D = 16, bits = 4, W = 4 words of 4 fields; channel c holds code c:

    word 0 = channels 0, 4, 8, 12  = 0x0 | 0x4 << 4 | 0x8 << 8 | 0xC << 12 = 0xC840
    word 1 = channels 1, 5, 9, 13  = 0xD951, word 2 = 0xEA62, word 3 = 0xFB73

3-bit codes are a 2-bit plane (low bits, D / 8 words) followed by a 1-bit plane (high bits, D / 16 words), 5-bit codes a 4-bit
plane and a 1-bit plane. 8-bit codes fill whole bytes and stay as they are. Words are int16 tensors: torch has no shifts for
uint16; the bits are the same."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

PACKED_BITS = (8, 5, 4, 3, 2, 1)
_SPLIT = {3: 2, 5: 4}  # bits of the low plane, where the highest bit has a plane of its own


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 [..., D] with values below 2^bits -> int16 [..., D * bits / 16] (uint8 [..., D] for 8 bits)."""
    _check(codes.shape[-1], bits)
    if bits == 8:
        return codes
    if bits in _SPLIT:
        low = _SPLIT[bits]
        return torch.cat((_pack_plane(codes & (2**low - 1), low), _pack_plane(codes >> low, 1)), dim=-1)
    return _pack_plane(codes, bits)


def unpack(words: Tensor, bits: int, head_dim: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    """The inverse of `pack`: [..., D], as numbers of any dtype."""
    _check(head_dim, bits)
    if bits == 8:
        return words.to(dtype)
    codes = torch.empty((*words.shape[:-1], head_dim), dtype=dtype, device=words.device)
    low = _SPLIT.get(bits, bits)
    plane, high = words.split((head_dim * low // 16, head_dim * (bits - low) // 16), dim=-1)
    for part, field in zip(codes.split(plane.shape[-1], dim=-1), _fields(plane, low), strict=True):
        part.copy_(field)
    if bits != low:
        for part, field in zip(codes.split(high.shape[-1], dim=-1), _fields(high, 1), strict=True):
            part += field << low
    return codes


def unpacked_dim(words: Tensor, bits: int) -> int:
    """D of packed codes."""
    return words.shape[-1] if bits == 8 else words.shape[-1] * 16 // bits


def _pack_plane(codes: Tensor, bits: int) -> Tensor:
    fields = codes.to(torch.int16).unflatten(-1, (16 // bits, -1))  # [..., field, word]
    words = fields[..., 0, :].clone()
    for field in range(1, 16 // bits):
        words |= fields[..., field, :] << (bits * field)  # the last field fills the sign bit
    return words


def _fields(words: Tensor, bits: int) -> Iterator[Tensor]:
    for field in range(16 // bits):
        # the sign bit is spread by the shift, and masked away again
        yield (words >> (bits * field)) & (2**bits - 1)


def _check(head_dim: int, bits: int) -> None:
    if bits not in PACKED_BITS:
        raise ValueError(f"{bits}-bit codes can't be packed; choose from {PACKED_BITS}")
    if head_dim % 16:
        raise ValueError(f"head_dim={head_dim} is no multiple of 16: its codes would not fill whole words")
