"""How a kernel takes packed codes apart. Plain Python: numbers and text that are compiled into the kernels.

The packing (mikv/quant/packing.py) has W = D * bits / 16 words per vector, and word w holds channel w + W * field. Tensor
cores take tiles of at least 16 channels, so `width` = max(16, W) words are read side by side: a vector with fewer words is
read `width / W` times, each copy looking at the next field. Unpacking gives `tiles` tiles of `width` channels, and tile t
holds the channels t * width + (0 .. width - 1). (8-bit codes are bytes; two make a word, tile t holds channels 2 * w + t.)

A code is never converted to a number. Its bits, left where they are in the word's lower ten, *are* an FP16 number: a
subnormal, code * 2^position * 2^-24. 2^position is divided out of the query (exact) or of the output; 2^24 likewise. Where
a field lies above the tenth bit, the word is shifted first. So one instruction (an AND with a mask, on two neighbouring
words at once) makes two operands. Worked example, 2 bits and D = 128: 16 words, 8 tiles; word 0x...ab, tile 0 = word & 3,
tile 1 = word & 12 (4 times the code), ... tile 4 = word & 0x300 (256 times the code), tile 5 = (word >> 10) & 3.

3-bit codes are a plane of two low bits and one of the high bit. The high plane has half as many words, so that its copies
line up with the low plane's tiles, and an OR puts the bit above its two neighbours. (5-bit codes likewise: four bits and one.)

Codes that stand for levels (mikv/quant/codes/codebook.py, trellis.py) lie in the same tiles, but are taken out as integers
and looked up.
"""

from __future__ import annotations

from dataclasses import dataclass

MANTISSA = 10  # bits of an FP16 number that a subnormal may use
LANES = 16  # least number of channels that a tensor core takes


@dataclass(frozen=True)
class Plane:
    """One plane of packed codes: `words` 16-bit words per vector, from word `first` of the row on, of fields of `bits`, and
    how many copies of them make a tile's width."""

    bits: int
    words: int
    first: int
    copies: int


@dataclass(frozen=True)
class Layout:
    """Tiles of a vector of `dim` channels stored at `bits` bits (16 = raw: one tile, nothing to unpack)."""

    bits: int
    dim: int

    def __post_init__(self) -> None:
        if self.dim < 32 or self.dim & (self.dim - 1):
            raise ValueError(f"head_dim={self.dim}: the kernels take powers of two from 32 on")

    @property
    def low(self) -> Plane:
        bits = self.bits - (self.bits in (3, 5))
        words = self.dim * bits // 16
        return Plane(bits, words, 0, max(1, LANES // words))

    @property
    def high(self) -> Plane | None:
        words = self.dim // 16
        return Plane(1, words, self.low.words, self.width // words) if self.bits in (3, 5) else None

    @property
    def row(self) -> int:
        """16-bit words of a stored vector."""
        return self.dim * self.bits // 16

    @property
    def width(self) -> int:
        """Channels of a tile."""
        return max(LANES, self.low.words)

    @property
    def tiles(self) -> int:
        return self.dim // self.width

    @property
    def stride(self) -> int:
        """Bits from a tile's field to the next tile's, in both planes."""
        return self.low.bits * self.low.copies

    @property
    def _per_shift(self) -> int:
        """Tiles that can be masked out of a word before it must be shifted."""
        return (MANTISSA - self.bits) // self.stride + 1

    def shift(self, tile: int) -> int:
        """How far a word is shifted down for this tile."""
        return 0 if self.bits == 16 else tile // self._per_shift * self._per_shift * self.stride

    def position(self, tile: int) -> int:
        """Where the code then lies: the tile holds code * 2^position * 2^-24."""
        return 0 if self.bits == 16 else tile % self._per_shift * self.stride

    def asm(self) -> str:
        """PTX that unpacks two neighbouring words: outputs are the tiles' pairs of FP16 numbers, then come the inputs.

        LLVM does not see that one instruction does for two 16-bit words; written out, unpacking takes half as many.
        Inputs: low words; where the plane is read in copies, their shifts (two 32-bit registers, equal); then the same
        for the high plane.
        """
        source = self.tiles
        text = ["{ .reg .b32 a, b, t, u;"]
        low, source = self._words("a", self.low, source, text)
        high = ""
        if self.high is not None:
            high, source = self._words("b", self.high, source, text)
        for tile in range(self.tiles):
            shift, position = self.shift(tile), self.position(tile)
            mask = (2**self.low.bits - 1) << position
            if self.bits == 8 and tile == 1:  # both upper bytes: one permutation for a shift and a mask
                text.append(f"prmt.b32 ${tile}, {low}, 0, 0x4341;")
                continue
            text.append(f"shr.b32 t, {low}, {shift};" if shift else f"mov.b32 t, {low};")
            if self.high is None:
                text.append(f"and.b32 ${tile}, t, {_twice(mask)};")
                continue
            text.append(f"shr.b32 u, {high}, {shift - 2};" if shift else f"shl.b32 u, {high}, 2;")
            text.append(f"and.b32 t, t, {_twice(mask)};")
            text.append(f"and.b32 u, u, {_twice(4 << position)};")
            text.append(f"or.b32 ${tile}, t, u;")
        return "\n".join([*text, "}"])

    def constraints(self) -> str:
        """Registers of `asm`. Outputs are written before the last input is read, so none may share a register with one."""
        planes = [self.low] if self.high is None else [self.low, self.high]
        inputs = sum(1 if plane.copies == 1 else 3 for plane in planes)
        return ",".join(["=&r"] * self.tiles + ["r"] * inputs)

    @staticmethod
    def _words(name: str, plane: Plane, source: int, text: list[str]) -> tuple[str, int]:
        """Operand that holds a plane's words, shifted where they are copies, and the number of the next operand."""
        if plane.copies == 1:
            return f"${source}", source + 1
        text.append(f"shr.b32 {name}, ${source}, ${source + 1};")
        return name, source + 3


def _twice(mask: int) -> str:
    return f"{mask * 0x10001:#x}"
