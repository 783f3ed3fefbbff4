"""From Hydra's configuration to a checked `Run`. The only place that knows OmegaConf."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mikv.cache.fit import largest_share
from mikv.models.load import ModelSpec, load_geometry
from mikv.policy import Policy
from mikv.run import Run
from mikv.tracking import Tracker

CONF = (Path(__file__).parent.parent / "conf").resolve()


class ConfigError(ValueError):
    """The configuration asks for something that doesn't exist or can't be; the message says what, and what does."""


def compose(*overrides: str) -> Run:
    """The run that `python run.py OVERRIDES` would do, for scripts and tests: compose("panel=demo", "task.lines=40")."""
    import hydra
    from hydra.errors import HydraException

    try:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            config = hydra.compose("config", list(overrides))
    except HydraException as error:
        raise ConfigError(str(error)) from error
    return build(config, [override.split("=")[0] for override in overrides])


def build(config: DictConfig, chosen: Sequence[str] = ()) -> Run:
    """Build the run that a composed configuration describes.

    chosen: names of the groups that the command line sets.

    Raises:
        ConfigError, ValueError, OSError: with a message for the user.
    """
    if missing := sorted(OmegaConf.missing_keys(config)):
        raise ConfigError(f"{', '.join(missing)} must be set, for example task=lm_eval task.name=hellaswag")
    model = _instantiate(config.model, "model")
    panel, title = _panel(config, chosen, model)
    task = OmegaConf.to_container(config.task, resolve=True)
    assert isinstance(task, dict)
    limit = task.pop("limit")
    if "parts" in task:
        task["limits"] = {part: options.pop("limit") for part, options in task["parts"].items()}
    record = OmegaConf.to_container(config, resolve=True)
    assert isinstance(record, dict)
    for name in ("tracker", "launcher"):  # a run does not depend on them
        del record[name]
    if config.get("panel") is not None:
        del record["policy"]  # the group's default, which a panel doesn't use
    return Run(
        model=model,
        panel=panel,
        task=_instantiate(OmegaConf.create(task), "task"),
        limit=limit,
        question=config.protocol.question,
        batch_size=config.batch_size,
        seed=config.seed,
        reader=config.reader,
        attention=config.attention,
        fidelity=config.fidelity,
        name=config.name,
        out=Path(config.out),
        title=title,
        config=OmegaConf.to_yaml(OmegaConf.create(record)),
    )


def tracker(config: DictConfig) -> Tracker:
    """Where the run is mirrored to, when it has ended."""
    made = _instantiate(config.tracker, "tracker")
    assert isinstance(made, Tracker)
    return made


def launcher(config: DictConfig) -> Any:
    """Where the jobs of a sweep run: one of mikv.sweep.launchers."""
    return _instantiate(config.launcher, "launcher")


def _panel(config: DictConfig, chosen: Sequence[str], model: ModelSpec) -> tuple[tuple[Policy, ...], str]:
    """The policies to run, `full` first: everything has its twin. And a name for them.

    An entry with `size` (a share of the 16-bit cache's bytes) gets the largest `keep` that fits it; where none does, it is
    left out, with a note.
    """
    full = policy("full")
    if config.get("panel") is None:
        asked = [_instantiate(config.policy, "policy")]
        title = asked[0].name
    else:
        if "policy" in chosen:
            raise ConfigError("policy=... and panel=... exclude each other: a panel brings its own policies")
        title = config.panel.name
        asked = []
        for entry in config.panel.entries:
            options = OmegaConf.to_container(entry, resolve=True)
            assert isinstance(options, dict)
            name, size = str(options.pop("policy")), options.pop("size", None)
            if size is not None:
                keep = _fitting(name, options, float(size), model)
                if keep is None:
                    continue
                options["keep"] = keep
            asked.append(policy(name, options))
    rest = [p for p in asked if p != full]
    return (full, *rest), title


def _fitting(name: str, options: dict[Any, Any], size: float, model: ModelSpec) -> float | None:
    """The `keep` that makes a policy as large as wanted; None, with a note, where there is none."""
    head_dim = load_geometry(model).head_dim
    try:
        keep = largest_share(lambda share: policy(name, {**options, "keep": share}), size, head_dim)
        why = "it is larger with any keep"
    except ConfigError:
        raise
    except ValueError as error:  # a group of channels that the head can't be cut into
        keep, why = None, str(error)
    if keep is None:
        print(f"note: {name} {options} is left out of {100 * size:g} % of the cache of {model.name}: {why}")
    return keep


def policy(name: str, overrides: dict[Any, Any] | None = None) -> Policy:
    """A policy of conf/policy with parameters overridden: policy("mikv", {"keep": 0.1, "high.bits": 8})."""
    names = sorted(file.stem for file in (CONF / "policy").glob("*.yaml"))
    if name not in names:
        raise ConfigError(f"there is no policy {name!r}{near(name, names)}; there are {', '.join(names)}")
    config = OmegaConf.load(CONF / "policy" / f"{name}.yaml")
    OmegaConf.set_struct(config, True)
    for option, value in (overrides or {}).items():
        try:
            OmegaConf.update(config, str(option), value)
        except OmegaConfBaseException as error:
            known = [str(key) for key in config if key != "_target_"]
            raise ConfigError(
                f"policy {name} has no option {option!r}{near(str(option), known)}; it has {', '.join(known)}"
            ) from error
    return _instantiate(config, f"policy {name}")


def near(name: str, known: Sequence[str]) -> str:
    """', did you mean ...?' where something known looks like it."""
    found = difflib.get_close_matches(name, known, n=2)
    return f" (did you mean {' or '.join(found)}?)" if found else ""


def _instantiate(config: Any, what: str) -> Any:
    """A YAML is a constructor call; what the constructor refuses is the user's to know, not Hydra's traceback."""
    from hydra.errors import InstantiationException

    try:
        return instantiate(config, _convert_="object")
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, ValueError | TypeError | OSError | RuntimeError):
            raise ConfigError(f"{what}: {cause}") from error
        raise
