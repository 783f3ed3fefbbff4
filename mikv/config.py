"""From a command line, or Hydra's configuration, to a checked `Run`. With run.py the only place that knows OmegaConf.

What can be checked without torch is checked before it is imported: a slip is answered at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override
from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mikv.credentials import refuse_secret_arguments, refuse_secret_options
from mikv.options import check_option, near
from mikv.policy import Policy

if TYPE_CHECKING:  # they load torch
    from mikv.models.load import ModelSpec
    from mikv.run import Run
    from mikv.tracking import Tracker

CONF = (Path(__file__).parent.parent / "conf").resolve()
GROUPS = sorted(folder.name for folder in CONF.iterdir() if folder.is_dir())
_NONE_UNLESS_NAMED = ("panel", "judge", "experiment")
_MISSING = "???"


class ConfigError(ValueError):
    """The configuration asks for something that doesn't exist or can't be; the message says what, and what does."""


def compose(*overrides: str) -> Run:
    """The run that `python run.py OVERRIDES` would do, for scripts and tests: compose("panel=demo", "task.lines=40")."""
    return build(checked(overrides), [override.split("=")[0] for override in overrides])


def checked(arguments: Sequence[str]) -> DictConfig:
    """The configuration that a command line asks for, its options checked as far as that needs no model and no data.

    Args:
        arguments: overrides. Of a sweep (policy=mikv,h2o) every value is checked, and the first of each is composed.

    Raises:
        ConfigError, ValueError: a message for the user.
    """
    refuse_secret_arguments(arguments)
    overrides = [_parsed(argument) for argument in arguments]
    ours = [override for override in overrides if not override.get_key_element().lstrip("+~").startswith("hydra")]
    named = [override.value() for override in ours if override.key_or_group == "conf_dir"]
    own = own_folder(None if not named or named[-1] is None else str(named[-1]))
    values = [_values(override, own) for override in ours]
    config = _checked(ours, [of[0] for of in values], own)
    for place, (override, of) in enumerate(zip(ours, values, strict=True)):
        if override.key_or_group in GROUPS:
            for other in of[1:]:
                _checked(ours, [*(v[0] for v in values[:place]), other, *(v[0] for v in values[place + 1 :])], own)
        elif len(of) > 1:
            _check_values(override, config)
    return config


def _parsed(argument: str) -> Override:
    try:
        return OverridesParser.create().parse_override(argument)
    except HydraException as error:
        name, equals, value = argument.partition("=")
        hint = (
            f"; what has special characters is quoted twice, for the shell and for Hydra: {name}='\"{value}\"'"
            if equals
            else ""
        )
        raise ConfigError(f"{argument} can't be read: wanted name=value{hint}") from error


def _values(override: Override, own: Path | None) -> list[str]:
    """The override with each of its values: one, or those of a sweep."""
    name = override.get_key_element()
    group = override.key_or_group
    if override.is_delete() and override.value() is None:
        return [str(override.input_line)]
    value = override.value()
    if isinstance(value, Glob):
        found = value.filter(_choices(group, own))
        if not found:
            raise ConfigError(f"{override.input_line}: there are {', '.join(_choices(group, own))}")
        return [f"{name}={choice}" for choice in found]
    if override.is_sweep_override():
        return [f"{name}={choice}" for choice in override.sweep_string_iterator()]
    if group in GROUPS and not override.is_delete():
        if value is None and group in _NONE_UNLESS_NAMED:  # Hydra takes no null
            raise ConfigError(f"{group}=null: leave it out, a run has no {group} unless one is named")
        if value is None:
            raise ConfigError(f"{group}=null: a run needs a {group}; there are {', '.join(_choices(group, own))}")
        if not isinstance(value, str):
            raise ConfigError(
                f"{override.input_line}: wanted the name of a {group}; there are {', '.join(_choices(group, own))}"
            )
    return [str(override.input_line)]


def _choices(group: str, own: Path | None = None) -> list[str]:
    """Names of a group: YAML files of conf/ and of the user's folder, but for those that others are made of (_...)."""
    folders = [CONF] if own is None else [CONF, own]
    return sorted({file.stem for folder in folders for file in (folder / group).glob("[!_]*.yaml")})


def own_folder(conf_dir: str | None) -> Path | None:
    """The user's folder of configurations; Python files in it can be named by `_target_` from now on.

    Raises:
        ConfigError: there is no such folder, or none of a group in it.
    """
    if conf_dir is None:
        return None
    folder = Path(conf_dir).expanduser().resolve()
    if not any((folder / group).is_dir() for group in GROUPS):
        groups = ", ".join(f"{group}/" for group in GROUPS)
        raise ConfigError(f"conf_dir={conf_dir}: wanted a folder that holds YAML files in one of {groups} as conf/ does")
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    return folder


def with_search_path(arguments: Sequence[str]) -> list[str]:
    """A command line with what Hydra must know of `conf_dir=FOLDER`."""
    given = [argument.partition("=")[2].strip("'\"") for argument in arguments if argument.startswith("conf_dir=")]
    own = own_folder(given[-1] if given and given[-1] != "null" else None)
    return [*arguments, *_search_path(own)]


def _search_path(own: Path | None) -> list[str]:
    return [] if own is None else [f"hydra.searchpath=['file://{own}']"]


def _checked(overrides: Sequence[Override], lines: Sequence[str], own: Path | None) -> DictConfig:
    """Compose one configuration, whose overrides are written in `lines`, and check what was overridden."""
    of_groups = [line for override, line in zip(overrides, lines, strict=True) if override.key_or_group in GROUPS]
    for line in of_groups:
        group, _, choice = line.lstrip("+~").partition("=")
        group, choice = group.partition("@")[0], choice.strip("'\"")
        names = _choices(group, own)
        if choice and choice not in names:
            raise ConfigError(f"there is no {group} {choice!r}{_meant(group, choice, names)}; there are {', '.join(names)}")
    defaults = _composed(of_groups, own)
    for override in overrides:
        if override.key_or_group not in GROUPS:
            _check_exists(override, defaults)
    config = _composed(lines, own)
    for override in overrides:
        name = override.key_or_group
        if name not in GROUPS and not override.is_delete():
            check_option(name, _plain(OmegaConf.select(config, name)), _plain(OmegaConf.select(defaults, name)))
    _check_policies(config, [override.key_or_group for override in overrides])
    return config


def _meant(group: str, choice: str, names: Sequence[str]) -> str:
    found = near(choice, names)
    return found.replace("did you mean ", f"did you mean {group}=") if found else ""


def _composed(lines: Sequence[str], own: Path | None) -> DictConfig:
    try:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            return hydra.compose("config", [*lines, *_search_path(own)])
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(" ".join(str(error).split())) from error


def _check_exists(override: Override, defaults: DictConfig) -> None:
    """Refuse an option that isn't there; one that is added (+) must at least lie in a group."""
    name = override.key_or_group
    parent, dot, last = name.rpartition(".")
    options = OmegaConf.select(defaults, parent) if parent else defaults
    every = [str(key) for key in options] if isinstance(options, DictConfig) else []
    if last in every or (override.is_add() and dot):
        return
    known = [key for key in every if key != "_target_"]
    there = f"; {parent or 'a run'} has {', '.join(known)}" if known else ""
    found = near(last, known).replace("did you mean ", f"did you mean {parent}{dot}")
    raise ConfigError(f"there is no option {name}{found}{there}")


def _check_values(override: Override, config: DictConfig) -> None:
    """The values of a sweep over one option, beside the first one, which stands in the configuration."""
    default = _plain(OmegaConf.select(config, override.key_or_group))
    for line in override.sweep_iterator():
        check_option(override.key_or_group, line, default)


def _plain(value: Any) -> Any:
    """Without OmegaConf; what must be set (???) has no value yet."""
    plain = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    return None if plain == _MISSING else plain


def _check_policies(config: DictConfig, chosen: Sequence[str]) -> None:
    """Build every policy that needs no look at the model."""
    if config.get("panel") is None:
        _instantiate(config.policy, "policy")
        return
    for name, options, size in _entries(config, chosen):
        policy(name, options if size is None else {**options, "keep": 0.5}, own_folder(config.conf_dir))


def build(config: DictConfig, chosen: Sequence[str] = ()) -> Run:
    """Build the run that a composed configuration describes.

    chosen: names of the groups that the command line sets.

    Raises:
        ConfigError, ValueError, OSError: with a message for the user.
    """
    refuse_secrets(config)
    own = own_folder(config.conf_dir)
    if missing := sorted(OmegaConf.missing_keys(config)):
        raise ConfigError(f"{', '.join(missing)} must be set, for example task=lm_eval task.name=hellaswag")
    options = OmegaConf.to_container(config.task, resolve=True)
    assert isinstance(options, dict)
    limit = options.pop("limit")
    if "parts" in options:
        options["limits"] = {part: of_part.pop("limit") for part, of_part in options["parts"].items()}
    task = _instantiate(OmegaConf.create(options), "task")  # first: most tasks load without torch
    model = _instantiate(config.model, "model")
    panel, title = _panel(config, chosen, model, own)
    record = OmegaConf.to_container(config, resolve=True)
    assert isinstance(record, dict)
    for group in ("tracker", "launcher"):  # a run does not depend on them
        del record[group]
    if config.get("panel") is not None:
        del record["policy"]  # the group's default, which a panel doesn't use
    from mikv.run import Run

    return Run(
        model=model,
        panel=panel,
        task=task,
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


def refuse_secrets(config: DictConfig) -> None:
    """Before a configuration is written anywhere: those of a sweep and its jobs are, before anything is built.

    Raises:
        ConfigError: a secret is in it, on its own or by the environment variable that it names.
    """
    try:
        refuse_secret_options(OmegaConf.to_container(config))
        without_hydra = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
        refuse_secret_options(OmegaConf.to_container(without_hydra, resolve=True))
    except (ValueError, OmegaConfBaseException) as error:
        raise ConfigError(" ".join(str(error).split())) from error


def tracker(config: DictConfig) -> Tracker:
    """Where the run is mirrored to, when it has ended."""
    return _instantiate(config.tracker, "tracker")


def launcher(config: DictConfig) -> Any:
    """Where the jobs of a sweep run: one of mikv.sweep.launchers."""
    return _instantiate(config.launcher, "launcher")


def _panel(config: DictConfig, chosen: Sequence[str], model: ModelSpec, own: Path | None) -> tuple[tuple[Policy, ...], str]:
    """The policies to run, `full` first: everything is compared with it. And a name for them.

    An entry with `size` (a share of the 16-bit cache's bytes, or several) gets the largest `keep` that fits it; where none
    does, it is left out, with a note.
    """
    full = policy("full")
    if config.get("panel") is None:
        asked = [_instantiate(config.policy, "policy")]
        title = asked[0].name
    else:
        title = config.panel.name
        asked = []
        for name, options, size in _entries(config, chosen):
            if size is not None:
                keep = _fitting(name, options, size, model, own)
                if keep is None:
                    continue
                options["keep"] = keep
            asked.append(policy(name, options, own))
    rest = [p for p in asked if p != full]
    return (full, *rest), title


def _entries(config: DictConfig, chosen: Sequence[str]) -> list[tuple[str, dict[Any, Any], float | None]]:
    """Of a panel: each entry's policy, its options, and the size that it is to have; an entry with a list of sizes is many."""
    if "policy" in chosen:
        raise ConfigError("policy=... and panel=... exclude each other: a panel brings its own policies")
    if not config.panel.entries:
        raise ConfigError("panel.entries=[]: wanted at least one policy, such as panel.entries=[{policy: mikv}]")
    entries = []
    for number, entry in enumerate(config.panel.entries):
        options = OmegaConf.to_container(entry, resolve=True) if OmegaConf.is_config(entry) else entry
        if not isinstance(options, dict) or not isinstance(options.get("policy"), str):
            raise ConfigError(f"panel.entries[{number}]={options}: wanted {{policy: NAME, ...}} with a name of conf/policy")
        sizes = options.pop("size", None)
        name = options.pop("policy")
        for size in sizes if isinstance(sizes, list) else [sizes]:
            if sizes is not None:
                check_option("size", size, 0.2)
            entries.append((name, dict(options), size))
    return entries


def _fitting(name: str, options: dict[Any, Any], size: float, model: ModelSpec, own: Path | None) -> float | None:
    """The `keep` that makes a policy as large as wanted; None, with a note, where there is none."""
    from mikv.cache.fit import largest_share
    from mikv.models.load import load_geometry

    head_dim = load_geometry(model).head_dim
    try:
        keep = largest_share(lambda share: policy(name, {**options, "keep": share}, own), size, head_dim)
        why = "it is larger with any keep"
    except ConfigError:
        raise
    except ValueError as error:  # a group of channels that the head can't be cut into
        keep, why = None, str(error)
    if keep is None:
        print(f"note: {name} {options} is left out of {100 * size:g} % of the cache of {model.name}: {why}")
    return keep


def policy(name: str, overrides: dict[Any, Any] | None = None, own: Path | None = None) -> Policy:
    """A policy with parameters overridden: policy("mikv", {"keep": 0.1, "high.bits": 8}).

    own: the user's folder of configurations, beside conf/.
    """
    names = _choices("policy", own)
    if name not in names:
        raise ConfigError(f"there is no policy {name!r}{near(name, names)}; there are {', '.join(names)}")
    config = options_of_policy(name, own)
    OmegaConf.set_struct(config, True)
    for option, value in (overrides or {}).items():
        try:
            default = _plain(OmegaConf.select(config, str(option), throw_on_missing=True))
            OmegaConf.update(config, str(option), value)
        except OmegaConfBaseException as error:
            known = [str(key) for key in config if key != "_target_"]
            raise ConfigError(
                f"policy {name} has no option {option!r}{near(str(option), known)}; it has {', '.join(known)}"
            ) from error
        check_option(f"policy {name}: {option}", value, default)
    return _instantiate(config, f"policy {name}")


def options_of_policy(name: str, own: Path | None = None) -> DictConfig:
    """What a policy's YAML says, with the files of its folder that its `defaults` name: what Hydra composes, in no time."""
    files = [folder / "policy" / f"{name}.yaml" for folder in (CONF, own) if folder is not None]
    written = OmegaConf.load(next(file for file in files if file.is_file()))
    assert isinstance(written, DictConfig)
    mine = OmegaConf.masked_copy(written, [str(key) for key in written if key != "defaults"])
    made = [mine if other == "_self_" else options_of_policy(other, own) for other in written.get("defaults", ["_self_"])]
    merged = OmegaConf.merge(*made)
    assert isinstance(merged, DictConfig)
    return merged


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
