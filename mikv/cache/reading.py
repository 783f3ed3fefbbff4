"""How a compressed cache is read, decided once for a run: as a dense copy, unpacked at each step, or by the kernels.

What the kernels compute is rounded otherwise than what torch computes from a dense copy, so a run that uses them has another
identity (`Reading.protocol`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from mikv.kernels import pick
from mikv.options import IMPLEMENTATIONS, READERS, check_choice


class Reading(NamedTuple):
    """reader: one of mikv.options.READERS, see mikv.cache.compressed. attention: which kernels read, `reference` or `triton`,
    None = torch's faster variant for CPUs; only where reader is `kernel`."""

    reader: str = "working"
    attention: str | None = None

    @property
    def kernels(self) -> str:
        """Who quantizes and packs (the bits are the same), and sums up the attention of a prompt: `reference` or `triton`."""
        return "triton" if self.attention == "triton" else "reference"

    @property
    def protocol(self) -> dict[str, str]:
        """What of it changes an outcome, for a run's identity."""
        return {"attention": self.attention or "cpu"} if self.reader == "kernel" else {}


def decide(
    reader: str | None, attention: str | None, device: torch.device, dtype: torch.dtype, head_dim: Callable[[], int]
) -> Reading:
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
        return Reading(reader)
    if attention == "triton":
        if dtype == torch.float32:
            raise ValueError("attention=triton takes FP16 and BF16; choose model.dtype=bfloat16 or attention=reference")
        pick.picked(device, attention, head_dim())
    served = device.type == "cuda" and dtype != torch.float32
    if attention is None and served and pick.picked(device, None, head_dim()) == "triton":
        attention = "triton"
    if reader is None and attention is None:
        return Reading()
    if attention is None and device.type != "cpu":
        attention = "reference"
    return Reading("kernel", attention)
