"""How a kernel turns packed codes into the levels that they stand for, without a table in memory. Plain Python, as
mikv/kernels/layout.py: text that is compiled into the kernels.

A byte permutation (PRMT) picks four of eight bytes by the nibbles of a register: four lookups in a table of eight, in one
instruction. An FP16 number is two bytes, so a table of eight levels is two pairs of registers, of the levels' low and high
bytes. Two neighbouring words lie in a register; their codes are brought into nibbles first:

    index    nibbles of the table's indices, those of tiles 0, 2, ... and those of tiles 1, 3, ... apart (one where a word has
             only nibbles); of a trellis (m, p xor p_2, p_1), see mikv/quant/codes/trellis.py
    order    bytes 0 2 1 3: the two words of a tile come together
    look up  low and high bytes of two tiles, for both words: two permutations
    join     bytes to FP16 numbers: one permutation per tile

Levels are symmetric, so that a table of eight magnitudes and a sign serve for sixteen: the index is turned round where the
number is negative, and the sign is set at the end. Thirty-two take two tables.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from mikv.kernels.layout import Layout
from mikv.quant.codes.codebook import centroids
from mikv.quant.codes.trellis import levels

BITS = (2, 3, 4)
_JOIN = ("0x6240", "0x7351")  # bytes of the first and of the second tile, of [low bytes, high bytes]


@dataclass(frozen=True)
class Lookup:
    """Of vectors of `dim` channels in codes of `bits` bits, of a trellis or a codebook."""

    bits: int
    dim: int
    trellis: bool

    @property
    def layout(self) -> Layout:
        return Layout(self.bits, self.dim)

    @property
    def served(self) -> bool:
        """Whether there is text for it: bits whose tables fit, and fields that lie in nibbles."""
        return self.bits in BITS and self.layout.stride in (2, 4)

    @property
    def levels(self) -> tuple[float, ...]:
        return levels(self.bits) if self.trellis else centroids(self.bits)

    @property
    def _signed(self) -> bool:
        """Whether tables hold magnitudes."""
        return len(self.levels) > 8

    def asm(self) -> str:
        """PTX with the tiles' pairs of FP16 levels as outputs. Inputs: low words and, where they are copies, their shifts
        (twice), high words likewise; of a trellis the words that show the path bits one channel and two before."""
        layout = self.layout
        text: list[str] = ["{ .reg .b32 a, h, i, j, n, s, t, u, x, y, lo, hi, p, q;"]
        source = _words("a", layout.tiles, layout.low.copies, text)
        if layout.high is not None:
            source = _words("h", source, layout.high.copies, text)
        apart = 4 // layout.stride  # tiles of a nibble
        for part in range(apart):
            self._index(part * layout.stride, source, text)
            text.append("prmt.b32 j, i, 0, 0x3120;")
            tiles = range(part, layout.tiles, apart)
            for place in range(0, len(tiles), 2):
                if place:
                    text.append("shr.b32 j, j, 16;")
                self._look_up(text)
                for tile, join in zip(tiles[place : place + 2], _JOIN, strict=False):
                    text.append(f"prmt.b32 ${tile}, lo, hi, {join};")
                    if self._signed:
                        text.append(f"shl.b32 t, s, {15 - 4 * (tile // apart)};")
                        text += ["and.b32 t, t, 0x80008000;", f"xor.b32 ${tile}, ${tile}, t;"]
        return "\n".join([*text, "}"])

    def constraints(self) -> str:
        """Registers of `asm`."""
        layout = self.layout
        planes = [layout.low] if layout.high is None else [layout.low, layout.high]
        inputs = sum(1 if plane.copies == 1 else 3 for plane in planes) + (2 if self.trellis else 0)
        return ",".join(["=&r"] * layout.tiles + ["r"] * inputs)

    def _index(self, down: int, source: int, text: list[str]) -> None:
        """i: nibbles of indices, of magnitudes where tables hold those, from fields that lie `down` bits above a nibble's
        lowest; s: then a bit per nibble, 1 where the number is positive."""
        text.append(f"shr.b32 x, a, {down};")
        if self.trellis:
            text += [f"shr.b32 p, ${source}, {down};", f"shr.b32 q, ${source + 1}, {down};"]
            text += ["and.b32 q, q, 0x11111111;", "xor.b32 x, x, q;", "shl.b32 i, x, 1;"]
            text.append(f"and.b32 i, i, {_nibbles(0xE if self.bits == 4 else 0x6)};")
            text += ["and.b32 p, p, 0x11111111;", "or.b32 i, i, p;"]
        else:
            text.append(f"and.b32 i, x, {_nibbles(0x7 if self.bits == 4 else 0x3)};")
        if self.layout.high is not None:
            text += [f"shr.b32 y, h, {down};", "and.b32 y, y, 0x11111111;"]
            text += ["mov.b32 s, y;"] if self.trellis else ["shl.b32 y, y, 2;", "or.b32 i, i, y;"]
        elif self._signed:
            text += ["shr.b32 s, x, 3;", "and.b32 s, s, 0x11111111;"]
        if self._signed:  # turned round: all bits are flipped where s is 0
            flips = len(self.levels) // 2 - 1
            text += ["xor.b32 n, s, 0x11111111;", f"mul.lo.u32 n, n, {flips};", "xor.b32 i, i, n;"]

    def _look_up(self, text: list[str]) -> None:
        """lo, hi: bytes of the levels that the four lower nibbles of j name; of minus magnitudes where there is a sign."""
        half = len(self.levels) // 2
        known = [-x for x in self.levels[half:]] if self._signed else list(self.levels)
        octets = [struct.pack("<e", x) for x in known]
        two = len(known) > 8
        if two:
            text.append("and.b32 t, j, 0x77777777;")
            # a byte of ones where the nibble's highest bit is set
            text += ["shr.b32 n, j, 1;", "and.b32 n, n, 0x44444444;", "prmt.b32 n, 0, 0xffffffff, n;", "not.b32 x, n;"]
        for name, which in (("lo", 0), ("hi", 1)):
            column = [octet[which] for octet in octets]
            text.append(f"prmt.b32 {name}, {_register(column[:4])}, {_register(column[4:8])}, {'t' if two else 'j'};")
            if two:
                text.append(f"prmt.b32 u, {_register(column[8:12])}, {_register(column[12:16])}, t;")
                text += ["and.b32 u, u, n;", f"and.b32 {name}, {name}, x;", f"or.b32 {name}, {name}, u;"]


def _words(name: str, source: int, copies: int, text: list[str]) -> int:
    """A plane's words, shifted where they are copies; number of the next operand."""
    if copies == 1:
        text.append(f"mov.b32 {name}, ${source};")
        return source + 1
    text.append(f"shr.b32 {name}, ${source}, ${source + 1};")
    return source + 3


def _register(octets: list[int]) -> str:
    return f"{sum(octet << 8 * i for i, octet in enumerate(octets)):#x}"


def _nibbles(mask: int) -> str:
    return f"{mask * 0x11111111:#x}"
