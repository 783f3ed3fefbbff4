"""The benchmark of the kernels: what it does without a GPU, and that its GPU part runs at all (interpreted, untimed)."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from types import ModuleType

import pytest
import torch
from conftest import ROOT

from mikv.kernels import verify
from mikv.models.tiny import tiny_config

CPU = torch.device("cpu")
SMALL = {"small": (4, 2, 64)}


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_kernels", ROOT / "scripts" / "bench_kernels.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the script times for minutes")
def test_without_a_gpu_it_checks_and_says_so() -> None:
    done = subprocess.run(
        [sys.executable, "scripts/bench_kernels.py"], cwd=ROOT, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no GPU" in done.stdout
    assert "WRONG" not in done.stdout
    assert "GB/s" not in done.stdout


def test_a_wrong_kernel_is_noticed(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "MODELS", SMALL)
    assert bench.correct(CPU, (20,))
    monkeypatch.setattr(verify, "TOLERANCE", {torch.float16: 1e-9})
    monkeypatch.setattr(bench, "CACHES", {"16": [(1.0, 16, 16)]})
    assert not bench.correct(CPU, (20,))
    assert "WRONG" in capsys.readouterr().out


def test_no_number_is_no_agreement(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "MODELS", SMALL)
    errors = iter([(0.0, 0.0), (float("nan"), 0.0), *[(0.0, 0.0)] * (len(bench.CACHES) - 2)])
    monkeypatch.setattr(verify, "decode_errors", lambda *_: next(errors))
    assert not bench.correct(CPU, (20,))


def test_what_is_timed_on_a_gpu_runs(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "CACHES", {"2": [(1.0, 2, 2)], "20% 16, 2": [(0.2, 16, 16), (0.8, 2, 2)]})
    copy = bench.copy_bandwidth(CPU, 2**16)
    rows = bench.decode_rows(CPU, SMALL, [1, 2], [128], copy)
    assert [(row["batch"], row["cache"]) for row in rows] == [(1, "2"), (1, "20% 16, 2"), (2, "2"), (2, "20% 16, 2")]
    assert rows[0]["bytes"] == 2 * 128 * (2 * 64 * 2 / 8 + 2 * 8)  # heads, tokens, codes, scales and minima
    rows = bench.prefill_rows(CPU, SMALL, [64], copy)
    assert [row["kernel"] for row in rows] == ["column sums", "pack 8", "pack 4", "pack 3", "pack 2"]
    config = tiny_config("llama", head_dim=32)
    rows = bench.end_to_end(CPU, config, torch.float16, tokens=20, batches=(2,), steps=2)
    assert [row["policy"] for row in rows] == ["full", "mikv 20% 16/2", "mikv 20% 8/2"]
    assert rows[0]["cache_bytes"] > rows[1]["cache_bytes"] > rows[2]["cache_bytes"]
