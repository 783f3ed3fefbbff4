"""The kernels compile for real GPUs without one, and what the compiler made of them meets the gates."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from mikv.kernels.disassemble import Findings, hot_loop, opcode, parse
from mikv.kernels.inspection import failures, row_of
from mikv.kernels.variants import BITS, LEVEL_BITS, LEVEL_GATES, MODELS, decode_variant, variants

LISTING = """
.text.attend:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/              @!P0 HMMA.16816.F32 R4, R8, R12, R4 ;
        /*0030*/              @P1  BRA `(.L_x_1) ;
.L_x_2:
        /*0040*/                   MOV R3, RZ ;
.L_x_3:
        /*0050*/                   LDGSTS.E.BYPASS.128 [R5], desc[UR4][R2.64] ;
        /*0060*/                   LDGSTS.E [R5+0x10], desc[UR4][R2.64], P0 ;
        /*0070*/                   HMMA.16816.F32 R4, R8, R12, R4 ;
        /*0080*/                   I2F.F16 R4, R8 ;
        /*0090*/              @P1  BRA.U UP0, `(.L_x_3) ;
        /*00a0*/              @P2  BRA `(.L_x_2) ;
        /*00b0*/                   LDL R3, [R1] ;
.L_x_4:
        /*00c0*/                   BRA `(.L_x_4);
"""


def test_the_hot_loop_is_found() -> None:
    instructions, loops = parse(LISTING)
    assert len(instructions) == 13
    assert loops == [(1, 3), (5, 9), (4, 10), (12, 12)]
    names = [opcode(i) for i in hot_loop(instructions, loops)]
    assert names == ["LDGSTS.E.BYPASS.128", "LDGSTS.E", "HMMA.16816.F32", "I2F.F16", "BRA.U"]
    assert hot_loop(instructions, loops[-1:]) == instructions  # no loop that multiplies: the whole kernel


def test_bytes_and_conversions_are_counted() -> None:
    found = Findings(100, 0, 0, Counter({"LDGSTS.E.BYPASS.128": 3, "LDGSTS.E": 2, "LDG.E.U16": 5, "I2F.F16": 1, "F2FP.F16": 4}))
    assert (found.async_bytes(wide=True), found.async_bytes(wide=False), found.loaded_bytes()) == (48, 8, 66)
    assert found.conversions == 1
    assert found.instructions == 15


def row(target: str = "sm_90", spills: int = 0, **opcodes: int) -> dict[str, Any]:
    """Row of INT2 decode for Llama-2-7B (one warp, 64 tokens: 64 bytes of codes per token are 8 wide copies)."""
    counts = {"LDGSTS.E.BYPASS.128": 8, "LOP3.LUT": 900} | {name.replace("_", "."): n for name, n in opcodes.items()}
    return row_of(decode_variant(MODELS[0], 2, 2), target, Findings(100, 0, spills, Counter(counts)))


def test_every_gate_can_be_missed() -> None:
    assert failures(row()) == []
    assert row()["per_unit"] == 454
    for bad, message in (
        (row(spills=1), "spill"),
        (row(I2F_F16=1), "conversions"),
        (row(LDGSTS_E_BYPASS_128=7), "asynchronous"),
        (row(LOP3_LUT=1000), "at most 500"),
    ):
        assert len(failures(bad)) == 1
        assert message in failures(bad)[0]
    assert failures(row(target="sm_80", spills=9)) == []


def test_the_gates_are_those_that_were_set() -> None:
    gates = {v.name: v.most for v in variants() if v.model.name == "Llama-2-7B" and v.most is not None}
    assert {name: gates[name] for name in ("decode 2", "decode 4", "decode 8", "decode 3", "decode 16")} == {
        **{"decode 2": 500, "decode 4": 520, "decode 8": 520, "decode 3": 850, "decode 16": 450}
    }
    levels = {v.name: v.most for v in variants() if v.model.name == "Llama-3-8B" and v.name.endswith("trellis")}
    assert levels == {f"decode {b} trellis": most for b, most in LEVEL_GATES.items()} | {"decode k3v2 trellis": None}
    assert gates["column sums"] == 800
    assert all(gates[f"pack {bits} keys"] == 2000 for bits in BITS[1:])


@pytest.fixture(scope="module")
def inspected(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, str, list[dict[str, Any]]]:
    """Exit status, output and rows of the script, over all kernels, models and targets. In a process of its own: this one
    interprets kernels."""
    file = tmp_path_factory.mktemp("kernels") / "kernels.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = str(Path("scripts") / "inspect_kernels.py")
    done = subprocess.run(
        [sys.executable, script, "--json", str(file)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900
    )
    assert file.exists(), done.stderr[-2000:]
    return done.returncode, done.stdout, json.loads(file.read_text(encoding="utf-8"))


@pytest.mark.heavy
def test_all_kernels_compile_for_all_targets_and_models(inspected: tuple[int, str, list[dict[str, Any]]]) -> None:
    _, _, rows = inspected
    assert len(rows) == 3 * len(variants())
    for target in ("sm_80", "sm_90", "gfx942"):
        compiled = {(r["kernel"], r["model"]) for r in rows if r["target"] == target}
        assert {(f"decode {bits}", model.name) for bits in BITS for model in MODELS} <= compiled
        assert {("decode 2 codebook", "Llama-3-8B"), *((f"decode {b} trellis", "Llama-3-8B") for b in LEVEL_BITS)} <= compiled
        assert {(name, model.name) for name in ("decode merge", "column sums") for model in MODELS} <= compiled


@pytest.mark.heavy
def test_the_gates_are_met(inspected: tuple[int, str, list[dict[str, Any]]]) -> None:
    status, output, rows = inspected
    assert [f"{r['kernel']} {r['model']}: {f}" for r in rows for f in failures(r)] == []
    assert status == 0
    assert "all gates are met" in output


@pytest.mark.heavy
def test_hardly_more_is_read_than_must_be(inspected: tuple[int, str, list[dict[str, Any]]]) -> None:
    """Decoding asks for the least bytes, except where words are read in copies (the copies come from the cache)."""
    for r in inspected[2]:
        if r["target"] == "sm_90" and r["kernel"].startswith("decode") and r["bytes_least"]:
            copies = "3" in r["kernel"] or ("2" in r["kernel"] and r["model"].startswith("SmolLM2"))
            copies |= "trellis" in r["kernel"] or "codebook" in r["kernel"]  # tables, and the words before
            assert (r["bytes_asked"] > r["bytes_least"]) == copies, r["kernel"]


def test_a_process_that_interprets_does_not_compile() -> None:
    with pytest.raises(RuntimeError, match="interprets"):
        variants()[0].compile("sm_90")
