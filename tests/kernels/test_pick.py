"""Which implementation runs, and what is refused before a kernel would misread it."""

from __future__ import annotations

import pytest
import torch
from kernel_inputs import query, segment

from mikv.kernels import pick
from mikv.kernels.segments import Segment, Vectors, check_segments


def test_the_device_decides() -> None:
    assert pick.picked(torch.device("cpu")) == "reference"
    assert pick.picked(torch.device("cuda")) == "triton"
    assert pick.picked(torch.device("cuda"), "reference") == "reference"
    assert [pick.picked(torch.device("cuda"), None, dim) for dim in (16, 80, 128)] == ["reference", "reference", "triton"]


def test_wrong_wishes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="reference or triton"):
        pick.picked(torch.device("cpu"), "flash")
    with pytest.raises(ValueError, match="head_dim 32, 64, 128 or 256, not 80"):
        pick.picked(torch.device("cuda"), "triton", 80)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="needs a GPU"):
        pick.picked(torch.device("cpu"), "triton")


def test_both_implementations_answer_the_public_function() -> None:
    q, s = query(1, 2, 64, torch.float16), segment(0, 1, 1, 33, 64, 4, 2)
    q = q.clone() * 1.7
    outs = [pick.decode_attention(q, [s], 0.125, name).out for name in ("reference", "triton", None)]
    assert all(torch.allclose(outs[0], out, atol=4e-3) for out in outs)
    assert not torch.equal(outs[0], outs[1])  # two implementations indeed


def changed(s: Segment, **parts: object) -> Segment:
    return s._replace(**parts)  # type: ignore[arg-type]


def test_segments_that_do_not_fit_are_refused() -> None:
    q, s = query(2, 4, 64, torch.float16), segment(0, 2, 2, 33, 64, 4, 2)
    check_segments(q, [s])
    wrong = {
        "evenly": segment(0, 2, 3, 33, 64, 4, 2),
        "int32": changed(s, stop=s.stop.long()),
        "balancer must": changed(s, balancer=torch.ones(2, 2, 32)),
        "belongs to quantized": changed(segment(0, 2, 2, 33, 64, 16, 2), balancer=torch.ones(2, 2, 64)),
        "was expected": changed(s, values=Vectors(4, *s.values[1:])),
        "codes are int16": changed(s, keys=Vectors(4, s.keys.data.int(), *s.keys[2:])),
        "float16 or bfloat16": changed(s, keys=Vectors(16, torch.zeros(2, 2, 33, 64).double()), balancer=None),
        "not contiguous": changed(s, keys=Vectors(4, s.keys.data.transpose(1, 2).contiguous().transpose(1, 2), *s.keys[2:])),
        "belong to codes": changed(s, keys=Vectors(4, s.keys.data)),
        "5 bits": changed(s, keys=Vectors(5, *s.keys[1:])),
        "scales per vector": changed(s, keys=Vectors(4, s.keys.data, *(torch.ones(2, 2, 33, 4).half() for _ in range(2)))),
        "must be float16": changed(s, keys=Vectors(4, s.keys.data, *(torch.ones(2, 2, 33, 2) for _ in range(2)))),
    }
    for message, bad in wrong.items():
        with pytest.raises(ValueError, match=message):
            check_segments(q, [bad])
