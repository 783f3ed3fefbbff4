"""Run policies on a task.

python run.py                                              MiKV on line recall, with the embedded model
python run.py panel=demo                                   the paper's finding in one table
python run.py policy=mikv model=llama2-7b task=linerecall policy.keep=0.1 policy.high.bits=8
python run.py -m launcher=slurm model=llama2-7b,mistral-7b panel=paper       a sweep; conf/launcher says where it can run
python run.py --help                                       groups, options, defaults
"""

import sys
from contextlib import nullcontext
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from mikv.cli import explained, quiet

CONF = Path(__file__).parent.resolve() / "conf"
GROUPS = [folder.name for folder in CONF.iterdir() if folder.is_dir()]

quiet()


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(config: DictConfig) -> None:
    from mikv.config import build, tracker
    from mikv.runner import execute
    from mikv.sweep.folder import SweepFolder
    from mikv.sweep.job import noted

    context = HydraConfig.get()
    chosen = [override.split("=")[0] for override in context.overrides.task]
    swept = context.mode == RunMode.MULTIRUN
    job = noted(SweepFolder(Path(context.sweep.dir)), context.job.num, OmegaConf.to_yaml(config)) if swept else None
    with job or nullcontext(lambda _: None) as note_folder, explained():
        if "launcher" in chosen and not swept:
            raise ValueError("launcher=... launches sweeps: add -m (one run is a sweep too)")
        run, mirror = build(config, chosen), tracker(config)
        note_folder(run.folder())
        execute(run)
        mirror.mirror(run.folder(), Path(context.sweep.dir).name.lstrip(".") if swept else None)


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
