"""Weights & Biases, as a mirror of the records: what a run left in its folder is read and logged, never the other way round.

One run of a panel is one run there, the runs of a sweep are one group. It holds the curve (each measure against the counted
size, a line per policy), a table with a row per policy, a table of the samples with their outcomes, the configuration, bytes by
part and timings.

wandb works in a process of its own, without a keyboard and within a time limit: it can neither ask, nor stop, nor fail the run.
It is told nothing of this machine: no host name, no paths, no environment. Whatever looks like a key is left out.

    python -m mikv.tracking RUN... [--mode online|offline]        mirror runs that have ended
"""

from __future__ import annotations

import argparse
import json
import netrc
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

import yaml

from mikv.credentials import names_secret, secret_values
from mikv.fingerprint import content_fingerprint
from mikv.records import RecordError
from mikv.results import Results, ResultsError, measures, read_results

MOST_SAMPLES = 10_000
"""Rows of the table of samples; W&B's tables are not made for more. All are in samples.jsonl."""


@dataclass(frozen=True)
class Tracker:
    """Where runs are mirrored to.

    Args:
        mode: none; online; offline (into the run's folder, for `wandb sync`); auto = online where a key is configured
            (`wandb login`, WANDB_API_KEY), else offline; WANDB_MODE decides where it is set.
        project, entity: of W&B; entity null = the key's default.
        group: of the run; null = the sweep, where there is one.
        timeout_s: seconds that W&B may take. What it did not send then is kept for `wandb sync`.
    """

    MODES: ClassVar[tuple[str, ...]] = ("none", "auto", "online", "offline")

    mode: str = "auto"
    project: str = "mikv"
    entity: str | None = None
    group: str | None = None
    timeout_s: int = 120

    def __post_init__(self) -> None:
        if self.mode not in self.MODES:
            raise ValueError(f"tracker.mode={self.mode}: one of {', '.join(self.MODES)}")
        if self.timeout_s < 1:
            raise ValueError(f"tracker.timeout_s={self.timeout_s}: at least 1")

    def mirror(self, folder: Path, sweep: str | None = None) -> bool:
        """Mirror the run in this folder, once, and print where it is. True unless W&B did not take it; raises nothing."""
        mode = self._resolved()
        if mode == "none":
            return True
        try:
            mark = folder / "wandb" / f"mirrored-{mode}-{content_fingerprint(folder / 'summary.jsonl')}"
            if mark.exists():
                print(f"W&B      mirrored already: {mark.read_text(encoding='utf-8')}")
                return True
            options = replace(self, mode=mode, group=self.group or sweep)
            place, problem = options._push_apart(folder)
            if problem and mode == "online":
                print(f"note: W&B is not reached ({problem})")
                place, problem = replace(options, mode="offline")._push_apart(folder)
            elif not problem:
                mark.parent.mkdir(exist_ok=True)
                mark.write_text(place, encoding="utf-8")
        except Exception as error:  # whatever it is, the run is done and its records are whole
            place, problem = "", f"{type(error).__name__}: {without_secrets(str(error))}"
        if problem:
            print(f"note: W&B did not take the run ({problem}). Its records are as they were.")
            print(f"      Once more: python -m mikv.tracking {folder}")
            return False
        print(f"W&B      {place}")
        return True

    def _resolved(self) -> str:
        if self.mode != "auto":
            return self.mode
        wanted = os.environ.get("WANDB_MODE", "")
        if wanted:
            return {"online": "online", "offline": "offline", "dryrun": "offline"}.get(wanted, "none")
        return "online" if has_key() else "offline"

    def _push_apart(self, folder: Path) -> tuple[str, str]:
        """Let a process of its own do it. Returns where the run is, and what went wrong (one of both is empty)."""
        command = [sys.executable, "-m", "mikv.tracking", str(folder), "--options", json.dumps(asdict(self))]
        here = Path(__file__).parents[1]
        paths = os.pathsep.join([str(here), *filter(None, [os.environ.get("PYTHONPATH")])])
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=self.timeout_s,
                env=os.environ | {"PYTHONPATH": paths},
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return "", f"it took longer than tracker.timeout_s={self.timeout_s}"
        said = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines() or [f"status {done.returncode}"]
        return (said[-1], "") if done.returncode == 0 else ("", without_secrets(said[-1]))


def has_key() -> bool:
    """Whether wandb would find a key, in its environment variables or in the file that `wandb login` writes."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    file = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    try:
        return host in netrc.netrc(file).hosts
    except (OSError, netrc.NetrcParseError):
        return False


def without_secrets(text: str) -> str:
    """The text without the values of environment variables that are named like secrets."""
    for value in secret_values():
        text = text.replace(value, "***")
    return text


def without_secret_options(options: Any) -> Any:
    """A configuration without the values of options that are named like secrets (`hub_token`, not `max_new_tokens`)."""
    if isinstance(options, Mapping):
        return {
            name: "***" if value and names_secret(str(name)) and isinstance(value, str) else without_secret_options(value)
            for name, value in options.items()
        }
    if isinstance(options, list):
        return [without_secret_options(value) for value in options]
    return without_secrets(options) if isinstance(options, str) else options


def push(folder: Path, options: Tracker) -> str:
    """Log the run with wandb, in this process. Returns where it is.

    Raises:
        ResultsError, RecordError: there is nothing to log. Exception: whatever wandb raises.
    """
    import wandb

    results = read_results(folder)
    first = results.summary[0]
    settings = wandb.Settings(
        silent=True, console="off", disable_git=True, disable_code=True, save_code=False, disable_job_creation=True,
        x_disable_meta=True, x_disable_stats=True, x_disable_machine_info=True, x_save_requirements=False,
        host="", email="", program="", init_timeout=options.timeout_s / 2, finish_timeout=options.timeout_s / 2,
        finish_timeout_raises=True,
    )  # fmt: skip
    (folder / "wandb").mkdir(exist_ok=True)
    run = wandb.init(
        project=options.project,
        entity=options.entity,
        group=options.group,
        name=results.name,
        tags=[str(first["model"]), str(first["task"])],
        mode="offline" if options.mode == "offline" else "online",
        dir=str(folder),
        config=without_secret_options({**(yaml.safe_load(results.config) or {}), "about": results.about}),
        settings=settings,
    )
    place = run.url or ""
    if options.mode == "offline":
        place = f"offline; send it with: wandb sync {Path(run.dir).parent}"
    try:
        _log(run, results)
    finally:
        run.finish()
    return place


def _log(run: Any, results: Results) -> None:
    run.define_metric("size_percent")
    points = [(row, measures(row)) for row in results.summary]
    for name in dict.fromkeys(name for _, found in points for name in found):
        run.define_metric(f"{_key(name)}/*", step_metric="size_percent")
    for row, found in sorted(points, key=lambda point: point[0]["size_percent"]):
        values = {f"{_key(name)}/{_key(row['policy'])}": of["value"] for name, of in found.items()}
        run.log({"size_percent": row["size_percent"], **values})
    for name in [name for name in dict.fromkeys((next(iter(points[0][1])), "kl")) if name in points[0][1]]:
        run.log({f"curve/{_key(name)}": _chart(name, points)})
    run.log({"points": _table([dict(point_row(row)) for row in results.summary])})
    run.log({"samples": _table([dict(_sample(row)) for row in results.samples[:MOST_SAMPLES]])})
    run.summary.update(
        {
            "policies": {row["label"]: dict(point_row(row)) for row in results.summary},
            "seconds": results.summary[0].get("seconds", {}),
            "samples_left_out": max(0, len(results.samples) - MOST_SAMPLES),
        }
    )


def _key(name: str) -> str:
    """A name that W&B can draw: letters, digits and underscores."""
    return re.sub(r"\W+", "_", name).strip("_")


def _chart(name: str, points: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> Any:
    """A measure against size, a line per policy."""
    import wandb

    lines: dict[str, list[tuple[float, float]]] = {}
    for row, found in points:
        lines.setdefault(row["policy"], []).append((row["size_percent"], found[name]["value"]))
    xs: list[Iterable[Any]] = [[size for size, _ in sorted(line)] for line in lines.values()]
    ys: list[Iterable[Any]] = [[value for _, value in sorted(line)] for line in lines.values()]
    return wandb.plot.line_series(xs=xs, ys=ys, keys=list(lines), title=f"{name} against cache size", xname="size, %")


def point_row(row: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Columns of a policy's row: every measure with its interval and its paired change, size, bytes by part, counts."""
    yield from ((name, row[name]) for name in ("policy", "label", "model", "task", "question", "metric"))
    for name, of in measures(row).items():
        for field, value in of.items():
            if field.endswith("ci95"):
                low, high = value or (None, None)
                yield from ((f"{name}.{field}_low", low), (f"{name}.{field}_high", high))
            elif field != "lower_is_better":
                yield f"{name}.{field}", value
    for name in ("samples", "size_percent", "size_percent_paper", "full_nbytes", "kept_percent", "exercised", "cut", "unended"):
        if name in row:
            yield name, row[name]
    yield from ((f"nbytes.{part}", size) for part, size in row.get("nbytes", {}).items())


def _sample(row: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Columns of a sample: what is a plain value in its record, and its bytes and seconds by part."""
    for name, value in row.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}.{part}", of) for part, of in value.items() if not isinstance(of, Mapping | list))
        elif not isinstance(value, list):
            yield name, value


def _table(rows: Sequence[Mapping[str, Any]]) -> Any:
    import wandb

    columns: list[str | int] = list(dict.fromkeys(name for row in rows for name in row))
    data: list[Iterable[Any]] = [[row.get(str(name)) for name in columns] for row in rows]
    return wandb.Table(columns=columns, data=data, allow_mixed_types=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mikv.tracking", description="Mirror runs that have ended into W&B.")
    parser.add_argument("run", nargs="+", type=Path, help="folder of a run, such as results/runs/NAME")
    parser.add_argument("--mode", choices=Tracker.MODES[1:], default="auto")
    parser.add_argument("--options", help=argparse.SUPPRESS)  # how a run calls this
    given = parser.parse_args(arguments)
    if given.options is None:
        taken = [Tracker(given.mode).mirror(folder) for folder in given.run]
        return 0 if all(taken) else 1
    try:
        print(push(given.run[0], Tracker(**json.loads(given.options))))
    except (ResultsError, RecordError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
