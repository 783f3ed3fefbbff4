"""A run that is going to use Triton's kernels asks first whether they are right on its machine."""

from __future__ import annotations

import pytest
import torch
from conftest import NO_END, model, policy

from mikv.engine import Engine, prefill
from mikv.kernels import decode_launch, verify
from mikv.kernels.segments import Attention

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", verify.TOLERANCE)
def test_right_kernels_pass(dtype: torch.dtype) -> None:
    verify.verify(
        [(16, 16, "affine"), (8, 3, "affine"), (4, 2, "affine"), (3, 2, "trellis"), (2, 2, "codebook")], 6, 2, 64, dtype, CPU
    )


@pytest.mark.parametrize("broken", ["output", "mass", "NaN", "NaN mass"])
def test_wrong_kernels_are_refused(monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    right = decode_launch.decode_attention

    def wrong(*args: object) -> Attention:
        out, mass = right(*args)  # type: ignore[arg-type]
        if "mass" in broken:
            off = torch.nan if "NaN" in broken else 0.02
            return Attention(out, [None if m is None else m + off for m in mass])
        return Attention(out + (torch.nan if broken == "NaN" else 0.02), mass)

    monkeypatch.setattr(decode_launch, "decode_attention", wrong)
    with pytest.raises(
        verify.KernelsDisagree, match=r"keys of 16 and values of 16 bits \(affine\) is wrong.*attention=reference"
    ):
        verify.verify([(16, 16, "affine")], 2, 2, 64, torch.float16, CPU)


@pytest.mark.parametrize("attention", ["triton", "reference"])
def test_an_engine_asks_about_what_its_panel_stores(monkeypatch: pytest.MonkeyPatch, attention: str) -> None:
    """Whoever serves a panel, a run or lm-eval's interface: each kind of tier once, and none where Triton does not read."""
    asked: list[object] = []
    monkeypatch.setattr(prefill, "verify", lambda tiers, *rest: asked.append((tiers, *rest)))
    shape = {"dtype": torch.float16, "head_dim": 32, "query_heads": 4, "kv_heads": 2}
    panel = [policy("full"), policy("mikv"), policy("mikv", {"high.bits": 8}), policy("h2o"), policy("whiten", {"low": "k3v2"})]
    engine = Engine(model(**shape), NO_END, 257, "kernel", attention)
    engine.verify_kernels([])  # lm-eval's interface as the runner uses it: it reads no cache, another engine does
    engine.verify_kernels(panel)
    kinds = [(2, 2, "affine"), (3, 2, "trellis"), (5, 5, "trellis"), (8, 8, "affine"), (16, 16, "affine")]
    wanted = (kinds, 4, 2, 32, torch.float16, CPU)
    assert asked == ([wanted] if attention == "triton" else [])
