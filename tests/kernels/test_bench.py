"""The benchmark of the kernels: what it does without a GPU, and that its GPU part runs at all (interpreted, untimed)."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import ROOT

from mikv.kernels import decode_launch, verify
from mikv.models.tiny import tiny_config

CPU = torch.device("cpu")
SMALL = {"small": (4, 2, 64)}


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return module_of("bench_kernels")


def module_of(script: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(script, ROOT / "scripts" / f"{script}.py")
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
    assert bench.correct(CPU, SMALL, (20,))
    monkeypatch.setattr(verify, "TOLERANCE", {torch.float16: 1e-9})
    monkeypatch.setattr(bench, "CACHES", {"16": [(1.0, 16, 16, "affine")]})
    assert not bench.correct(CPU, SMALL, (20,))
    assert "WRONG" in capsys.readouterr().out


def test_no_number_is_no_agreement(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    errors = iter([(0.0, 0.0), (float("nan"), 0.0), *[(0.0, 0.0)] * (len(bench.CACHES) - 2)])
    monkeypatch.setattr(verify, "decode_errors", lambda *_, **__: next(errors))
    assert not bench.correct(CPU, SMALL, (20,))


def test_what_is_timed_on_a_gpu_runs(bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    caches = {"2": [(1.0, 2, 2, "affine")], "20% 16, trellis": [(0.2, 16, 16, "affine"), (0.8, 3, 2, "trellis")]}
    copy = bench.copy_bandwidth(CPU, 2**16)
    journal = bench.Journal(tmp_path / "rows.json", {"device": "none"})
    bench.decode_rows(journal, CPU, SMALL, [1, 2], [128], caches, copy)
    wanted = [(1, "2"), (1, "20% 16, trellis"), (2, "2"), (2, "20% 16, trellis")]
    assert [(row["batch"], row["cache"]) for row in journal.rows] == wanted
    assert journal.rows[0]["bytes"] == 2 * 128 * (2 * 64 * 2 / 8 + 2 * 8)  # heads, tokens, codes, scales and minima
    journal = bench.Journal(None, {})
    monkeypatch.setattr(bench, "CHOICES", {"as it is": [], "SCALES_AT_ONCE": [64]})
    bench.choice_rows(journal, CPU, SMALL, [1], [128], caches, copy)
    assert [row["value"] for row in journal.rows] == [None, 64] * 2
    assert decode_launch.SCALES_AT_ONCE == 1024
    bench.prefill_rows(journal, CPU, SMALL, [64], copy)
    packed = [f"pack {bits}" for bits in (8, 4, 3, 2)] + [f"trellis {bits}" for bits in (2, 3, 4)]
    assert [row["kernel"] for row in journal.rows[4:]] == ["column sums", *packed]
    assert not journal.failed
    journal = bench.Journal(tmp_path / "rows.json", {"device": "none"})
    bench.end_to_end(journal, CPU, tiny_config("llama", head_dim=32), torch.float16, tokens=20, batches=(2,), steps=2)
    labels = ["transformers", "full", "mikv 20% 16/2", "mikv 20% 8/2", "whiten 2", "whiten k4v3 last 32 8", "all of them"]
    written = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))
    assert [row["policy"] for row in written["rows"]] == labels
    full, wide, narrow = (row["cache_bytes"] for row in written["rows"][1:4])
    assert full > wide > narrow


def test_what_fails_is_a_row_and_the_rest_goes_on(bench: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    journal = bench.Journal(None, {})
    journal.add({"kernel": "broken"}, lambda: 1 / 0, str)
    journal.add({"kernel": "large"}, lambda: None, str)
    journal.add({"kernel": "fine"}, lambda: {"s": 1.0}, lambda row: f"{row['s']} s")
    assert journal.failed == 1
    assert "ZeroDivisionError" in journal.rows[0]["error"]
    assert journal.rows[1:] == [{"kernel": "large", "fits": False}, {"kernel": "fine", "s": 1.0}]
    assert "FAILED" in capsys.readouterr().out


@pytest.mark.parametrize(("step", "scripts"), [("check", 5), ("kernels", 1), ("engine", 1), ("choices", 1)])
def test_the_steps_of_a_gpu_hour_call_what_exists(step: str, scripts: int, tmp_path: Path) -> None:
    """A dry run: the scripts that a step would start take the options that it gives them."""
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\nprintf '%s\\t' \"$@\" >> {tmp_path}/called\necho >> {tmp_path}/called\n", encoding="utf-8")
    python.chmod(0o755)
    command = ["bash", "scripts/gpu_hour.sh", step, str(tmp_path / "out")]
    environment = os.environ | {"PYTHON": str(python)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    called = (tmp_path / "called").read_text(encoding="utf-8").splitlines()
    assert len(called) == scripts
    for line in called:
        script, *given = line[:-1].split("\t")
        module = module_of(Path(script).stem)
        options = module.options().parse_args(given)
        if script.endswith("bench_kernels.py"):
            assert {part for part in options.only.split(",") if part} <= set(module.PARTS)
            assert set(options.models.split(",")) <= set(module.MODELS)
            assert set(options.caches.split(";")) <= set(module.CACHES)


def test_an_unknown_step_of_a_gpu_hour_is_refused(tmp_path: Path) -> None:
    command = ["bash", "scripts/gpu_hour.sh", "everything", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "everything" in done.stderr
