"""How packed words are taken apart: the PTX that a GPU runs, executed here instruction by instruction on random words."""

from __future__ import annotations

import itertools
import re

import pytest
import torch

from mikv.kernels.layout import Layout
from mikv.kernels.lookup import Lookup
from mikv.quant.codes.codebook import Codebook
from mikv.quant.codes.trellis import Trellis, read
from mikv.quant.packing import pack

SHAPES = [(bits, dim) for bits in (8, 4, 3, 2) for dim in (64, 128, 256)]


def run_ptx(text: str, operands: list[int]) -> list[int]:
    """Execute the few instructions that Layout.asm writes on 32-bit registers; operands are changed in place."""
    names: dict[str, int] = {}

    def value(name: str) -> int:
        if name.startswith("$"):
            return operands[int(name[1:])]
        return names[name] if name in names else int(name, 0)

    for line in re.findall(r"([\w.]+\.[bu]32) ([^;]+);", text.split(";", 1)[1]):
        target, *sources = [part.strip() for part in line[1].split(",")]
        x = [value(source) for source in sources]
        match line[0]:
            case "mov.b32":
                result = x[0]
            case "and.b32":
                result = x[0] & x[1]
            case "or.b32":
                result = x[0] | x[1]
            case "shr.b32":
                result = x[0] >> x[1]
            case "shl.b32":
                result = x[0] << x[1] & 0xFFFFFFFF
            case "xor.b32":
                result = x[0] ^ x[1]
            case "not.b32":
                result = ~x[0] & 0xFFFFFFFF
            case "mul.lo.u32":
                result = x[0] * x[1] & 0xFFFFFFFF
            case "prmt.b32":
                assert not x[2] & 0x8888, "the mode that repeats a sign"
                octets = [(x[0] | x[1] << 32) >> 8 * i & 255 for i in range(8)]
                result = sum(octets[x[2] >> 4 * i & 7] << 8 * i for i in range(4))
            case other:
                raise AssertionError(f"an instruction that this test doesn't know: {other}")
        if target.startswith("$"):
            operands[int(target[1:])] = result
        else:
            names[target] = result
    return operands


def words_of(layout: Layout, words: torch.Tensor, lane: int) -> list[int]:
    """Operands of two neighbouring lanes: each plane's words and, where they are copies, their shifts."""
    inputs = []
    for plane in (layout.low, layout.high):
        if plane is not None:
            first = plane.first + lane % plane.words
            inputs.append(int(words[first]) | int(words[first + 1]) << 16)
            inputs += [lane // plane.words * plane.bits] * 2 if plane.copies > 1 else []
    return inputs


@pytest.mark.parametrize(("bits", "dim"), SHAPES)
def test_the_tiles_are_the_codes(bits: int, dim: int) -> None:
    """pack -> PTX, two neighbouring words at a time -> FP16 numbers == code * 2^(position - 24), channel by channel."""
    layout = Layout(bits, dim)
    codes = torch.randint(0, 2**bits, (dim,), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
    words = pack(codes, bits)
    words = (words.view(torch.int16) if bits == 8 else words).to(torch.int64) & 0xFFFF
    assert layout.row == len(words)
    seen = []
    for lane in range(0, layout.width, 2):
        inputs = words_of(layout, words, lane)
        assert layout.constraints() == ",".join(["=&r"] * layout.tiles + ["r"] * len(inputs))
        registers = run_ptx(layout.asm(), [0] * layout.tiles + inputs)
        for tile in range(layout.tiles):
            halves = torch.tensor([registers[tile] & 0xFFFF, registers[tile] >> 16]).to(torch.uint16).view(torch.float16)
            for i, half in enumerate(halves.tolist()):
                channel = 2 * (lane + i) + tile if bits == 8 else layout.width * tile + lane + i
                seen.append(channel)
                assert half * 2.0 ** (24 - layout.position(tile)) == codes[channel], f"channel {channel}"
    assert sorted(seen) == list(range(dim))


def test_the_worked_example() -> None:
    """What the module's text says about 2 bits and 128 channels."""
    layout = Layout(2, 128)
    assert (layout.low.words, layout.tiles, layout.width) == (16, 8, 16)
    assert "and.b32 $1, t, 0xc000c" in layout.asm()
    assert [(layout.shift(tile), layout.position(tile)) for tile in (0, 1, 4, 5)] == [(0, 0), (0, 2), (0, 8), (10, 0)]


def test_a_head_that_the_kernels_do_not_take() -> None:
    with pytest.raises(ValueError, match="head_dim=96"):
        Layout(2, 96)


@pytest.mark.parametrize(("bits", "dim"), [(bits, dim) for bits in (2, 3, 4) for dim in (64, 128, 256)])
@pytest.mark.parametrize("trellis", [True, False])
def test_the_tiles_are_the_levels(bits: int, dim: int, trellis: bool) -> None:
    """pack -> PTX -> FP16 levels, channel by channel; the words of the channels before are made here."""
    layout = Layout(bits, dim)
    assert Lookup(bits, dim, trellis).served
    codes = torch.randint(0, 2**bits, (dim,), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
    words = pack(codes, bits).to(torch.int64) & 0xFFFF
    code = (Trellis if trellis else Codebook)(bits)
    table = code.table(torch.device("cpu"))
    wanted = (read(codes, table) if trellis else table[codes.int()]).half()
    path = codes & 1
    found = torch.empty(dim, dtype=torch.float16)
    for lane in range(0, layout.width, 2):
        inputs = words_of(layout, words, lane)
        for back in (1, 2) if trellis else ():
            before = 0
            for half, tile in itertools.product((0, 1), range(layout.tiles)):
                channel = tile * layout.width + lane + half - back
                bit = int(path[channel]) if channel >= 0 else 0
                before |= bit << (16 * half + layout.stride * tile)
            inputs.append(before)
        assert Lookup(bits, dim, trellis).constraints() == ",".join(["=&r"] * layout.tiles + ["r"] * len(inputs))
        registers = run_ptx(Lookup(bits, dim, trellis).asm(), [0] * layout.tiles + inputs)
        for tile in range(layout.tiles):
            halves = torch.tensor([registers[tile] & 0xFFFF, registers[tile] >> 16]).to(torch.uint16).view(torch.float16)
            found[tile * layout.width + lane : tile * layout.width + lane + 2] = halves
    assert torch.equal(found, wanted)
