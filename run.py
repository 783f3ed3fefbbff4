"""Run policies on a task.

python run.py                                              MiKV on line recall, with the embedded model
python run.py panel=demo                                   the paper's finding in one table
python run.py policy=mikv model=llama2-7b task=linerecall policy.keep=0.1 policy.high.bits=8
python run.py --help                                       groups, options, defaults
"""

import os
import sys
import warnings
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

CONF = Path(__file__).parent.resolve() / "conf"
GROUPS = [folder.name for folder in CONF.iterdir() if folder.is_dir()]

# before transformers is imported: its progress bars and advice drown ours
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(config: DictConfig) -> None:
    from mikv.config import build
    from mikv.models.architecture import Unsupported
    from mikv.models.load import ModelUnavailable
    from mikv.records import RecordError
    from mikv.runner import RunError, execute

    try:
        execute(build(config, [override.split("=")[0] for override in HydraConfig.get().overrides.task]))
    except (ValueError, FileNotFoundError, ModelUnavailable, RecordError, RunError, Unsupported) as error:
        if os.environ.get("MIKV_DEBUG"):
            raise
        print(f"\nerror: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        raise SystemExit(130) from None


def suggest(arguments: list[str]) -> None:
    """Print the nearest names for groups, choices and options that don't exist; Hydra then says what does."""
    from difflib import get_close_matches

    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf

    overrides = [a.lstrip("+~") for a in arguments if "=" in a and not a.startswith("-")]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        pairs = [override.split("=", 1) for override in overrides]
        # of a sweep (policy=mikv,h2o) the first choice tells the options as well as any
        chosen = [
            f"{name}={value.split(',')[0]}" for name, value in pairs if name in GROUPS and _exists(name, value.split(",")[0])
        ]
        known = compose("config", chosen)
        for override in overrides:
            name, _, value = override.partition("=")
            if name in GROUPS:
                choices = [file.stem for file in (CONF / name).glob("*.yaml")]
                for near in get_close_matches(value, choices, 1) if not _exists(name, value) else ():
                    print(f"there is no {name} {value!r}: did you mean {name}={near}?", file=sys.stderr)
                continue
            parent, _, last = name.rpartition(".")
            try:
                options = list(OmegaConf.select(known, parent) or known) if parent else list(known)
            except (HydraException, TypeError):
                continue
            for near in get_close_matches(last, [str(o) for o in options], 1) if last not in options else ():
                print(f"there is no option {name}: did you mean {f'{parent}.' if parent else ''}{near}?", file=sys.stderr)


def _exists(group: str, choice: str) -> bool:
    return "," in choice or "(" in choice or choice == "null" or (CONF / group / f"{choice}.yaml").is_file()


if __name__ == "__main__":
    suggest(sys.argv[1:])
    main()
