"""The outlier-aware channel balancer (eqs. 2-4 of the paper), and its sibling for rotated keys.

    b = sqrt(max_t |q| / max_t |k|)                       max: the paper's
    b = (mean_t q^2 / mean_t k^2) ^ (1/4)                 rms
    stored key = Q(k * b)      logits = (q / b) . Q(k * b)

Keys and queries have outliers in the same few channels; after balancing both are equally large in each, so that the
quantizer's step is spent where the dot product feels it. It is computed per layer, KV head and channel from each prompt alone
and frozen for decoding. Values are not balanced. With grouped-query attention the query heads of a group count together
(our reading: the paper's models of that kind are not described).

Under a rotation the rounding error is nearly white, so that the logits' error goes with (sum_c Q_c / b_c^2)(sum_c b_c^2 K_c),
Q = mean q^2, K = mean k^2; by Cauchy-Schwarz it is least at b^4 = Q / K, the rms form. Without one, min-max rounding is served
better by the max form.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from mikv.options import check_choice
from mikv.quant.base import Queries, Sample, Side, Transform, Where

if TYPE_CHECKING:
    from torch import Tensor

_FLOOR = 1e-9  # of a mean square: a channel of zeros must not divide by zero


@dataclass(frozen=True)
class Balance(Transform):
    """Scale channels by b. by: max or rms, see above; b is stored in FP32 (max, as ever) or FP16 (rms)."""

    by: str = "max"

    order: ClassVar[int] = 2

    def __post_init__(self) -> None:
        check_choice("balance: by", self.by, ("max", "rms"))

    @property
    def keys_only(self) -> bool:
        return True

    def fit(self, sample: Sample) -> Side:
        """{"balancer": [L, B, H, D]}; 1 where a maximum is zero or not finite, or no token counts."""
        assert sample.queries is not None, "refused when the chain was made"
        real = sample.real[None, :, None, :, None]
        if self.by == "max":
            return {"balancer": balancer(sample.queries.absmax, sample.x.abs().masked_fill(~real, 0).amax(dim=3))}
        count = real.sum(dim=3).clamp(min=1)
        square = sample.x.square().masked_fill(~real, 0).sum(dim=3) / count
        b = (sample.queries.square.clamp(min=_FLOOR) / square.clamp(min=_FLOOR)) ** 0.25
        b = b.masked_fill(~real.any(dim=3), 1.0)
        return {"balancer": b.clamp(2**-14, 65504).half()}

    def apply(self, x: Tensor, side: Side, where: Where) -> Tensor:
        return x * side["balancer"].float().unsqueeze(3)

    def undo(self, y: Tensor, side: Side, where: Where) -> Tensor:
        return y / side["balancer"].float().unsqueeze(3)

    def query(self, q: Tensor, side: Side) -> Tensor:
        return q / side["balancer"].float().unsqueeze(3)

    def after(self, queries: Queries, side: Side) -> Queries | None:
        b = side["balancer"].float()
        return Queries(queries.absmax / b, queries.square / b.square())


def balancer(query_absmax: Tensor, key_absmax: Tensor) -> Tensor:
    """b in float32, same shape as both inputs ([..., D], non-negative). 1 where a maximum is zero or not finite."""
    import torch

    q, k = query_absmax.to(torch.float32), key_absmax.to(torch.float32)
    b = torch.sqrt(q / k)
    return torch.where(torch.isfinite(b) & (b > 0), b, torch.ones_like(b))
