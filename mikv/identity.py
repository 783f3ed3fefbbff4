"""What a value is, as plain JSON values: the material that keys of records are hashed from. Imports nothing of the project.

An identity is derived, never listed by hand: whoever adds a field to a policy, a score or a task has it in the key.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any


def identity_of(value: Any, leave_out: Collection[str] = ()) -> Any:
    """A value as JSON values; of a dataclass its class and all its fields.

    Args:
        value: dataclasses, mappings with text keys, sequences, sets, numbers, text, paths, None; in each other as deep as
            they are.
        leave_out: fields of the outermost dataclass that change no outcome (a label).

    Raises:
        TypeError: a value whose identity can't be told from its fields.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: identity_of(getattr(value, f.name)) for f in dataclasses.fields(value) if f.name not in leave_out}
        return {"class": type(value).__qualname__, **fields}
    if isinstance(value, Mapping):
        return {str(name): identity_of(one) for name, one in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [identity_of(one) for one in value]
    if isinstance(value, set | frozenset):
        return sorted((identity_of(one) for one in value), key=repr)
    if isinstance(value, Fraction | Path):
        return str(value)
    raise TypeError(f"{value!r} of type {type(value).__name__} can't be a part of a record's key: its fields are not known")
