"""Run policies on a task.

python run.py                                              MiKV on line recall, with the embedded model
python run.py panel=demo                                   the paper's finding in one table
python run.py policy=mikv model=llama2-7b task=linerecall policy.keep=0.1 policy.high.bits=8
python run.py --help                                       groups, options, defaults
"""

import os
import sys
import warnings

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

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


if __name__ == "__main__":
    main()
