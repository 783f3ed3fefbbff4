"""One norm per vector and a trellis: neighbours decide together between two codebooks, for no more bits.

A codebook of 2^(b+1) levels, twice as fine as b bits allow, is dealt out in turns to four subsets, D0 D1 D2 D3 D0 ... A code is
(m, p): p is the path's bit, m says which level of the subset. Which subset it is, the path says (Ungerboeck's four states):

    level_j = L[4 m_j + 2 (p_j xor p_j-2) + p_j-1]        p_-1 = p_-2 = 0

so that each channel has 2^b levels to choose from, even or odd ones, and its choice decides what its neighbours have. Viterbi's
algorithm finds the path of least error. Trellis-coded quantization: Marcellin and Fischer, IEEE Trans. Commun. 38 (1990) 82;
for weights, with long paths and computed levels, QTIP (arXiv 2406.11235). For caches ours: four states, so that encoding is
cheap, and reading needs two neighbours' bits and no recursion.

The norm is as in mikv/quant/codes/codebook.py, the bytes are the same, and the relative error is 24 to 31 % less: .089, .023,
.0061 at 2, 3, 4 bits instead of .117, .033, .0089 (D = 64; `python scripts/fit_trellis.py --errors`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mikv.quant.codes.affine import check_bits
from mikv.quant.codes.codebook import Levels

if TYPE_CHECKING:
    from torch import Tensor

# The positive levels for N(0, 1), by bits; scripts/fit_trellis.py computes them.
_LEVELS: dict[int, tuple[float, ...]] = {
    1: (0.3925, 1.1872),
    2: (0.1746, 0.6337, 1.0637, 1.8505),
    3: (0.093, 0.3229, 0.5235, 0.773, 1.0229, 1.3377, 1.7589, 2.4349),
    4: (
        0.0504, 0.17, 0.2728, 0.3968, 0.5051, 0.6334, 0.751, 0.8895,
        1.0237, 1.179, 1.3397, 1.531, 1.7579, 2.0449, 2.4253, 3.0051,
    ),
    5: (
        0.0298, 0.0969, 0.1558, 0.223, 0.2829, 0.3507, 0.4118, 0.4798,
        0.5425, 0.6122, 0.6772, 0.7495, 0.8186, 0.894, 0.9655, 1.0425,
        1.1172, 1.198, 1.279, 1.3657, 1.4527, 1.5467, 1.6456, 1.7537,
        1.8702, 2.0036, 2.1526, 2.3238, 2.5251, 2.7685, 3.0854, 3.5798,
    ),
}  # fmt: skip
_AT_ONCE = {"cpu": 2**12}  # vectors that are searched at once: on a CPU what stays in its cache, else what fills a GPU
_FILLS = 2**17


@dataclass(frozen=True)
class Trellis(Levels):
    """bits: 1 to 5."""

    bits: int

    def __post_init__(self) -> None:
        check_bits("trellis", self.bits, (5, 4, 3, 2, 1))

    @property
    def known(self) -> tuple[float, ...]:
        return levels(self.bits)

    def choose(self, unit: Tensor, table: Tensor) -> Tensor:
        import torch

        pieces = unit.flatten(0, -2).split(_AT_ONCE.get(unit.device.type, _FILLS))
        return torch.cat([search(some, table) for some in pieces]).view(unit.shape)

    def read(self, codes: Tensor, table: Tensor) -> Tensor:
        return read(codes, table)


def levels(bits: int) -> tuple[float, ...]:
    """The 2^(bits + 1) levels, rising."""
    half = _LEVELS[bits]
    return (*(-x for x in reversed(half)), *half)


def read(codes: Tensor, table: Tensor) -> Tensor:
    """Levels of codes, uint8 [..., D] -> float32 [..., D]. table: float32 [2^(bits + 1)]."""
    path = codes & 1
    index = ((codes >> 1 << 2) | (path << 1)).int()
    index[..., 2:] ^= path[..., :-2] << 1
    index[..., 1:] |= path[..., :-1]
    return table[index]


def search(x: Tensor, table: Tensor) -> Tensor:
    """The codes of least square error, uint8 [N, D]. x: float32 [N, D]; table: see `read`. On a GPU by a kernel."""
    import torch

    edges, within, nearest = cells(table)
    cell = torch.bucketize(x, edges, out_int32=True)
    if x.device.type == "cuda":
        from mikv.kernels.search_launch import search as by_kernel

        return by_kernel(x, cell, nearest, within)
    return walk(x, cell, nearest, within)


def walk(x: Tensor, cell: Tensor, nearest: Tensor, within: Tensor) -> Tensor:
    """Viterbi's algorithm. x: float32 [N, D]; cell: int32 [N, D], where it lies; nearest: float32 [4, cells], the nearest level
    of each subset; within: uint8 [4, cells], its number in it. Returns codes uint8 [N, D]."""
    import torch

    count, dim = x.shape
    x, cell = x.T.contiguous(), cell.T.contiguous()  # [D, N]
    cost = torch.stack([subset[cell] for subset in nearest], dim=1)
    cost = cost.sub_(x[:, None]).square_().view(dim, 2, 2, count)  # of the nearest in a subset, [D, p xor p_2, p_1, N]
    other = cost.flip(1)  # the same where p_2 = 1: [D, p, p_1, N]
    error = x.new_full((2, 2, count), torch.inf)  # of the best path to [p_2, p_1]
    error[0, 0] = 0
    back = torch.empty((dim, 2, 2, count), dtype=torch.bool, device=x.device)  # its p_2, by channel, p and p_1
    for channel in range(dim):
        zero, one = cost[channel] + error[0], other[channel] + error[1]
        torch.lt(one, zero, out=back[channel])
        error = torch.minimum(zero, one).transpose(0, 1)
    state = error.transpose(0, 1).flatten(0, 1).argmin(dim=0, keepdim=True)  # 2 p + p_1
    states = torch.empty((dim, count), dtype=torch.int64, device=x.device)
    for channel in range(dim - 1, -1, -1):
        states[channel] = state[0]
        state = (state & 1) * 2 + back[channel].view(4, count).gather(0, state)
    path = (states >> 1).to(torch.uint8)
    subset = (path ^ _before(path, 2)) << 1 | _before(path, 1)
    return (within.flatten()[subset.int() * within.shape[1] + cell] << 1 | path).T


def cells(table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The numbers between which another level of some subset becomes the nearest, rising; which one is the nearest in each cell
    between them, uint8 [4, cells], and the level itself, float32 [4, cells]. A table of 4 levels has one cell."""
    import torch

    own = table.view(-1, 4).T  # [4, levels]
    middles = (own[:, 1:] + own[:, :-1]) / 2
    order = middles.flatten().argsort()
    subset = order // max(1, middles.shape[1])
    passed = (subset == torch.arange(4, device=table.device)[:, None]).cumsum(dim=1)
    within = torch.cat((passed.new_zeros((4, 1)), passed), dim=1)
    return middles.flatten()[order].contiguous(), within.to(torch.uint8), own.gather(1, within)


def _before(path: Tensor, channels: int) -> Tensor:
    """Path bits [D, N] of so many channels before; 0 before the first."""
    from torch.nn.functional import pad

    return pad(path, (0, 0, channels, 0))[: len(path)]
