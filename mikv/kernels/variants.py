"""The kernels as they are compiled for real models: which arguments, which constants, which targets. What tests compile ahead
of time and scripts/inspect_kernels.py takes apart; launches use the same functions for constants and tiles.

Needs triton, but no GPU: its compiler and NVIDIA's assembler come with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mikv.kernels import columns_launch, decode_launch, encode_launch, search_launch
from mikv.kernels.jit import columns, decode, encode, search
from mikv.kernels.launch import compiler_options, interpreted

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
BITS = (16, 8, 4, 3, 2)
LEVEL_BITS = (5, 4, 3, 2)
# Numbers that are usually multiples of 16, and that wide loads need to be (a launch finds out by itself).
_ALIGNED = ["slots", "split_tokens", "tokens", "source_slots", "target_slots"]


class Model(NamedTuple):
    """What a kernel knows of a model; dtype in Triton's words."""

    name: str
    query_heads: int
    kv_heads: int
    head_dim: int
    dtype: str

    @property
    def group_heads(self) -> int:
        return self.query_heads // self.kv_heads


MODELS = (
    Model("Llama-2-7B", 32, 32, 128, "fp16"),
    Model("Llama-3-8B", 32, 8, 128, "bf16"),
    Model("SmolLM2-135M", 9, 3, 64, "bf16"),
)


@dataclass(frozen=True)
class Variant:
    """One kernel for one model.

    warps_before_sm_90: warps of a program on other targets than sm_90, None = the same.
    units: how many tokens its hot loop, or the whole program if it has none, handles at once. read: bytes that a token
    must be read in at least; codes: those of them that must come by 16-byte asynchronous copies (0 = no such demand).
    in_loop: there is a hot loop. weight: what one instruction of a warp counts in the table, None = nothing is
    shown; most: gate for the sum on sm_90, None = there is none.
    """

    name: str
    model: Model
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    warps: int
    stages: int
    units: int
    warps_before_sm_90: int | None = None
    read: float = 0.0
    codes: float = 0.0
    in_loop: bool = False
    weight: float | None = None
    most: int | None = None
    options: dict[str, Any] = field(default_factory=compiler_options)

    def warps_on(self, target: str) -> int:
        return self.warps if target == "sm_90" else self.warps_before_sm_90 or self.warps

    def compile(self, target: str) -> Any:
        """Triton's compiled kernel for one of TARGETS.

        Raises:
            RuntimeError: in a process that interprets kernels.
        """
        if interpreted():
            raise RuntimeError("TRITON_INTERPRET=1: this process interprets kernels, it can't compile them")
        names = [parameter.name for parameter in self.kernel.params]
        constants = dict(self.constants)
        if "PTX" in names:
            constants["PTX"] = TARGETS[target].backend == "cuda"
        aligned = [n for n, t in self.types.items() if t.startswith("*")] + _ALIGNED
        source = ASTSource(
            fn=self.kernel,
            signature={name: "constexpr" if name in constants else self.types[name] for name in names},
            constexprs={(names.index(name),): value for name, value in constants.items()},
            attrs={
                (names.index(name),): [["tt.divisibility", 16]] for name in aligned if name in names and name not in constants
            },
        )
        options = {"num_stages": self.stages, **self.options, "num_warps": self.warps_on(target)}
        if TARGETS[target].backend == "hip":
            options.pop("maxnreg", None)  # of NVIDIA's assembler
        return triton.compile(source, target=TARGETS[target], options=options)


# Instructions per token, keys and values together, at head_dim 128.
DECODE_GATES = {16: 450, 8: 520, 4: 520, 3: 850, 2: 500}
# Where levels are looked up, at 5 bits in a table in memory: what the layout reaches. A trellis reads its words three times,
# and its indices take a dozen instructions more for a register of two words.
LEVEL_GATES = {5: 4600, 4: 2600, 3: 1900, 2: 1400}
_DECODE_TYPES = {
    **dict.fromkeys(("key_scale_ptr", "key_zero_ptr", "value_scale_ptr", "value_zero_ptr"), "*fp16"),
    **dict.fromkeys(("balancer_ptr", "shift_ptr", "out_ptr", "lse_ptr", "logits_ptr"), "*fp32"),
    "stop_ptr": "*i32",
    **dict.fromkeys(("slots", "split_tokens", "first_split", "splits"), "i32"),
    "scaling": "fp32",
}


def decode_variant(model: Model, key_bits: int, value_bits: int, emit: bool = False, code: str = "affine") -> Variant:
    """Decode attention over one tier, with two scales per vector, or one where a code (codebook, trellis) has levels; then
    logits are shifted, as a centre asks for. emit: the logits are written, for attention mass."""
    kinds = ("raw" if key_bits == 16 else code, "raw" if value_bits == 16 else code)
    groups = 2 if "affine" in kinds else 1
    raw = f"*{model.dtype}"
    types = {
        **_DECODE_TYPES,
        "query_ptr": raw,
        "key_ptr": raw if key_bits == 16 else "*i16",
        "value_ptr": raw if value_bits == 16 else "*i16",
    }
    absent = ["balancer_ptr", "key_scale_ptr", "key_zero_ptr"] if key_bits == 16 else []
    absent += ["value_scale_ptr", "value_zero_ptr"] if value_bits == 16 else []
    absent += [] if emit else ["logits_ptr"]
    absent += ["shift_ptr"] if code == "affine" else ["balancer_ptr"]  # a balancer is folded into the query then
    if code != "affine":
        types["query_ptr"] = "*fp32"
    tile = decode_launch.tile(key_bits, value_bits, code != "affine")
    rows = [model.head_dim * bits / 8 for bits in (key_bits, value_bits)]
    # rows of 24 bytes (3 bits, head_dim 64) begin where no 16-byte copy can
    codes = sum(row for row in rows if row % 16 == 0)
    metadata = sum(4 * groups if code == "affine" else 2 for bits in (key_bits, value_bits) if bits < 16)  # FP16 numbers
    metadata += 0 if code == "affine" else 4 * model.group_heads  # shifts
    gates = DECODE_GATES if code == "affine" else LEVEL_GATES
    gate = gates.get(key_bits) if key_bits == value_bits and model.head_dim == 128 and not emit else None
    bits = str(key_bits) if key_bits == value_bits else f"k{key_bits}v{value_bits}"
    return Variant(
        f"decode {bits}" + ("" if code == "affine" else f" {code}") + (" + logits" if emit else ""),
        model,
        decode.attend,
        types,
        {
            **decode_launch.decode_constants(model.group_heads, model.head_dim, groups, key_bits, value_bits, kinds),
            **dict.fromkeys(absent),
            "WIDE": False,
        },
        warps=tile.warps,
        stages=tile.stages,
        units=tile.tokens,
        read=sum(rows) + metadata,
        codes=codes,
        in_loop=True,
        weight=32 / tile.tokens,
        most=gate,
        options=decode_launch.decode_options(key_bits, value_bits, True, kinds),
    )


def decode_variants() -> Iterator[Variant]:
    for model in MODELS:
        for bits in BITS:
            yield decode_variant(model, bits, bits)
    for key_bits, value_bits in ((16, 2), (8, 4), (4, 2)):
        yield decode_variant(MODELS[0], key_bits, value_bits)
    for bits in LEVEL_BITS:
        yield decode_variant(MODELS[1], bits, bits, code="trellis")
    yield decode_variant(MODELS[1], 3, 2, code="trellis")
    yield decode_variant(MODELS[2], 2, 2, code="trellis")
    yield decode_variant(MODELS[1], 2, 2, code="codebook")
    yield decode_variant(MODELS[1], 16, 16, emit=True)


def merge_variant(model: Model) -> Variant:
    return Variant(
        "decode merge",
        model,
        decode.merge,
        {
            **dict.fromkeys(("parts_ptr", "part_lse_ptr", "lse_ptr"), "*fp32"),
            "out_ptr": f"*{model.dtype}",
            "splits": "i32",
        },
        {"D": model.head_dim, "BLOCK": decode_launch.MERGED_AT_ONCE},
        warps=4,
        stages=3,
        units=decode_launch.MERGED_AT_ONCE,
    )


def mass_variant(model: Model) -> Variant:
    return Variant(
        "decode mass",
        model,
        decode.mass,
        {
            **dict.fromkeys(("logits_ptr", "lse_ptr", "mass_ptr"), "*fp32"),
            "stop_ptr": "*i32",
            "slots": "i32",
        },
        {"G": model.group_heads, "BLOCK": decode_launch.MASS_BLOCK},
        warps=4,
        stages=3,
        units=decode_launch.MASS_BLOCK,
    )


COLUMNS_GATE = 800  # clocks in which all schedulers of a processor issue, per 128 x 128 tile


def columns_variant(model: Model) -> Variant:
    """Its weight: four schedulers share the program's warps, and a tile may have another size than 128 x 128."""
    constants = columns_launch.columns_constants(model.group_heads, model.head_dim)
    tile = constants["BK"] * constants["BQ"]
    return Variant(
        "column sums",
        model,
        columns.column_sums,
        {
            **dict.fromkeys(("query_ptr", "key_ptr"), f"*{model.dtype}"),
            **dict.fromkeys(("lse_ptr", "sums_ptr"), "*fp32"),
            "padding_ptr": "*i32",
            "unit": "fp32",
            **dict.fromkeys(("heads", "tokens"), "i32"),
        },
        {**constants, "WIDE": False},
        warps=columns_launch.WARPS,
        warps_before_sm_90=columns_launch.WARPS_BEFORE_SM_90,
        stages=columns_launch.STAGES,
        units=constants["BQ"],
        in_loop=True,
        weight=128 * 128 / tile / 4,
        most=COLUMNS_GATE if model.head_dim == 128 else None,
    )


def log_sum_exp_variant(model: Model) -> Variant:
    constants = columns_launch.columns_constants(model.group_heads, model.head_dim)
    return Variant(
        "log-sum-exp",
        model,
        columns.log_sum_exp,
        {
            **dict.fromkeys(("query_ptr", "key_ptr"), f"*{model.dtype}"),
            "lse_ptr": "*fp32",
            "padding_ptr": "*i32",
            "unit": "fp32",
            **dict.fromkeys(("query_heads", "tokens"), "i32"),
        },
        {**constants, "WIDE": False},
        warps=columns_launch.WARPS,
        warps_before_sm_90=columns_launch.WARPS_BEFORE_SM_90,
        stages=columns_launch.STAGES,
        units=constants["BK"],
        in_loop=True,
    )


ENCODE_GATE = 2000  # instructions per token of keys (balanced) or of values, at head_dim 128


def encode_variant(model: Model, bits: int, keys: bool) -> Variant:
    """Packing a prompt's keys or values."""
    tokens = encode_launch.tokens_per_tile(bits)
    types = {
        "source_ptr": f"*{model.dtype}",
        "balancer_ptr": "*fp32",
        **dict.fromkeys(("scale_ptr", "zero_ptr"), "*fp16"),
        "data_ptr": "*u8" if bits == 8 else "*i16",
        "count": "i32",
    }
    return Variant(
        f"pack {bits} {'keys' if keys else 'values'}",
        model,
        encode.encode,
        types,
        {
            **encode_launch.encode_constants(model.head_dim, 2, bits),
            **({} if keys else {"balancer_ptr": None}),
            "BT": tokens,
            "WIDE": False,
        },
        warps=encode_launch.WARPS,
        stages=3,
        units=tokens,
        read=2 * model.head_dim,
        weight=32 / tokens,
        most=ENCODE_GATE if model.head_dim == 128 else None,
        options=encode_launch.encode_options(),
    )


def encode_variants() -> Iterator[Variant]:
    for bits in BITS[1:]:
        yield encode_variant(MODELS[0], bits, keys=True)
        yield encode_variant(MODELS[1], bits, keys=False)
        yield encode_variant(MODELS[2], bits, keys=True)


def search_variant(model: Model) -> Variant:
    return Variant(
        "trellis search",
        model,
        search.search,
        {
            **dict.fromkeys(("x_ptr", "nearest_ptr"), "*fp32"),
            "cell_ptr": "*i32",
            **dict.fromkeys(("within_ptr", "back_ptr", "out_ptr"), "*u8"),
            **dict.fromkeys(("count", "cells"), "i32"),
        },
        {"D": model.head_dim, "BN": search_launch.VECTORS},
        warps=search_launch.WARPS,
        stages=3,
        units=search_launch.VECTORS,
        options=search_launch.search_options(),
    )


def variants() -> list[Variant]:
    """Everything that is compiled ahead of time."""
    each = (merge_variant, mass_variant, columns_variant, log_sum_exp_variant, search_variant)
    return [*decode_variants(), *(f(model) for f in each for model in MODELS), *encode_variants()]
