"""python -m mikv.sweep status FOLDER      what came out, what became of each job, and why
python -m mikv.sweep rerun FOLDER       launch what is not finished; launcher options may follow: launcher.timeout_min=600
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from mikv.sweep.folder import SweepError, SweepFolder
from mikv.sweep.overview import print_overview
from mikv.sweep.status import TO_DO, status

RUN = Path(__file__).parents[2] / "run.py"


def main() -> int:
    parser = argparse.ArgumentParser("python -m mikv.sweep", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=["status", "rerun"])
    parser.add_argument("folder", type=Path, help="as `python run.py -m` printed it")
    parser.add_argument("override", nargs="*", help="of a rerun: options of the launcher; what is run stays as it was")
    asked = parser.parse_args()
    try:
        sweep = SweepFolder(asked.folder)
        jobs = status(sweep)
        if asked.what == "status":
            print_overview(sweep, jobs)
            return 0
        if not any(job.state in TO_DO for job in jobs):
            print_overview(sweep, jobs)
            print("nothing to submit: all jobs are finished, at work or waiting")
            return 0
        changed = {_key(override) for override in (*asked.override, "hydra.sweep.dir")}
        as_before = [argument for argument in sweep.command() if _key(argument) not in changed]
        command = [sys.executable, str(RUN), *as_before, *asked.override, f"hydra.sweep.dir={_quoted(asked.folder)}"]
        os.execv(sys.executable, command)  # no process in between that a signal could end alone
    except (SweepError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _key(override: str) -> str:
    return override.lstrip("+~").partition("=")[0]


def _quoted(path: Path) -> str:
    """For Hydra's grammar: a blank, a comma or an equals sign would mean something."""
    return "'" + str(path).replace("'", "\\'") + "'"


if __name__ == "__main__":
    raise SystemExit(main())
