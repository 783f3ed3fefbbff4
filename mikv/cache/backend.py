"""How a compressed cache is read, decided once for a run: as a dense copy, unpacked at each step, or by the kernels.

What the kernels compute is rounded otherwise than what torch computes from a dense copy, so a run that uses them has another
identity (`Backend.protocol`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from mikv.kernels import pick
from mikv.kernels.segments import PACKED_BITS
from mikv.options import IMPLEMENTATIONS, READERS, check_choice
from mikv.policy import Policy
from mikv.quant.base import Code
from mikv.quant.codes.affine import Affine
from mikv.quant.codes.codebook import Levels
from mikv.quant.codes.exact import Exact
from mikv.quant.tier import Tier


class Backend(NamedTuple):
    """reader: one of mikv.options.READERS, see mikv.cache.compressed. attention: which kernels read, `reference` or `triton`,
    None = torch's faster variant for CPUs; only where reader is `kernel`."""

    reader: str = "working"
    attention: str | None = None

    @property
    def kernels(self) -> str:
        """Which code quantizes and packs (with the same bits) and sums up a prompt's attention: `reference` or `triton`."""
        return "triton" if self.attention == "triton" else "reference"

    def reader_of(self, policy: Policy) -> str:
        """The reader that serves a policy: what the kernels can't read is unpacked at each step."""
        if self.reader != "kernel" or all(_served(tier) for tier in policy.tiers if not tier.evicted):
            return self.reader
        return "packed"

    @property
    def protocol(self) -> dict[str, str]:
        """What of it changes an outcome, for a run's identity."""
        return {"attention": self.attention or "cpu"} if self.reader == "kernel" else {}


def _served(tier: Tier) -> bool:
    """Whether the kernels read a tier: codes that they know, in groups of one size, behind transforms that can be folded."""
    codes = [chain.code for chain in (tier.key, tier.value)]
    if not all(_known(code) for code in codes):
        return False
    coded = [code for code in codes if not isinstance(code, Exact)]
    groups = {code.group if isinstance(code, Affine) else 0 for code in coded}  # 0: one scale per vector
    return len(groups) < 2


def _known(code: Code | None) -> bool:
    if isinstance(code, Affine):
        return code.bits in PACKED_BITS
    return isinstance(code, Exact | Levels)


def decide(
    reader: str | None, attention: str | None, device: torch.device, dtype: torch.dtype, head_dim: Callable[[], int]
) -> Backend:
    """What was asked for, completed.

    Args:
        reader: one of READERS; None = `kernel` on a GPU that Triton's kernels serve and where `attention` is given, else
            `working`.
        attention: reference or triton; None = Triton on a GPU, where it can be.
        device, dtype: of the model.
        head_dim: asked for where it matters only: it may take a look at the hub.

    Raises:
        ValueError: an unknown name, or what can't be: the message names the choice.
    """
    if reader is not None:
        check_choice("reader", reader, READERS)
    if attention is not None:
        check_choice("attention", attention, IMPLEMENTATIONS)
    if reader in ("working", "packed"):
        if attention is not None:
            raise ValueError(
                f"attention={attention} says which kernels read the cache, reader={reader} uses none; choose reader=kernel"
            )
        return Backend(reader)
    if attention == "triton":
        if dtype == torch.float32:
            raise ValueError("attention=triton takes FP16 and BF16; choose model.dtype=bfloat16 or attention=reference")
        pick.picked(device, attention, head_dim())
    served = device.type == "cuda" and dtype != torch.float32
    if attention is None and served and pick.picked(device, None, head_dim()) == "triton":
        attention = "triton"
    if reader is None and attention is None:
        return Backend()
    if attention is None and device.type != "cpu":
        attention = "reference"
    return Backend("kernel", attention)
