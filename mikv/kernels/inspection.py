"""Rows of the table of compiled kernels, and the gates they are held to (scripts/inspect_kernels.py)."""

from __future__ import annotations

from typing import Any

from mikv.kernels.disassemble import LANES, Findings, look
from mikv.kernels.variants import Variant, variants

__all__ = ["failures", "inspect", "row_of", "variants"]

GATED = "sm_90"


def inspect(work: tuple[int, str]) -> dict[str, Any]:
    """Row of one of `variants()`, by number, for a target."""
    variant, target = variants()[work[0]], work[1]
    return row_of(variant, target, look(variant, target))


def row_of(variant: Variant, target: str, found: Findings) -> dict[str, Any]:
    """per_unit: thread instructions per token (column sums: clocks in which all four schedulers issue, per 128 x 128
    tile); bytes_asked, bytes_least: per token. None where a figure does not exist."""
    nvidia = bool(found.opcodes)
    warps = variant.warps_on(target)
    per_byte = LANES * warps / variant.units
    return {
        "target": target,
        "kernel": variant.name,
        "model": variant.model.name,
        "registers": found.registers,
        "shared": found.shared,
        "spills": found.spills,
        "conversions": found.conversions if nvidia and variant.in_loop else None,
        "loads": _loads(found) if nvidia else None,
        "per_unit": found.instructions * warps * variant.weight if nvidia and variant.weight else None,
        "gate": variant.most if target == GATED else None,
        "bytes_asked": found.loaded_bytes() * per_byte if nvidia and variant.read else None,
        "bytes_least": variant.read or None,
        "wide_async_bytes": found.async_bytes(wide=True) * per_byte if nvidia else None,
        "code_bytes": variant.codes or None,
    }


def _loads(found: Findings) -> str:
    loads = {o: n for o, n in found.opcodes.items() if o.split(".")[0] in ("LDGSTS", "LDG", "LDSM")}
    return " ".join(f"{n}x{o.replace('.E', '').replace('.BYPASS', '')}" for o, n in sorted(loads.items()))


def failures(row: dict[str, Any]) -> list[str]:
    """What of the gates a row misses; only the gated target has any."""
    if row["target"] != GATED:
        return []
    found = []
    if row["spills"]:
        found.append(f"{row['spills']} instructions spill registers")
    if row["conversions"]:
        found.append(f"{row['conversions']} conversions in the hot loop")
    if row["code_bytes"] and row["wide_async_bytes"] < row["code_bytes"]:
        found.append(f"{row['wide_async_bytes']:g} of {row['code_bytes']:g} bytes of codes by 16-byte asynchronous copies")
    if row["gate"] is not None and row["per_unit"] > row["gate"]:
        found.append(f"{row['per_unit']:.0f} instructions per token, at most {row['gate']} are allowed")
    return found
