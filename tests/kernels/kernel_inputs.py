"""Segments of packed caches for the kernels' tests: random, poisoned around and behind what is used, and in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from mikv.kernels.segments import Segment, Vectors
from mikv.quant.codes.affine import Affine
from mikv.quant.codes.codebook import Codebook
from mikv.quant.codes.exact import Exact
from mikv.quant.codes.trellis import Trellis
from mikv.quant.packing import unpack

GUARD = 256  # poisoned elements before and after every buffer


def poisoned(x: Tensor) -> Tensor:
    """A copy of x with NaN (codes: all bits set) right before and behind it."""
    bad = float("nan") if x.is_floating_point() else (255 if x.dtype == torch.uint8 else -1)
    memory = torch.full((x.numel() + 2 * GUARD,), bad, dtype=x.dtype)
    inner = memory[GUARD : GUARD + x.numel()].view(x.shape)
    inner.copy_(x)
    return inner


def guard_is_whole(x: Tensor) -> bool:
    """Whether nothing was written around a poisoned buffer."""
    memory = torch.as_strided(x, (x.numel() + 2 * GUARD,), (1,), x.storage_offset() - GUARD)
    around = torch.cat((memory[:GUARD], memory[-GUARD:]))
    if x.is_floating_point():
        return bool(around.isnan().all())
    return bool((around == (255 if x.dtype == torch.uint8 else -1)).all())


def vectors(x: Tensor, bits: int, group: int, dtype: torch.dtype, used: Tensor, code: str | None = None) -> Vectors:
    """x [R, H, S, D] stored at `bits`, by a code with levels where one is named; slots that are not used (bool [R, H, S]) are
    poisoned."""
    known = {"codebook": Codebook, "trellis": Trellis}[code](bits) if code and bits < 16 else None
    parts = (known or (Exact() if bits == 16 else Affine(bits, group))).encode(x, dtype)
    for part in parts.values():
        bad = float("nan") if part.is_floating_point() else (255 if part.dtype == torch.uint8 else -1)
        part.masked_fill_(~used[..., None], bad)
    parts = {name: poisoned(part) for name, part in parts.items()}
    if bits == 16:
        return Vectors(16, parts["raw"])
    if known is not None:
        return Vectors(bits, parts["codes"], parts["norm"], levels=poisoned(known.table(x.device, half=True)))
    return Vectors(bits, parts["codes"], parts["scale"], parts["zero"])


def segment(
    seed: int,
    rows: int,
    heads: int,
    slots: int,
    dim: int,
    key_bits: int,
    value_bits: int,
    dtype: torch.dtype = torch.float16,
    group: int | None = None,
    stop: list[int] | list[list[int]] | None = None,
    balanced: bool = True,
    wants_mass: bool = True,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
    code: str | None = None,
) -> Segment:
    """Random pairs; keys have outlier channels, values an offset. stop: of each row, or of each head of each row. code: see
    `vectors`."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn((rows, heads, slots, dim), generator=generator) * key_scale
    keys[..., :: dim // 4] *= 4
    values = (torch.randn((rows, heads, slots, dim), generator=generator) + 0.5) * value_scale
    balancer = None
    if balanced and key_bits < 16:
        balancer = torch.exp(torch.randn((rows, heads, dim), generator=generator))
        keys = keys * balancer[:, :, None]
    stops = torch.tensor([slots] * rows if stop is None else stop, dtype=torch.int32)
    stops = (stops[:, None] if stops.dim() == 1 else stops).expand(rows, heads).contiguous()
    used = torch.arange(slots) < stops[..., None]
    group = dim // 2 if group is None else group
    return Segment(
        vectors(keys, key_bits, group, dtype, used, code),
        vectors(values, value_bits, group, dtype, used, code),
        poisoned_int(stops),
        None if balancer is None else poisoned(balancer),
        wants_mass,
    )


def poisoned_int(x: Tensor) -> Tensor:
    """int32 with absurd lengths around it."""
    memory = torch.full((x.numel() + 2 * GUARD,), 2**30, dtype=x.dtype)
    inner = memory[GUARD : GUARD + x.numel()].view(x.shape)
    inner.copy_(x)
    return inner


def query(rows: int, query_heads: int, dim: int, dtype: torch.dtype, seed: int = 99, size: float = 1.0) -> Tensor:
    q = torch.randn((rows, query_heads, dim), generator=torch.Generator().manual_seed(seed)) * size
    return poisoned(q.to(dtype))


def stored(x: Vectors, dim: int) -> Tensor:
    """float64 [R, H, S, D] of what is stored: code * scale + zero, group by group; or level * scale, channel by channel."""
    if x.scale is None:
        return x.data.double()
    codes = unpack(x.data, x.bits, dim).double()
    if x.levels is not None:
        table, known = x.levels.double(), torch.empty_like(codes)
        path = codes.long() % 2
        for c in range(dim):
            index = codes[..., c].long()
            if x.kind == "trellis":
                one, two = (path[..., c - back] if c >= back else torch.zeros_like(index) for back in (1, 2))
                index = 4 * (index // 2) + 2 * (path[..., c] ^ two) + one
            known[..., c] = table[index]
        return known * x.scale.double()
    assert x.zero is not None
    out = torch.empty_like(codes)
    size = dim // x.groups
    for group in range(x.groups):
        here = slice(group * size, (group + 1) * size)
        out[..., here] = codes[..., here] * x.scale[..., group, None].double() + x.zero[..., group, None].double()
    return out


def turned(s: Segment, values: Tensor, row: int, head: int) -> Tensor:
    """Each value [n, D] of one head as the segment's `output` makes it of a sum of that one alone."""
    assert s.output is not None
    rows, heads = s.values.data.shape[:2]
    here = torch.zeros((rows, heads, len(values), values.shape[-1]))
    here[row, head] = values.float()
    return s.output(here, torch.ones((rows, heads, len(values), 1)))[row, head].double()


def naive(q: Tensor, segments: list[Segment], scaling: float) -> tuple[Tensor, list[Tensor]]:
    """Output float64 [R, Hq, D] and mass float64 [R, H, S] of each segment, head by head, over the held slots alone."""
    rows, query_heads, dim = q.shape
    out = torch.zeros((rows, query_heads, dim), dtype=torch.float64)
    mass = [torch.zeros(s.keys.data.shape[:3], dtype=torch.float64) for s in segments]
    keys, values = [stored(s.keys, dim) for s in segments], [stored(s.values, dim) for s in segments]
    for row in range(rows):
        for query_head in range(query_heads):
            logits, weights, slices = [], [], []
            for i, s in enumerate(segments):
                head = query_head * s.keys.data.shape[1] // query_heads
                held = slice(int(s.stop[row, head]))
                one = q[row, query_head].double()
                if s.query is not None:
                    one = s.query[row, query_head].double()
                if s.balancer is not None:
                    one = one / s.balancer[row, head].double()
                logit = keys[i][row, head, held] @ one
                if s.shift is not None:
                    of_group = query_head % (query_heads // s.keys.data.shape[1])
                    logit = logit + s.shift[row, head, of_group].expand(keys[i].shape[2])[held].double()
                logits.append(logit * scaling)
                mine = values[i][row, head, held]
                weights.append(mine if s.output is None else turned(s, mine, row, head))
                slices.append((i, head, held))
            probs = torch.cat(logits).softmax(dim=0)
            if len(probs):
                out[row, query_head] = probs @ torch.cat(weights)
            for (i, head, held), part in zip(slices, probs.split([len(x) for x in logits]), strict=True):
                mass[i][row, head, held] += part
    return out, mass
