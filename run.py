"""Run policies on a task.

python run.py                                              MiKV on line recall, with the embedded model
python run.py panel=demo                                   the paper's finding in one table
python run.py policy=mikv model=llama2-7b task=linerecall policy.keep=0.1 policy.high.bits=8
python run.py --help                                       groups, options, defaults
"""

import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from mikv.cli import explained, quiet

CONF = Path(__file__).parent.resolve() / "conf"
GROUPS = [folder.name for folder in CONF.iterdir() if folder.is_dir()]

quiet()


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(config: DictConfig) -> None:
    from mikv.config import build, tracker
    from mikv.runner import execute

    with explained():
        context = HydraConfig.get()
        run, mirror = build(config, [override.split("=")[0] for override in context.overrides.task]), tracker(config)
        execute(run)
        mirror.mirror(run.folder(), Path(context.sweep.dir).name.lstrip(".") if context.mode == RunMode.MULTIRUN else None)


def suggest(arguments: list[str]) -> None:
    """Print the nearest names for groups, choices and options that don't exist; Hydra then says what does."""
    from difflib import get_close_matches

    from hydra import compose, initialize_config_dir
    from omegaconf import DictConfig, OmegaConf

    given = [a.lstrip("+~").split("=", 1) for a in arguments if "=" in a and not a.startswith("-")]
    chosen = []
    for group, value in given:
        if group in GROUPS:
            choices = [file.stem for file in (CONF / group).glob("*.yaml")]
            first = value.split(",")[0]  # of a sweep (policy=mikv,h2o) the first choice tells the options as well as any
            if first in choices:
                chosen.append(f"{group}={first}")
            for near in get_close_matches(first, choices, 1) if first not in choices else ():
                print(f"there is no {group} {first!r}: did you mean {group}={near}?", file=sys.stderr)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        known = compose("config", chosen)
    for name, _ in given:
        parent, dot, last = name.rpartition(".")
        options = OmegaConf.select(known, parent) if parent else known
        # not `last not in options`: an option that must be set (???) is not "in" them
        if isinstance(options, DictConfig) and last not in map(str, options) and last not in GROUPS:
            for near in get_close_matches(last, map(str, options), 1):
                print(f"there is no option {name}: did you mean {parent}{dot}{near}?", file=sys.stderr)


if __name__ == "__main__":
    suggest(sys.argv[1:])
    main()
