"""Run policies on a task.

python run.py                                              MiKV on line recall, with the embedded model
python run.py panel=demo                                   the paper's finding in one table
python run.py policy=mikv model=llama2-7b task=linerecall policy.keep=0.1 policy.high.bits=8
python run.py -m launcher=slurm model=llama2-7b,mistral-7b panel=paper       a sweep; conf/launcher says where it can run
python run.py --help                                       groups, options, defaults
"""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from mikv.cli import explained, quiet
from mikv.credentials import refuse_secret_arguments

quiet()


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(config: DictConfig) -> None:
    from mikv.config import build, refuse_secrets, tracker

    with explained():
        refuse_secrets(config)
    context = HydraConfig.get()
    chosen = [override.split("=")[0] for override in context.overrides.task]
    swept = context.mode == RunMode.MULTIRUN
    with _noted(config, context) if swept else nullcontext(lambda _: None) as note_folder, explained():
        if "launcher" in chosen and not swept:
            raise ValueError("launcher=... launches sweeps: add -m (one run is a sweep too)")
        run, mirror = build(config, chosen), tracker(config)
        if swept:
            note_folder(run.folder())
        from mikv.runner import execute  # after what needs no model has been checked

        execute(run)
        mirror.mirror(run.folder(), Path(context.sweep.dir).name.lstrip(".") if swept else None)


def _noted(config: DictConfig, context: Any) -> AbstractContextManager[Callable[[Path], None]]:
    """A job of a sweep notes what becomes of it."""
    from mikv.sweep.folder import SweepFolder
    from mikv.sweep.job import noted

    return noted(SweepFolder(Path(context.sweep.dir)), context.job.num, OmegaConf.to_yaml(config))


def check(arguments: list[str]) -> None:
    """Answer a slip at once, before torch is loaded; Hydra's own flags (--help, --cfg, --config-dir) are left to Hydra."""
    with explained():
        refuse_secret_arguments(arguments)
    overrides = [argument for argument in arguments if argument not in ("-m", "--multirun")]
    if not any(argument.startswith("-") for argument in overrides):
        from mikv.config import checked

        with explained():
            checked(overrides)


if __name__ == "__main__":
    check(sys.argv[1:])
    if any(argument.startswith("conf_dir=") for argument in sys.argv):
        from mikv.config import with_search_path

        sys.argv[1:] = with_search_path(sys.argv[1:])
    main()
