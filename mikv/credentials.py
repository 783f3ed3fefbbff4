"""Secrets are no options. Options stand in records, in a sweep's job scripts, in logs, in W&B and in the list of processes; a
token among them is refused, with a message that doesn't repeat it. Programs that need one take it from the environment."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_NAMES = re.compile(r"(?:[_-]key|apikey|token|secret|password|passwd|credentials?)$")
# What services give out, wherever it stands: Hugging Face, W&B, OpenAI and others, GitHub; and an address with a password.
_SHAPES = re.compile(
    r"(?<![A-Za-z0-9])(?:(?:hf|api_org)_[A-Za-z0-9]{20,}|wandb_v\d+_\w{10,}|sk-[\w-]{20,}|gh[pousr]_\w{20,}|github_pat_\w{20,})"
    r"|://[^/\s:@]*:[^/\s@]+@"
)
# W&B's older keys look like commits: as a whole value, and not of an option that wants a commit.
_DIGITS = re.compile(r"(?:local-)?[0-9a-f]{40}")
_COMMITS = ("revision", "commit")
_ASSIGNED = re.compile(r"([A-Z][A-Z0-9_]*)=\S")  # a variable of a shell: launcher.setup, --export of sbatch
_ENTRY = re.compile(r"[{,]\s*['\"]?([\w.-]+)['\"]?\s*:")  # of a mapping on a command line
_FROM_ENVIRONMENT = re.compile(r"oc\.env:\s*['\"]?(\w+)")
_SHORTEST = 8  # characters of a variable's value; a shorter one may stand anywhere by chance


def names_secret(name: str) -> bool:
    """Whether an option or a variable is named like a secret (`hub_token`; not `max_new_tokens`, not `niah_multikey`)."""
    return _NAMES.search(name.lower()) is not None


def secret_values() -> list[str]:
    """Values of the environment variables that are named like secrets, the longest first."""
    values = {value for name, value in os.environ.items() if len(value) >= _SHORTEST and names_secret(name)}
    return sorted(values, key=len, reverse=True)


def refuse_secret_arguments(arguments: Sequence[str]) -> None:
    """Look at a command line before anybody else does, and may repeat it.

    Raises:
        ValueError: a secret is among them.
    """
    for argument in arguments:
        name, equals, value = argument.partition("=")
        name = name.lstrip("+~-")
        inside = _FROM_ENVIRONMENT.findall(value)
        if value.lstrip("'\"")[:1] in ("{", "["):
            inside += _ENTRY.findall(value)
        if (equals and names_secret(name)) or any(map(names_secret, inside)) or _is_secret(name, value) or _holds(argument):
            raise _refusal(name if equals else "")


def refuse_secret_options(options: Any, name: str = "") -> None:
    """Look at a whole configuration: what isn't on the command line may come from a file, or from the environment.

    Raises:
        ValueError: a secret is in it.
    """
    entries: Iterable[tuple[Any, Any]] = ()
    if isinstance(options, Mapping):
        entries = options.items()
    elif isinstance(options, list | tuple):
        entries = enumerate(options)
    elif isinstance(options, str) and options and (names_secret(name) or _is_secret(name, options) or _holds(options)):
        raise _refusal(name)
    for key, value in entries:
        refuse_secret_options(value, f"{name}.{key}" if name else str(key))


def _is_secret(name: str, value: str) -> bool:
    return bool(_DIGITS.fullmatch(value.strip("'\" "))) and not name.lower().endswith(_COMMITS)


def _holds(text: str) -> bool:
    """Whether something that looks like a secret stands in a text, or is set in it, or one that the environment holds."""
    assigned = any(map(names_secret, _ASSIGNED.findall(text)))
    return assigned or bool(_SHAPES.search(text)) or any(value in text for value in secret_values())


def _refusal(name: str) -> ValueError:
    what = "an argument" if not name or _holds(name) or _DIGITS.search(name) else name
    return ValueError(
        f"{what} holds or names a secret. Secrets are no options: those stand in records, job scripts and the list of "
        "processes. Set an environment variable (HF_TOKEN, WANDB_API_KEY), or log in once (hf auth login, wandb login)"
    )
