"""KVarN's code (arXiv 2606.03458): a tile of g tokens is balanced to one deviation in all rows and columns, then rounded.

    keys      rows are channels, columns are tokens        values      rows are tokens, columns are channels
    8 times   u_c += ln std of column c of X / (e^u e^w)   then        w_r += ln std of row r of X / (e^u e^w)
    of all states, the one before the first round included, that with the least
              max / min of the columns' deviations  +  max / min of the rows'
    codes     of x = X / (e^u e^w), with a minimum and a step for each row:  code = round((x - min) / step)
    read      X^ = (code s_r + z_r) t_c       s = e^w step,  z = e^w min,  t = e^u       each in FP16

Outliers of a channel or a token go into the scales, and a row's step is spent on what is left.

As in vllm-project/vllm, vllm/model_executor/layers/quantization/kvarn/sinkhorn.py and vllm/v1/attention/ops/kvarn_store.py
(Apache-2.0): unbiased deviations, taken as 0.001 to 1000; u and w from -0.3 to 10 (a scale is never below 0.74); of equal
spreads the later one; a step of at least 1e-10; codes are found before scale and minimum are rounded to FP16. Ours: what would
lie beyond FP16's range saturates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from mikv.options import check_choice
from mikv.quant.base import Code, Parts
from mikv.quant.codes.affine import check_bits

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_LEAST_STD, _MOST_STD = 1e-3, 1e3
_LEAST_LOG, _MOST_LOG = -0.3, 10.0
_LEAST_DIVISOR, _LEAST_STEP = 1e-8, 1e-10
_TOKENS, _CHANNELS = -2, -1  # dimensions of a tile


@dataclass(frozen=True)
class Kvarn(Code):
    """
    Args:
        bits: 1, 2, 3, 4, 5 or 8.
        block: tokens of a tile.
        by: what has a minimum and a step of its own: each `channel` (keys) or each `token` (values).
        rounds: of balancing.
    """

    bits: int
    block: int = 128
    by: str = "channel"
    rounds: int = 8

    per_block: ClassVar[frozenset[str]] = frozenset(("channel_scale", "channel_zero"))

    def __post_init__(self) -> None:
        check_bits("kvarn", self.bits)
        check_choice("kvarn: by", self.by, ("channel", "token"))
        if self.block < 2:
            raise ValueError(f"kvarn{self.bits}: block={self.block}; a tile has at least 2 tokens")
        if self.rounds < 0:
            raise ValueError(f"kvarn{self.bits}: rounds={self.rounds}; 0 or more")

    @property
    def _other(self) -> str:
        """What has a scale alone."""
        return "token" if self.by == "channel" else "channel"

    def check(self, head_dim: int) -> None:
        if head_dim < 2:
            raise ValueError(f"kvarn: head_dim={head_dim}; a deviation needs at least 2 channels")

    def encode(self, y: Tensor, storage: torch.dtype) -> Parts:
        """{"codes": [..., S, *], "channel_scale": FP16 [..., S / block, D], "token_scale": FP16 [..., S, 1], and "channel_zero"
        or "token_zero", as its scale}"""
        import torch

        from mikv.quant.affine import FP16_MAX
        from mikv.quant.packing import pack

        tiles = y.float().unflatten(-2, (-1, self.block))
        along = _TOKENS if self.by == "channel" else _CHANNELS
        rows, columns = balanced(tiles, along, self.rounds)
        x = tiles / columns / rows
        low, high = x.amin(dim=along, keepdim=True), x.amax(dim=along, keepdim=True)
        step = ((high - low) / (2**self.bits - 1)).clamp(min=_LEAST_STEP)
        codes = ((x - low) / step).round_().clamp_(0, 2**self.bits - 1).to(torch.uint8).flatten(-3, -2)
        scales = {f"{self.by}_scale": rows * step, f"{self.by}_zero": rows * low, f"{self._other}_scale": columns}
        stored = {name: part.clamp(-FP16_MAX, FP16_MAX).half().flatten(-3, -2) for name, part in scales.items()}
        return {"codes": pack(codes, self.bits), **stored}

    def decode(self, parts: Parts) -> Tensor:
        import torch

        from mikv.quant.affine import FP16_MAX
        from mikv.quant.packing import unpack, unpacked_dim

        codes = unpack(parts["codes"], self.bits, unpacked_dim(parts["codes"], self.bits), torch.float32)
        spread = {
            name: part.float().unflatten(-2, (-1, 1 if name in self.per_block else self.block))
            for name, part in parts.items()
            if name != "codes"
        }
        x = codes.unflatten(-2, (-1, self.block)).mul_(spread[f"{self.by}_scale"]).add_(spread[f"{self.by}_zero"])
        return x.mul_(spread[f"{self._other}_scale"]).clamp_(-FP16_MAX, FP16_MAX).flatten(-3, -2)

    def size(self, head_dim: int) -> float:
        channels, tokens = (2, 1) if self.by == "channel" else (1, 2)  # FP16 numbers of each
        return self.bits + 16 * (channels * head_dim + tokens * self.block) / (head_dim * self.block)


def balanced(tiles: Tensor, along: int, rounds: int) -> tuple[Tensor, Tensor]:
    """The scales e^w of rows and e^u of columns of tiles float32 [..., g, D], each with a dimension of 1; a row runs along
    dimension `along`."""
    import torch

    across = _TOKENS + _CHANNELS - along
    log_rows, log_columns = (torch.zeros_like(tiles.narrow(dim, 0, 1)) for dim in (along, across))
    x = tiles
    best_rows, best_columns, least = log_rows.exp(), log_columns.exp(), _spread(x)
    for _ in range(rounds):
        log_columns = (log_columns + _log_std(x, across)).clamp(_LEAST_LOG, _MOST_LOG)
        x = tiles / log_columns.exp() / log_rows.exp()
        log_rows = (log_rows + _log_std(x, along)).clamp(_LEAST_LOG, _MOST_LOG)
        x = tiles / log_columns.exp() / log_rows.exp()
        spread = _spread(x)
        better = spread <= least
        least = torch.where(better, spread, least)
        best_rows = torch.where(better, log_rows.exp(), best_rows)
        best_columns = torch.where(better, log_columns.exp(), best_columns)
    return best_rows, best_columns


def _log_std(x: Tensor, dim: int) -> Tensor:
    return _std(x, dim).clamp(_LEAST_STD, _MOST_STD).log()


def _spread(x: Tensor) -> Tensor:
    """Max / min of the deviations of the rows, and of the columns, added up: [..., 1, 1]."""
    rows, columns = (
        std.amax(dim=(-2, -1), keepdim=True) / std.amin(dim=(-2, -1), keepdim=True).clamp(min=_LEAST_DIVISOR)
        for std in (_std(x, dim) for dim in (_TOKENS, _CHANNELS))
    )
    return rows + columns


def _std(x: Tensor, dim: int) -> Tensor:
    """torch's own warns where there are no tiles."""
    import torch

    centred = x - x.mean(dim=dim, keepdim=True)
    return torch.linalg.vector_norm(centred, dim=dim, keepdim=True) / (x.shape[dim] - 1) ** 0.5
