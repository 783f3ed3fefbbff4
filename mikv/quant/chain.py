"""A way to store keys or values: a chain of transforms and one code, as data and as text.

    key: [balance, affine4]              a list of steps, the code last
    key: [centre, balance/rms, rotate, codebook3]
    low: k4v2                            a whole tier in short: the paper's quantizer, keys at 4 bits, values at 2

A step is written as its name, the name of a file in mikv/quant/transforms or mikv/quant/codes. A number behind the name is the
first parameter, what follows a slash the next: affine4/32 = Affine(bits=4, group=32). 16 and 0 stand for exact and evicted.
A step of one's own is given as `_target_: my.module.Class`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

from mikv.quant.base import Code, Transform
from mikv.quant.codes.affine import Affine
from mikv.quant.codes.exact import Exact

BITS = (16, 8, 5, 4, 3, 2, 1, 0)

_STEP = re.compile(r"(?P<name>[a-z_]+?)(?P<number>\d+)?(?P<rest>(/[\w.]+)*)")
_KINDS = ("transforms", "codes")
Step = Transform | Code
Steps = str | int | Step | Sequence["str | int | Step"]
"""How a chain may be written."""


@dataclass(frozen=True)
class Chain:
    """Transforms in order, then a code. `code` None = evicted: nothing is stored."""

    code: Code | None
    transforms: tuple[Transform, ...] = ()

    def __post_init__(self) -> None:
        for earlier, later in pairwise(self.transforms):
            if later.order <= earlier.order:
                raise ValueError(
                    f"{self}: {_text(later)} can't come after {_text(earlier)}: a centre is taken before channels are scaled, "
                    "and channels are scaled before they are mixed. The order is centre, balance, rotate"
                )
        if self.transforms and (self.code is None or isinstance(self.code, Exact)):
            raise ValueError(f"{self}: what is stored at 16 bits or not at all is not transformed; leave the steps out")

    @property
    def bits(self) -> int:
        """Of a code; 16 = exact, 0 = evicted."""
        return 0 if self.code is None else self.code.bits

    @property
    def block(self) -> int:
        """Tokens that are coded together."""
        return 1 if self.code is None else self.code.block

    @property
    def needs_positions(self) -> bool:
        return any(step.needs_positions for step in self.transforms)

    def check(self, head_dim: int) -> None:
        """Refuse a head dimension that a step can't take (ValueError)."""
        for step in (*self.transforms, *(() if self.code is None else (self.code,))):
            step.check(head_dim)

    def __str__(self) -> str:
        return " > ".join([*map(_text, self.transforms), "evicted" if self.code is None else _text(self.code)])


def chain_of(steps: Steps, group: int | None = None) -> Chain:
    """A chain from text, a number of bits, steps, or a list of them.

    group: of a code that is given by its number of bits alone.

    Raises:
        ValueError: no such step, or steps that don't make a chain. The message says which there are.
    """
    written = [steps] if isinstance(steps, str | int) or not isinstance(steps, Sequence) else list(steps)
    if not written:
        raise ValueError("an empty list is no way to store anything; wanted a code, as in [balance, affine4]")
    *before, last = (_step(one, group) for one in written)
    for step in before:
        if not isinstance(step, Transform):
            raise ValueError(f"{_text(step)} is no transform: a chain is transforms, then a code, as in [balance, affine4]")
    if last is not None and not isinstance(last, Code):
        raise ValueError(f"{_text(last)} is no code: a chain ends with one, as in [balance, affine4]")
    return Chain(last, tuple(before))


def _step(written: str | int | Step, group: int | None) -> Any:
    if isinstance(written, str) and written.isdigit():
        written = int(written)
    if isinstance(written, bool) or not isinstance(written, str | int):
        if isinstance(written, Transform | Code):
            return written
        raise ValueError(f"{written!r} is no step; wanted a name as in [balance, affine4], or a number of bits")
    if isinstance(written, int):
        if written not in BITS:
            raise ValueError(f"{written} bits: a tier holds {', '.join(map(str, BITS))} bits (0 = evicted)")
        return {0: None, 16: Exact()}.get(written) if written in (0, 16) else Affine(written, group)
    match = _STEP.fullmatch(written)
    kind = _kind_of(match["name"]) if match else None
    if match is None or kind is None:
        near = get_close_matches(re.sub(r"\d.*|/.*", "", written), _names(), n=2) or _names()
        raise ValueError(f"{written!r} is no step of a way to store. Did you mean {', '.join(near)}?")
    name = match["name"]
    step = getattr(import_module(f"mikv.quant.{kind}.{name}"), name.title().replace("_", ""))
    values: list[int | str] = [int(match["number"])] if match["number"] else []
    values += [int(text) if text.isdigit() else text for text in match["rest"].split("/")[1:]]
    known = [field.name for field in fields(step)]
    if len(values) > len(known):
        raise ValueError(f"{written!r}: {name} takes {', '.join(known) or 'no parameters'}")
    if kind == "codes" and known and not values:
        raise ValueError(f"{written!r}: how many bits? As in {name}4")
    return step(*values)


def _kind_of(name: str) -> str | None:
    return next((kind for kind in _KINDS if (_FOLDER / kind / f"{name}.py").is_file()), None)


def _names() -> list[str]:
    return sorted(file.stem for kind in _KINDS for file in (_FOLDER / kind).glob("[a-z]*.py"))


_FOLDER = Path(__file__).parent


def _text(step: Step) -> str:
    """As it is written: the inverse of `chain_of`, but for steps of one's own."""
    name = type(step).__name__.lower()
    if name == "exact":
        return "16"
    given = [getattr(step, field.name) for field in fields(step)]  # type: ignore[arg-type]
    defaults = [field.default for field in fields(step)]  # type: ignore[arg-type]
    while given and given[-1] == defaults[-1]:
        given.pop(), defaults.pop()
    number = str(given.pop(0)) if given and isinstance(given[0], int) else ""
    return name + number + "".join(f"/{value}" for value in given)
