"""What a slip on the command line gets: one message that names the option, what was given and what is meant; no traceback, no
model, and where neither is needed not even torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

# Arguments, and what must stand in the answer. Answered before torch is loaded.
EARLY: list[tuple[str, list[str]]] = [
    ("batch_size=four", ["batch_size=four", "a whole number", "batch_size=4"]),
    ("batch_size=1.5", ["batch_size=1.5", "a whole number", "batch_size=2"]),
    ("batch_size=null", ["batch_size=null", "a whole number", "batch_size=4"]),
    ("batch_size=true", ["batch_size=true", "a whole number"]),
    ("batch_size=0", ["batch_size=0", "from 1 to 1000000"]),
    ("task.limit=many", ["task.limit=many", "a whole number"]),
    ("task.limit=1000000000000", ["task.limit=1000000000000", "from 1 to 1000000"]),
    ("task.limit=-1", ["task.limit=-1", "from 1"]),
    ("policy.low.bits=2.0", ["policy.low.bits=2.0", "a whole number", "policy.low.bits=2"]),
    ("policy.low.bits=two", ["policy.low.bits=two", "a whole number"]),
    ("policy.low.group=x", ["policy.low.group=x", "a whole number"]),
    ("policy.high.bits=6", ["bits: 6 bits", "16, 8, 5, 4, 3, 2, 1, 0"]),
    ("policy.high.bits=2 policy.low.bits=8", ["tiers 2 and 8", "swap the two"]),
    ("policy.keep=2", ["policy.keep=2", "between 0 and 1", "policy.keep=0.2"]),
    ("policy.keep=abc", ["policy.keep=abc", "a number"]),
    ("policy.keep=null", ["policy.keep=null", "a number"]),
    ("policy.balance=2", ["policy.balance=2", "true or false"]),
    ("policy.kep=0.1", ["no option policy.kep", "did you mean policy.keep?", "high, low"]),
    ("policy=mikvv", ["no policy 'mikvv'", "did you mean policy=mikv?", "uniform"]),
    ("policy=null", ["policy=null", "there are", "mikv"]),
    ("policy=[mikv]", ["policy=[mikv]", "the name of a policy"]),
    ("policy=3", ["policy=3", "the name of a policy"]),
    ("task=null", ["task=null", "there are", "linerecall"]),
    ("task=linerecal", ["no task 'linerecal'", "did you mean task=linerecall?"]),
    ("model=null", ["model=null", "there are", "tiny-random"]),
    ("model=lama2-7b", ["did you mean model=llama2-7b"]),
    ("name=123", ["name=123", "wanted text", "name='\"123\"'"]),
    ("name=''", ["name=''", "within out="]),
    ("name=.", ["name='.'", "within out="]),
    ("name=../x", ["name='../x'", "within out="]),
    ("name=/tmp/x", ["name='/tmp/x'", "within out="]),
    ("name=.hidden", ["name='.hidden'", "dot"]),
    ("name=é", ["name=é", "quoted", "name='\"é\"'"]),
    ("out=null", ["out=null", "wanted text", "out=results/runs"]),
    ("fidelity=maybe", ["fidelity=maybe", "true or false"]),
    ("fidelity=null", ["fidelity=null", "true or false"]),
    ("seed=abc", ["seed=abc", "a whole number", "seed=0"]),
    ("seed=null", ["seed=null", "a whole number"]),
    ("seed=1.5", ["seed=1.5", "a whole number", "seed=2"]),
    ("seed=-1", ["seed=-1", "from 0"]),
    ("+foo=1", ["no option foo", "batch_size"]),
    ("sed=1", ["no option sed", "did you mean seed?"]),
    ("~foo", ["no option foo"]),
    ("nonsense", ["nonsense"]),
    ("reader=fast", ["reader=fast", "working or packed or kernel"]),
    ("reader=pack", ["did you mean packed?"]),
    ("attention=flash", ["attention=flash", "reference or triton"]),
    ("model.max_tokens=-1", ["model.max_tokens=-1", "from 2 to"]),
    ("task.max_new_tokens=0", ["task.max_new_tokens=0", "from 1 to"]),
    ("model.dtype=float99", ["model.dtype=float99", "auto or float32 or bfloat16 or float16"]),
    ("out=", ["out= is empty", "out=results/runs"]),
    ("panel=null", ["panel=null", "leave it out"]),
    ("judge=null", ["judge=null", "leave it out"]),
    ("experiment=null", ["experiment=null", "leave it out"]),
    ("allow_code_execution=perhaps", ["allow_code_execution=perhaps", "true or false or unconfined"]),
    ("allow_code_execution=unconfine", ["did you mean unconfined?"]),
    ("allow_code_execution=1", ["allow_code_execution=1", "true or false or unconfined"]),
    ("allow_code_execution=null", ["allow_code_execution=null", "true or false or unconfined"]),
    ("task=humaneval task.allow_code_execution=yes_please", ["true or false or unconfined"]),
    ("-m allow_code_execution=true,maybe", ["allow_code_execution=maybe", "true or false or unconfined"]),
    ("protocol.question=maybe", ["protocol.question=maybe", "visible or hidden"]),
    ("model.max_tokens=x", ["model.max_tokens=x", "a whole number"]),
    ("model.path=3", ["model.path=3", "wanted text"]),
    ("task.lines=[1,2]", ["task.lines=[1, 2]", "a whole number"]),
    ("panel=demo policy=mikv", ["exclude each other"]),
    ("panel=demo panel.entries=[]", ["panel.entries=[]", "at least one policy"]),
    ("panel=demo panel.entries=[{keep:0.2}]", ["panel.entries[0]", "policy: NAME"]),
    ("panel=demo panel.entries=[mikv]", ["panel.entries[0]=mikv", "policy: NAME"]),
    ("panel=demo panel.entries=3", ["panel.entries=3", "a list"]),
    ("panel=demo panel.entries=[{policy:mikvv}]", ["no policy 'mikvv'", "did you mean mikv?"]),
    ("panel=demo panel.entries=[{policy:mikv,kep:0.1}]", ["no option 'kep'", "did you mean keep?"]),
    ("panel=demo panel.entries=[{policy:mikv,high.bits:2.5}]", ["high.bits=2.5", "a whole number"]),
    ("panel=demo panel.entries=[{policy:mikv,size:3}]", ["size=3", "between 0 and 1"]),
    ("panel=demo panel.entries=[{policy:mikv,size:[0.2,many]}]", ["size=many", "a number"]),
    ("-m policy=mikv,h3o", ["no policy 'h3o'", "did you mean policy=h2o?"]),
    ("-m task.lines=10,x", ["task.lines=x", "a whole number"]),
]

# The same of what only a constructor knows, or the machine: torch may be loaded, weights not.
LATE: list[tuple[str, list[str]]] = [
    ("task.lines=0", ["task.lines=0", "from 1 to 50000"]),
    ("task.lines=100000000", ["task.lines=100000000", "from 1 to 50000"]),
    ("task.lines=40000 task.limit=100000", ["task.limit=100000", "do not fit the memory", "task.limit=100"]),
    ("task=key_value task.keys=100000000", ["task.keys=100000000", "from 2 to 100000"]),
    ("task=lm_eval", ["task.name must be set"]),
    ("task=humaneval", ["humaneval runs code that the model writes", "allow_code_execution=true"]),
    ("launcher=local", ["add -m"]),
    ("model.device=cuda:99", ["model.device=cuda:99", "choose model.device=cpu or auto"]),
    ("model.device=gpu", ["model.device=gpu", "auto, cpu, cuda or cuda:N"]),
    ("model.path=/nowhere/at/all", ["model.path=/nowhere/at/all does not exist"]),
]

PROGRAM = """
import contextlib, io, json, sys
sys.modules["torch"] = None  # whoever imports it fails
sys.path.insert(0, {root!r})
from run import check
answers = []
for line in json.loads(sys.stdin.read()):
    said, status = io.StringIO(), None
    with contextlib.redirect_stderr(said):
        try:
            check(line)
        except SystemExit as end:
            status = end.code
    answers.append([status, said.getvalue()])
print(json.dumps(answers))
"""


def words(line: str) -> list[str]:
    """As a shell splits it, but blanks only."""
    return ["model=tiny-random", *line.split(" ")]


@pytest.fixture(scope="module")
def answers() -> dict[str, tuple[int | None, str]]:
    """What all early cases get, from one process."""
    asked = json.dumps([words(line) for line, _ in EARLY])
    command = [sys.executable, "-c", PROGRAM.format(root=str(ROOT))]
    done = subprocess.run(command, cwd=ROOT, input=asked, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return {line: (status, said) for (line, _), (status, said) in zip(EARLY, json.loads(done.stdout), strict=True)}


@pytest.mark.parametrize(("line", "wanted"), EARLY, ids=[line for line, _ in EARLY])
def test_a_slip_is_answered_before_torch_is_loaded(
    line: str, wanted: list[str], answers: dict[str, tuple[int | None, str]]
) -> None:
    status, said = answers[line]
    assert status == 2, said
    assert said.startswith("\nerror: ")
    for text in wanted:
        assert text in said, said


@pytest.mark.parametrize(("line", "wanted"), LATE, ids=[line for line, _ in LATE])
def test_what_only_the_parts_know_is_answered_before_weights_are_read(line: str, wanted: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "run.py", "model=llama2-7b", f"out={tmp_path}", *line.split(" ")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    for text in wanted:
        assert text in done.stderr, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_what_is_right_passes() -> None:
    """A list of refusals proves nothing alone."""
    right = [
        "policy=mikv policy.keep=0.1 policy.high.bits=8 policy.low.key_bits=3 policy.balance=false",
        "task.limit=null task.depths=5 name=a/b",
        "task=humaneval allow_code_execution=unconfined",
        "-m task=humaneval allow_code_execution=true,false,unconfined",
        "panel=risk seed=7 reader=null task.max_new_tokens=8",
        "-m policy=mikv,h2o task.lines=10,20 seed=range(0,3)",
        "-m policy=glob(*,exclude=kvpress)",  # comes with a library of its own
        "task=safety ~task.parts.xstest task.parts.guardedrecall.lines=40",
        "+launcher.sbatch.mail-type=END launcher=slurm -m",
        "model.path=/somewhere/else model@judge.model=tiny-random judge=yes_no task=harmful_requests",
    ]
    asked = json.dumps([line.split(" ") for line in right])
    command = [sys.executable, "-c", PROGRAM.format(root=str(ROOT))]
    done = subprocess.run(command, cwd=ROOT, input=asked, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert [said for status, said in json.loads(done.stdout) if status is not None] == []
