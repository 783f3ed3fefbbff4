"""Run a panel of policies on a task: units of work -> batches -> engine -> records -> summary, table and plot."""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mikv.batches import Request, Response, serve
from mikv.cache.reading import Reading, decide
from mikv.engine import Engine
from mikv.fingerprint import fingerprint
from mikv.metrics.combine import combine
from mikv.metrics.summary import summarize
from mikv.models.architecture import geometry
from mikv.models.load import Loaded, ModelSpec, load, load_geometry
from mikv.plots import save_curve, save_depth_maps
from mikv.policy import Policy, check_choice
from mikv.records import Row, RunFolder
from mikv.stopping import Stopping
from mikv.table import print_table
from mikv.tasks.base import Task
from mikv.tasks.prompting import QUESTION
from mikv.work.base import Encoded, Openable, Unit, Work, task_identity
from mikv.work.suite import SuiteWork, open_task


class RunError(RuntimeError):
    """The run can't be done or its outcome means nothing; the message says why. Records already made are kept."""


@dataclass(frozen=True)
class Run:
    """Everything a run needs, checked.

    Args:
        model: which model.
        panel: policies, `full` first; labels are unique.
        task: what is asked.
        limit: number of samples (of each subtask); None = all that there are.
        question: visible or hidden, see mikv.engine.
        batch_size: prompts at a time; each brings a row per policy. Changes speed and memory, not answers.
        seed: of the samples.
        reader, attention: how the compressed cache is read, see mikv.cache.reading; None = as it suits the device.
        fidelity: feed the full twin's own answers through each policy's cache (scored continuations always are).
        name: folder name; None = made from model, task, panel and the hash of what is asked.
        out: folder of all runs.
        title: name of the panel or policy, for the folder's name.
        config: resolved configuration as YAML, for the record.
    """

    model: ModelSpec
    panel: tuple[Policy, ...]
    task: Task | Openable
    limit: int | None
    question: str = "visible"
    batch_size: int = 4
    seed: int = 0
    reader: str | None = None
    attention: str | None = None
    fidelity: bool = True
    name: str | None = None
    out: Path = Path("results/runs")
    title: str = "panel"
    config: str = ""

    def __post_init__(self) -> None:
        check_choice("protocol.question", self.question, QUESTION)
        _ = self.reading
        for name, value in (("task.limit", self.limit), ("batch_size", self.batch_size)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: at least 1")
        labels = [policy.label for policy in self.panel]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            raise ValueError(f"the panel has {', '.join(twice)} more than once; each row must differ in something")

    @cached_property
    def reading(self) -> Reading:
        """How caches will be read, known before the weights are: it is a part of the identity."""
        device, dtype = self.model.resolve_device(), self.model.resolve_dtype()
        return decide(self.reader, self.attention, device, dtype, lambda: load_geometry(self.model).head_dim)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What changes an outcome, besides policy and sample. Not: limit, batch size, paths, nor a reader that does the same.

        Computed once: weights in a local folder are read for their fingerprint.
        """
        return {
            "model": {
                "name": self.model.name,
                "weights": self.model.describe(),
                "dtype": str(self.model.resolve_dtype()).removeprefix("torch."),
            },
            "task": task_identity(self.task),
            "protocol": {"question": self.question, "fidelity": self.fidelity, **self.reading.protocol},
            "seed": self.seed,
        }

    def key(self, policy: Policy, unit: Unit) -> str:
        """Key of one policy's answer to one unit."""
        which = {name: value for name, value in dataclasses.asdict(unit).items() if value is not None}
        return fingerprint({**self.identity, "policy": policy_identity(policy), **which})

    def open(self) -> Work:
        """Find the task's data and make its units."""
        return open_task(self.task, self.model, self.limit, self.seed, self.question)

    def folder(self) -> Path:
        if self.name is not None:
            return self.out / self.name
        scope = {"limit": self.limit, **(self.task.scope() if isinstance(self.task, Openable) else {})}
        asked = {**self.identity, **scope, "panel": [policy_identity(p) for p in self.panel]}
        return self.out / f"{self.model.name}-{self.task.name}-{self.title}-{fingerprint(asked)[:8]}"


def policy_identity(policy: Policy) -> dict[str, Any]:
    """What of a policy changes an outcome (its name and label do not)."""
    return {
        "tiers": [[tier.k, tier.v, tier.group] for tier in policy.tiers],
        "shares": list(policy.shares),
        "importance": repr(policy.importance),
        "recent": policy.recent,
        "sinks": policy.sinks,
        "budget": policy.budget,
        "balance": policy.balance,
        "positions": policy.positions,
    }


def execute(run: Run) -> list[Row]:
    """Do what is not done yet, then summarize. Returns the summary rows.

    Raises:
        RunError, ModelUnavailable, RecordError, ValueError: before long work starts where that is possible.
        Stopped: by a signal, after a batch.
    """
    work = run.open()
    units = work.units()
    if not units:
        raise RunError(f"the task {run.task.name} has no samples")
    with Stopping() as stopping, RunFolder(run.folder(), run.identity, run.config) as records:
        done = records.samples()
        todo = _missing(run, units, done)
        left = sum(map(len, todo.values()))
        if not todo:
            print(f"{records.path}: all {len(units)} samples are done already")
        elif left < len(units):
            print(f"{records.path}: going on, {len(units) - left} of {len(units)} samples are done")
        if todo:
            _answer(run, work, todo, records, done, stopping)
        summary = _summarize(run, work, units, done)
        file = records.write_summary(summary)
    print_table(summary)
    plot = save_curve(file.with_name("curve.png"), summary)
    _draw_depths(run, units, done, file.with_name("depth.png"))
    print(f"plot     {plot}\nrecords  {file.with_name('samples.jsonl')}\nsummary  {file}")
    _report(run, summary)
    return summary


def _missing(run: Run, units: Sequence[Unit], done: dict[str, Row]) -> dict[tuple[Policy, ...], list[Unit]]:
    """Units that are not done, by the policies that they lack: usually all of the panel."""
    missing: dict[tuple[Policy, ...], list[Unit]] = {}
    for unit in units:
        lacks = tuple(policy for policy in run.panel if run.key(policy, unit) not in done)
        if lacks:
            missing.setdefault(lacks, []).append(unit)
    return missing


def _answer(
    run: Run,
    work: Work,
    todo: dict[tuple[Policy, ...], list[Unit]],
    records: RunFolder,
    done: dict[str, Row],
    stopping: Stopping,
) -> None:
    """Compute what is missing, batch by batch; `done` grows as the records do."""
    from tqdm import tqdm

    head_dim = load_geometry(run.model).head_dim
    for tier in (tier for policy in run.panel for tier in policy.tiers):
        tier.group_size(head_dim)  # refuses groups that a head can't be cut into, before the weights are read
    loaded = load(run.model)
    engine = Engine(loaded.model, loaded.end_tokens, loaded.tokenizer.pad_token_id or 0, run.reader, run.attention)
    engine.verify_kernels(run.panel)
    encoded = _encode(run, work, [unit for units in todo.values() for unit in units], loaded)
    stopping.heed()  # loading takes minutes
    pace = 0.1 if sys.stderr.isatty() else 30  # seconds: a log keeps every state of the bar
    with tqdm(total=len(encoded), desc=f"{run.model.name} {run.task.name}", unit="sample", mininterval=pace) as progress:
        for lacking, units in todo.items():
            # the twin comes first, whether its own records are there or not: fidelity is measured against it
            panel = [run.panel[0], *(policy for policy in lacking if policy != run.panel[0])]
            for unit, responses, seconds in _serve(run, engine, units, encoded, panel, stopping):
                rows = [
                    _row(run, policy, unit, loaded, encoded[unit], mine) | outcome | {"seconds": seconds}
                    for policy, mine, outcome in zip(panel, responses, work.outcomes(unit, responses), strict=True)
                    if policy in lacking
                ]
                records.append(rows)
                done.update((row["key"], row) for row in rows)
                progress.update()


def _encode(run: Run, work: Work, units: Sequence[Unit], loaded: Loaded) -> dict[Unit, Encoded]:
    """All requests, before the first one is served: what does not fit the model is said at once."""
    from tqdm import tqdm

    encoded: dict[Unit, Encoded] = {}
    refused: list[ValueError] = []
    for unit in tqdm(units, desc="tokens", unit="sample", leave=False, delay=2):
        try:
            encoded[unit] = work.encode(unit, loaded)
        except ValueError as error:
            refused.append(error)
    if refused:
        raise RunError(f"{len(refused)} of {len(units)} samples can't be asked of {run.model.name}: {refused[0]}")
    return encoded


def _serve(
    run: Run,
    engine: Engine,
    units: Sequence[Unit],
    encoded: dict[Unit, Encoded],
    panel: Sequence[Policy],
    stopping: Stopping,
) -> Iterator[tuple[Unit, list[list[Response]], dict[str, float]]]:
    """Units as they get done: their responses by policy and request, and their share of the time. Between two batches, when
    the caller has recorded all units of the first, signals are heeded."""
    requests: list[Request] = []
    owner: list[Unit] = []
    first: dict[Unit, int] = {}
    for unit in units:
        first[unit] = len(requests)
        requests += encoded[unit].requests
        owner += [unit] * len(encoded[unit].requests)
    responses: dict[Unit, dict[int, list[Response]]] = {unit: {} for unit in units}
    seconds: dict[Unit, Counter[str]] = {unit: Counter() for unit in units}
    for served in serve(engine, requests, panel, run.batch_size, run.fidelity):
        for index, by_policy in served.responses.items():
            unit = owner[index]
            responses[unit][index - first[unit]] = by_policy
            for phase, spent in dataclasses.asdict(served.seconds).items():
                seconds[unit][phase] += spent / len(served.responses)
            if len(responses[unit]) == len(encoded[unit].requests):
                mine = responses.pop(unit)
                yield unit, [[mine[i][p] for i in range(len(mine))] for p in range(len(panel))], dict(seconds.pop(unit))
        stopping.heed()


def _row(run: Run, policy: Policy, unit: Unit, loaded: Loaded, encoded: Encoded, responses: Sequence[Response]) -> Row:
    """What every record has. Of a unit with several prompts (windows of a document), bytes and tokens in
    the cache are sums, prompt_tokens is the longest one's."""
    nbytes: Counter[str] = Counter()
    for response in responses:
        nbytes.update(response.usage.nbytes)
    return {
        "key": run.key(policy, unit),
        "policy": policy.name,
        "label": policy.label,
        "model": run.model.name,
        "task": run.task.name,
        "question": run.question,
        "sample": unit.name,
        "subtask": unit.subtask,
        "doc_id": unit.doc_id,
        "prompt_tokens": max(request.prompt.tokens for request in encoded.requests),
        "cut_tokens": encoded.cut_tokens,
        "compressed_tokens": sum(response.compressed_tokens for response in responses),
        "kept_tokens": sum(response.usage.kept_tokens for response in responses),
        "seen_tokens": sum(response.usage.seen_tokens for response in responses),
        "nbytes": dict(nbytes),
        "full_nbytes": sum(response.usage.full_nbytes for response in responses),
        "head_dim": geometry(loaded.model.config).head_dim,
        "reader": run.reading.reader,
    }


def _summarize(run: Run, work: Work, units: Sequence[Unit], done: dict[str, Row]) -> list[Row]:
    rows = {policy: _rows(run, policy, units, done) for policy in run.panel}
    twins = {row["sample"]: row for row in rows[run.panel[0]]}
    summary = []
    for policy in run.panel:
        scores = work.summarize(rows[policy])
        summary.append(
            {
                "policy": policy.name,
                "label": policy.label,
                "model": run.model.name,
                "task": run.task.name,
                "question": run.question,
                "metric": work.metric,
                "lower_is_better": work.lower_is_better,
                **summarize(rows[policy], twins, work.flags, scores.value, work.kind, work.lower_is_better),
                **_parts(work, rows[policy], twins),
                "scores": dict(scores.scores),
                "by_task": {name: dict(of_task) for name, of_task in scores.by_task.items()},
                "size_percent_paper": policy.paper_size(rows[policy][0]["head_dim"]),
            }
        )
    return summary


def _parts(work: Work, rows: Sequence[Row], twins: dict[str, Row]) -> Row:
    """Of a suite: the mean of its risks with its error, and each part's own summary."""
    if not isinstance(work, SuiteWork):
        return {}
    parts: dict[str, Row] = {}
    whole = {part: {row["sample"]: row for row in work.rows_of(part, list(twins.values()))} for part in work.parts}
    own = {name: work.rows_of(name, rows) for name in work.parts}
    for name, part in work.parts.items():
        scores = part.summarize(own[name])
        flags = tuple(dict.fromkeys((*part.flags, *work.risks[name])))
        parts[name] = {
            "metric": part.metric,
            "lower_is_better": part.lower_is_better,
            **summarize(own[name], whole[name], flags, scores.value, part.kind, part.lower_is_better),
            "scores": dict(scores.scores),
        }
    return {**combine(own, whole, parts, work.risks), "risks": dict(work.risks), "parts": parts}


def _draw_depths(run: Run, units: Sequence[Unit], done: dict[str, Row], file: Path) -> None:
    """A map of depth x lines for each policy, where samples have both."""
    placed = {p.label: [row for row in _rows(run, p, units, done) if "lines" in row and "depth" in row] for p in run.panel}
    samples = placed[run.panel[0].label]
    if len({row["lines"] for row in samples}) > 1:
        save_depth_maps(file, placed, f"{run.model.name} on {run.task.name}, n = {len(samples)}")
        print(f"map      {file}")


def _rows(run: Run, policy: Policy, units: Sequence[Unit], done: dict[str, Row]) -> list[Row]:
    return [done[run.key(policy, unit)] for unit in units]


def _report(run: Run, summary: Sequence[Row]) -> None:
    """Say what a reader of the numbers must know. A policy that never compressed anything was not evaluated, whatever its
    accuracy: that fails the run."""
    if summary[0]["cut"]:
        cut, samples, tokens = summary[0]["cut"], summary[0]["samples"], summary[0]["cut_tokens"]
        print(f"note: {cut} of {samples} prompts did not fit the model and lost {tokens} tokens on the left")
    unended = [f"{policy.label} {row['unended']}" for policy, row in zip(run.panel, summary, strict=True) if row["unended"]]
    if unended:
        print(f"note: of {summary[0]['samples']} answers each, so many ran into the limit of new tokens: {', '.join(unended)}")
    for policy, row in zip(run.panel, summary, strict=True):
        if policy.lossless or row["exercised"] == row["samples"]:
            continue
        if row["exercised"] == 0:
            raise RunError(
                f"{policy.label} was never exercised: no context was long enough for it to compress a token, so its "
                "numbers are those of the full cache. Use longer prompts or a smaller budget."
            )
        print(f"note: {policy.label} compressed something in {row['exercised']} of {row['samples']} samples only")
