"""Are options of the kind that they must be? Asked of plain values, before torch and models are loaded.

What an option must be follows from its default in conf/: a whole number, a number, true or false, text, a list. Only for those
whose default is null does a table say it.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

QUESTIONS = ("visible", "hidden")
READERS = ("working", "packed", "kernel")
IMPLEMENTATIONS = ("reference", "triton")
DTYPES = ("auto", "float32", "bfloat16", "float16")
EXECUTION = (True, False, "unconfined")
MOST = 10**6
"""Samples, and prompts at a time, beyond which a number is a slip: all requests are encoded before the first is served."""

# Of options whose value may be null: by name, or by name with its group where a name means two things.
_NULLABLE: dict[str, type] = {
    **dict.fromkeys(("limit", "group", "key_bits", "value_bits", "max_tokens", "num_fewshot", "depths", "threads"), int),
    **dict.fromkeys(("data_dir", "revision", "path", "device_map", "adapter", "gguf_package", "hub", "system", "metric"), str),
    **dict.fromkeys(("file", "text", "include", "reader", "attention", "name", "entity", "tracker.group"), str),
    **dict.fromkeys(("partition", "account", "qos", "constraint"), str),
    **dict.fromkeys(("only", "tasks", "categories", "gpu_ids"), list),
    **dict.fromkeys(("gen_kwargs", "metadata", "options"), dict),
}
_KINDS: dict[type, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list, [one,two]",
    dict: "a mapping, {name: value}",
}
_CHOICES: dict[str, tuple[str, ...]] = {
    "protocol.question": QUESTIONS,
    "reader": READERS,
    "attention": IMPLEMENTATIONS,
    "model.dtype": DTYPES,
}
# Options that are true, false or a word: their default does not say it.
_MIXED: dict[str, tuple[bool | str, ...]] = dict.fromkeys(("allow_code_execution", "task.allow_code_execution"), EXECUTION)
_SHARES = ("keep", "recent", "size")
_RANGES: dict[str, tuple[int, int]] = {
    "batch_size": (1, MOST),
    "task.limit": (1, MOST),
    "task.max_new_tokens": (1, MOST),
    "model.max_tokens": (2, 10**9),
    "seed": (0, 2**32 - 1),
}


def check_option(name: str, given: Any, default: Any) -> None:
    """Refuse a value of another kind than the option's.

    Args:
        name: of the option, with dots.
        given: its value, as plain Python values.
        default: its value in conf/; None = nothing is known but what the table says.

    Raises:
        ValueError: the message names the option, what was given and what is wanted.
    """
    if name in _MIXED:
        check_choice(name, given, _MIXED[name])
        return
    nullable = next((kind for known, kind in _NULLABLE.items() if f".{name}".endswith(f".{known}")), None)
    if given is None:
        if default is None or nullable is not None:
            return
        raise ValueError(f"{name}=null: wanted {_KINDS[_kind(default)]}, such as {name}={_written(default)}")
    kind = nullable if default is None else _kind(default)
    if isinstance(default, dict) and "_target_" in default and isinstance(given, str | int):
        return  # what is built from options may have a short form (policy.low=k4v2): who builds it knows
    if kind is not None and not _is(given, kind):
        raise ValueError(f"{name}={_written(given)}: wanted {_KINDS[kind]}{_nearest(name, given, kind, default)}")
    check_choice(name, given, _CHOICES.get(name))
    check_range(name, given)
    if name == "name":
        check_name(given)
    if name == "out" and not str(given).strip():
        raise ValueError("out= is empty: wanted the folder in which runs lie, such as out=results/runs")


def check_choice(name: str, value: Any, choices: Sequence[bool | str] | None) -> None:
    """Refuse what is not among the choices (None = anything goes).

    Raises:
        ValueError
    """
    if choices is None or any(value == choice and isinstance(value, type(choice)) for choice in choices):
        return
    written = [_written(choice) for choice in choices]
    raise ValueError(f"{name}={_written(value)}{near(_written(value), written)}: choose {' or '.join(written)}")


def check_range(name: str, value: Any) -> None:
    """Refuse a number beyond what the option allows.

    Raises:
        ValueError
    """
    if name.rpartition(".")[2] in _SHARES and not 0 <= value <= 1:
        raise ValueError(f"{name}={value} is no ratio: wanted a part between 0 and 1, such as {name}=0.2 (20 %)")
    if name in _RANGES and value is not None:
        least, most = _RANGES[name]
        if not isinstance(value, int) or not least <= value <= most:
            raise ValueError(f"{name}={value}: wanted a whole number from {least} to {most}")


def check_name(name: str | None) -> None:
    """A run's folder lies within `out`, where lists and checks of a tree find it.

    Raises:
        ValueError: it would lie elsewhere, or be hidden.
    """
    if name is None:
        return
    path = PurePath(name)
    if not name.strip() or path.is_absolute() or not path.parts or any(part.startswith(".") for part in path.parts):
        raise ValueError(
            f"name={name!r}: wanted the name of a folder within out=, such as name=first-try (not empty, not absolute, and no "
            "part of it begins with a dot); out=FOLDER says where runs lie"
        )


def near(name: str, known: Sequence[str]) -> str:
    """' (did you mean ...?)' where something known looks like it."""
    found = difflib.get_close_matches(name, known, n=2)
    return f" (did you mean {' or '.join(found)}?)" if found else ""


def _kind(value: Any) -> type:
    if isinstance(value, Mapping):
        return dict
    if isinstance(value, Sequence) and not isinstance(value, str):
        return list
    return next(kind for kind in (bool, int, float, str) if isinstance(value, kind))


def _is(value: Any, kind: type) -> bool:
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return _kind(value) is kind


def _nearest(name: str, given: Any, kind: type, default: Any) -> str:
    """What the user may have meant."""
    if kind is int and isinstance(given, float):
        return f", such as {name}={round(given)}"
    if kind is str:
        return f"; as text it is {name}='\"{_written(given)}\"'"
    return "" if default is None or kind in (bool, list, dict) else f", such as {name}={_written(default)}"


def _written(value: Any) -> str:
    """As on a command line."""
    return {True: "true", False: "false", None: "null"}[value] if value is None or isinstance(value, bool) else str(value)
