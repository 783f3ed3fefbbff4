"""What became of a compiled kernel: registers, spills, and the instructions of its hot loop. Static figures, no timings."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton

from mikv.kernels.variants import Variant

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
LANES = 32
# Number conversions by the slow unit; F2FP, which rounds two FP32 numbers to a pair of FP16, is not one of them.
_CONVERSIONS = ("I2F", "I2FP", "F2I", "F2F")
_MATRIX = ("HMMA", "HGMMA")


@dataclass(frozen=True)
class Findings:
    """registers per thread; shared memory in bytes per program; spills: spilled registers or instructions that spill.
    NVIDIA only: opcodes of the hot loop (or of the whole kernel where there is no loop that multiplies matrices)."""

    registers: int
    shared: int
    spills: int
    opcodes: Counter[str] = field(default_factory=Counter)

    def count(self, *names: str) -> int:
        """Instructions whose opcode starts with one of these, up to a dot."""
        return sum(n for opcode, n in self.opcodes.items() if opcode.split(".")[0] in names)

    @property
    def instructions(self) -> int:
        return sum(self.opcodes.values())

    @property
    def conversions(self) -> int:
        return self.count(*_CONVERSIONS)

    def async_bytes(self, wide: bool) -> int:
        """Bytes that one lane copies from global to shared memory, by 16-byte copies or by narrower ones."""
        total = 0
        for opcode, n in self.opcodes.items():
            if opcode.split(".")[0] == "LDGSTS" and opcode.endswith(".128") == wide:
                total += n * _width(opcode)
        return total

    def loaded_bytes(self) -> int:
        """Bytes that one lane loads from global memory, into shared memory or registers."""
        return sum(n * _width(opcode) for opcode, n in self.opcodes.items() if opcode.split(".")[0] in ("LDGSTS", "LDG"))


def _width(opcode: str) -> int:
    """Bytes per lane of a load: LDG.E is 4, LDG.E.64 8, LDG.E.U16 2 ..."""
    parts = opcode.split(".")
    for part, size in (("128", 16), ("64", 8), ("U16", 2), ("S16", 2), ("U8", 1), ("S8", 1)):
        if part in parts:
            return size
    return 4


def look(variant: Variant, target: str) -> Findings:
    """Compile and take apart."""
    compiled = variant.compile(target)
    if "amdgcn" in compiled.asm:
        return _amd(compiled)
    cubin = compiled.asm["cubin"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = _run("nvdisasm", "-c", file.name)
        usage = _run("cuobjdump", "-res-usage", file.name)
    instructions, loops = parse(text)
    spills = sum(opcode(i).split(".")[0] in ("LDL", "STL") for i in instructions)
    registers = re.search(r"REG:(\d+)", usage)
    assert registers is not None, usage
    return Findings(int(registers[1]), compiled.metadata.shared, spills, Counter(map(opcode, hot_loop(instructions, loops))))


def _amd(compiled: Any) -> Findings:
    text = compiled.asm["amdgcn"]

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        assert found is not None, name
        return int(found[1])

    return Findings(number("vgpr_count"), compiled.metadata.shared, number("vgpr_spill_count") + number("sgpr_spill_count"))


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([_TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


def parse(listing: str) -> tuple[list[str], list[tuple[int, int]]]:
    """Instructions of nvdisasm's text, and loops as (first, last) of them: branches to an earlier label."""
    labels: dict[str, int] = {}
    instructions: list[str] = []
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?);", line):
            instructions.append(instruction[1])
    loops = []
    for place, text in enumerate(instructions):
        branch = re.search(r"\bBRA\b.*?(\.L_\w+)", text)
        if branch and labels.get(branch[1], place + 1) <= place:
            loops.append((labels[branch[1]], place))
    return instructions, loops


def opcode(instruction: str) -> str:
    """`@!P0 LDG.E.128 R4, desc[UR4][R2.64]` -> `LDG.E.128`."""
    return re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0]


def hot_loop(instructions: list[str], loops: list[tuple[int, int]]) -> list[str]:
    """The innermost loop that multiplies most matrices; of such loops, one that loads ahead. Without one, everything."""

    def weight(loop: tuple[int, int]) -> tuple[bool, int]:
        names = [opcode(i).split(".")[0] for i in instructions[loop[0] : loop[1] + 1]]
        return "LDGSTS" in names, sum(name in _MATRIX for name in names)

    inner = [a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    best = max(inner, key=weight, default=None)
    if best is None or weight(best)[1] == 0:
        return instructions
    return instructions[best[0] : best[1] + 1]
