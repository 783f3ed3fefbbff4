"""Imports go down the list of the design, never up, and each outside world enters through one module.

run.py -> config -> runner -> lm, work, batches -> engine, tasks, metrics, records, ... -> cache, attention, models -> policy
       -> importance, quant -> types.       baselines -> policy, importance, quant, types
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

# What a module, or all modules of a package, may import of this project; the longest name that fits counts. Whatever is in
# no entry fails: a new module finds its place here.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "mikv": (),
    "mikv.types": (),
    "mikv.options": (),
    "mikv.shares": (),
    "mikv.credentials": (),
    "mikv.tensors": (),
    "mikv.identity": (),
    "mikv.digests": (),
    "mikv.fingerprint": ("mikv.digests",),
    "mikv.rope": (),
    "mikv.quant": ("mikv.types", "mikv.options", "mikv.rope", "mikv.quant"),
    "mikv.quant.codes.trellis": ("mikv.quant", "mikv.kernels.search_launch"),  # on a GPU torch would take a launch per channel
    "mikv.randomness": (),
    "mikv.importance": ("mikv.types", "mikv.shares", "mikv.randomness", "mikv.rope", "mikv.tensors", "mikv.importance"),
    "mikv.kernels": ("mikv.types", "mikv.options", "mikv.quant", "mikv.kernels"),
    "mikv.budget": ("mikv.options", "mikv.shares", "mikv.importance", "mikv.tensors"),
    "mikv.policy": (
        "mikv.types",
        "mikv.options",
        "mikv.shares",
        "mikv.identity",
        "mikv.quant",
        "mikv.importance",
        "mikv.budget",
    ),
    "mikv.assignment": ("mikv.policy", "mikv.shares", "mikv.tensors"),
    "mikv.mikv": ("mikv.types", "mikv.quant", "mikv.importance", "mikv.policy", "mikv.budget"),
    "mikv.head_bits": ("mikv.budget", "mikv.importance", "mikv.tensors"),
    "mikv.whiten": ("mikv.quant", "mikv.importance", "mikv.options", "mikv.policy", "mikv.budget", "mikv.head_bits"),
    "mikv.attention": ("mikv.types", "mikv.quant", "mikv.importance", "mikv.policy", "mikv.attention"),
    "mikv.cache": (
        *("mikv.types", "mikv.quant", "mikv.kernels", "mikv.importance", "mikv.policy"),
        *("mikv.assignment", "mikv.attention", "mikv.cache", "mikv.tensors", "mikv.rope"),
    ),
    "mikv.models": (
        *("mikv.types", "mikv.digests", "mikv.fingerprint", "mikv.quant", "mikv.importance", "mikv.policy"),
        *("mikv.attention", "mikv.models", "mikv.options"),
    ),
    "mikv.engine": ("mikv.engine", "mikv.cache", "mikv.policy"),
    "mikv.engine.requests": ("mikv.cache.compressed",),
    "mikv.engine.prefill": (
        *("mikv.types", "mikv.randomness", "mikv.rope", "mikv.importance", "mikv.policy", "mikv.cache"),
        *("mikv.kernels.verify", "mikv.models"),
    ),
    "mikv.engine.generate": ("mikv.engine.requests", "mikv.engine.prefill", "mikv.cache.compressed", "mikv.randomness"),
    "mikv.engine.score": ("mikv.engine.requests", "mikv.engine.prefill", "mikv.cache.compressed"),
    "mikv.cache.backend": ("mikv.kernels", "mikv.options", "mikv.policy", "mikv.quant"),
    "mikv.inside": ("mikv.engine", "mikv.cache", "mikv.models", "mikv.policy", "mikv.quant"),
    "mikv.tasks": ("mikv.tasks",),
    "mikv.work": (
        *("mikv.engine", "mikv.models", "mikv.fingerprint"),
        *("mikv.identity", "mikv.tasks", "mikv.metrics", "mikv.work"),
    ),
    "mikv.lm": (
        *("mikv.engine", "mikv.models", "mikv.policy", "mikv.fingerprint"),
        *("mikv.tasks", "mikv.metrics", "mikv.work", "mikv.lm"),
    ),
    "mikv.metrics": ("mikv.metrics",),
    "mikv.records": ("mikv.records", "mikv.fingerprint", "mikv.metrics.recount"),
    "mikv.stopping": (),
    "mikv.plots": ("mikv.metrics", "mikv.plots"),
    "mikv.results": ("mikv.records",),
    "mikv.tracking": ("mikv.results", "mikv.records", "mikv.fingerprint", "mikv.credentials"),
    "mikv.report": ("mikv.results", "mikv.records", "mikv.metrics", "mikv.plots", "mikv.report"),
    "mikv.columns": (),
    "mikv.table": ("mikv.columns",),
    "mikv.run": (
        *("mikv.models", "mikv.options", "mikv.policy", "mikv.fingerprint", "mikv.cache.backend", "mikv.tasks"),
        "mikv.work",
    ),
    "mikv.run_summary": ("mikv.work", "mikv.metrics", "mikv.records"),
    "mikv.runner": (
        *("mikv.run", "mikv.run_summary", "mikv.engine", "mikv.models", "mikv.policy"),
        *("mikv.work", "mikv.records", "mikv.stopping", "mikv.plots", "mikv.table"),
    ),
    "mikv.cli": ("mikv.stopping",),
    "mikv.config": (
        *("mikv.options", "mikv.credentials", "mikv.tracking", "mikv.run", "mikv.policy", "mikv.models"),
        "mikv.cache.fit",
    ),
    "mikv.sweep": ("mikv.records", "mikv.stopping", "mikv.sweep"),
    "mikv.sweep.overview": ("mikv.columns", "mikv.table", "mikv.sweep"),
    "mikv.sweep.launch": ("mikv.cli", "mikv.config", "mikv.stopping", "mikv.sweep", "hydra_plugins.hydra_submitit_launcher"),
    "hydra_plugins.mikv_launcher": ("mikv.sweep",),
    "baselines": (
        *("mikv.types", "mikv.options", "mikv.shares", "mikv.quant", "mikv.importance", "mikv.policy", "mikv.budget"),
    ),
    "experiments": ("mikv", "experiments"),
    "scripts": ("mikv", "baselines", "scripts"),
    "run": ("mikv", "experiments"),
}
# Outside worlds, and the only modules that may import them.
ENTRANCES: dict[str, tuple[str, ...]] = {
    "wandb": ("mikv.tracking",),
    "lm_eval": ("mikv.lm",),
    "datasets": ("mikv.lm", "mikv.tasks.data"),
    "triton": ("mikv.kernels",),
    "hydra": ("run", "mikv.config", "mikv.sweep.launch", "hydra_plugins"),
    "omegaconf": ("run", "mikv.config", "mikv.sweep.launch", "hydra_plugins"),
    "submitit": ("mikv.sweep.launchers",),
    "kvpress": ("baselines.kvpress", "scripts.kvpress_side"),
}
OURS = ("mikv", "hydra_plugins", "baselines", "experiments", "scripts", "run")


def sources() -> dict[str, str]:
    """Text of every module of the project but the tests, by dotted name."""
    files = [ROOT / "run.py", *(file for name in OURS for file in (ROOT / name).rglob("*.py"))]
    return {name_of(file): file.read_text(encoding="utf-8") for file in files}


def name_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported(text: str, package: str) -> Iterator[str]:
    """Dotted names that a module's text imports, wherever in it; `from a import b` is both a and a.b (b may be a module).

    package: of the module, for relative imports.
    """
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            origin = ".".join([*parts, *([node.module] if node.module else [])])
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def inside(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def violations(module: str, text: str, is_package: bool = False) -> list[str]:
    """Imports of a module that the two tables forbid, and a place in them that it lacks."""
    places = [entry for entry in MAY_IMPORT if inside(module, entry) and (entry != "mikv" or module == "mikv")]
    if not places:
        return [f"{module} has no place in MAY_IMPORT"]
    allowed = MAY_IMPORT[max(places, key=len)]
    found = []
    for name in imported(text, module if is_package else module.rpartition(".")[0]):
        world = name.split(".")[0]
        if world in OURS and not any(inside(name, entry) for entry in allowed):
            found.append(f"{module} imports {name}")
        if world in ENTRANCES and not any(inside(module, entry) for entry in ENTRANCES[world]):
            found.append(f"{module} imports {name}")
    return found


SOURCES = sources()


def test_all_modules_are_looked_at() -> None:
    assert {"run", "mikv", "mikv.types", "mikv.cache.compressed", "baselines.h2o", "scripts.train_recall"} <= set(SOURCES)


@pytest.mark.parametrize("module", SOURCES)
def test_a_module_imports_only_what_stands_below_it(module: str) -> None:
    is_package = (ROOT / module.replace(".", "/")).is_dir()
    assert violations(module, SOURCES[module], is_package) == []


def test_the_table_itself_has_no_circle() -> None:
    """Whoever adds a line to the table can't turn an arrow round."""
    below = {name: {other for other in allowed if other != name and other != "mikv"} for name, allowed in MAY_IMPORT.items()}
    while below:
        bottom = {name for name, others in below.items() if not others & set(below)}
        assert bottom, f"a circle among {sorted(below)}"
        below = {name: others for name, others in below.items() if name not in bottom}


def test_no_entry_of_the_table_lets_mikv_reach_up() -> None:
    for name, allowed in MAY_IMPORT.items():
        if inside(name, "mikv") or name == "baselines":
            assert not {"mikv", "baselines", "experiments", "run", "scripts"} & set(allowed), name


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("mikv.types", "import mikv.engine"),
        ("mikv.quant.affine", "from mikv import policy"),
        ("mikv.quant.affine", "from ..cache import compressed"),
        ("mikv.cache.prefill", "def f():\n    from mikv.engine import Engine"),
        ("mikv.engine", "from baselines.h2o import h2o"),
        ("mikv.runner", "import run"),
        ("mikv.policy", "if TYPE_CHECKING:\n    import omegaconf"),
        ("mikv.runner", "from hydra.utils import instantiate"),
        ("mikv.records", "import wandb"),
        ("mikv.runner", "import mikv.sweep"),
        ("mikv.sweep.status", "from submitit import AutoExecutor"),
        ("mikv.brand_new", ""),
        ("mikv.typeset", ""),  # not mikv.types
    ],
)
def test_a_forbidden_import_is_found(module: str, text: str) -> None:
    assert violations(module, text)


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("mikv.cache.prefill", "from mikv.types import Tier\nfrom .tier_store import TierStore\nimport hydrate, torch"),
        ("mikv.config", "import hydra.utils"),
        ("baselines.new", "from mikv.policy import Policy"),
    ],
)
def test_an_allowed_import_is_left_alone(module: str, text: str) -> None:
    assert violations(module, text) == []
