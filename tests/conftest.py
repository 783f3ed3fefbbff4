"""What all tests share: tiny random models, prompts, and every policy of conf/policy."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# Kernels run in Triton's interpreter, on the CPU. It must be known before anything imports triton.
os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch

from mikv.attention.install import install
from mikv.config import CONF, options_of_policy, own_folder, policy
from mikv.engine import Engine
from mikv.engine.requests import Decoding, Prompt
from mikv.models.tiny import tiny_config, tiny_model
from mikv.policy import Policy
from mikv.quant.tier import Tier

install()

# Triton exists for Linux alone; elsewhere the kernels can't be tested.
collect_ignore = [] if find_spec("triton") else ["kernels"]
ROOT = Path(__file__).parents[1]
SHARED_DATA = ROOT.parent / "shared" / "data"
# All that can be had: presses come with a library of their own (tests/baselines/test_kvpress.py has a stand-in).
POLICIES = sorted(
    file.stem for file in (CONF / "policy").glob("[!_]*.yaml") if file.stem != "kvpress" or find_spec("kvpress") is not None
)
STRANGER_FILES = Path(__file__).parent / "strangers"
STRANGERS = sorted(file.stem for file in (STRANGER_FILES / "policy").glob("*.yaml"))
NO_END: frozenset[int] = frozenset()
# What a run's identity looks like, for tests of hashes and records.
IDENTITY: dict[str, Any] = {
    "model": {"name": "tiny", "weights": "hub:a/b@main", "dtype": "float32"},
    "task": {"name": "linerecall", "version": 1, "lines": 20, "file": None},
    "policy": {"tiers": [[16, 16, None], [2, 2, 32]], "shares": [0.2], "balance": True},
    "doc_id": 0,
    "seed": 0,
}


@cache
def model(architecture: str = "llama", dtype: torch.dtype = torch.float32, attention: str = "mikv", **shape: Any) -> Any:
    """A tiny random model; the same weights for every `attention`."""
    return tiny_model(tiny_config(architecture, **shape), dtype, attention=attention)


def engine(reader: str = "working", kernels: str | None = None, **options: Any) -> Engine:
    """An engine that never ends an answer by itself, so that tests decide how far it decodes."""
    return Engine(model(**options), NO_END, 257, reader, kernels)


def tokens(length: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def prompt(length: int, seed: int = 0, question: int = 1) -> Prompt:
    """A prompt of `length` random tokens, the last `question` of which are the question."""
    ids = tokens(length, seed)
    return Prompt(ids[: length - question], ids[length - question :])


def answers(engine: Engine, prompts: Sequence[Prompt], panel: Sequence[Policy], steps: int = 8) -> list[list[list[int]]]:
    """Answer tokens by policy and prompt."""
    return [[g.tokens for g in row] for row in engine.generate(prompts, panel, Decoding(steps))]


def bits_everywhere(name: str, bits: int) -> Policy:
    """A policy of conf/policy with `bits` in every tier that it stores; one that evicts keeps everything."""
    from omegaconf import DictConfig

    options = options_of_policy(name).items()
    overrides: dict[str, Any] = {f"{key}.bits": bits for key, value in options if isinstance(value, DictConfig)}
    if policy(name).evicts:
        overrides["keep"] = 1.0
    found = policy(name, overrides)
    if overrides:
        return found
    tiers = (tier if tier.exact else Tier(bits) for tier in found.tiers)  # of a policy that takes none from outside
    return replace(found, tiers=tuple(tiers))


def named_policy(name: str) -> Policy:
    """A policy of conf/policy or of tests/strangers, with its YAML's parameters."""
    return policy(name, own=own_folder(str(STRANGER_FILES)))


@pytest.fixture(params=[*POLICIES, *STRANGERS])
def any_policy(request: pytest.FixtureRequest) -> Policy:
    """Every policy of conf/policy and of tests/strangers, found by listing the folders."""
    return named_policy(request.param)


@pytest.fixture
def kvpress_side(monkeypatch: pytest.MonkeyPatch) -> Any:
    """scripts/kvpress_side.py beside a kvpress that has one press."""
    monkeypatch.setitem(sys.modules, "kvpress", SimpleNamespace(Press=SimpleNamespace))
    return importlib.import_module("scripts.kvpress_side")


@pytest.fixture(scope="session")
def own(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders with the task YAMLs of own_tasks and with their data."""
    import datasets
    import own_tasks

    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")  # not the user's
    tasks, data = tmp_path_factory.mktemp("tasks"), tmp_path_factory.mktemp("data")
    own_tasks.make(tasks, data)
    return tasks, data
