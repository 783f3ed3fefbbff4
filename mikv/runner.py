"""Run a panel of policies on a task: samples -> batches -> engine -> records -> summary, table and plot."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from mikv.decoding import Decoding
from mikv.engine import READERS, Engine, Generation, Prompt
from mikv.fingerprint import content_fingerprint, fingerprint
from mikv.metrics.summary import summarize
from mikv.models.architecture import geometry
from mikv.models.load import Loaded, ModelSpec, load
from mikv.plots import save_curve
from mikv.policy import Policy, check_choice
from mikv.records import Row, RunFolder
from mikv.table import print_table
from mikv.tasks.base import Sample, Task
from mikv.tasks.prompting import QUESTION, encode

# What a machine that has run out of memory says, by device. Torch has an exception of its own for GPUs only.
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


class RunError(RuntimeError):
    """The run can't be done or its outcome means nothing; the message says why. Records already made are kept."""


@dataclass(frozen=True)
class Run:
    """Everything a run needs, checked.

    Args:
        model: which model.
        panel: policies, `full` first; labels are unique.
        task: what is asked.
        limit: number of samples.
        question: visible or hidden, see mikv.engine.
        batch_size: prompts at a time; each brings a row per policy. Changes speed and memory, not answers.
        seed: of the samples.
        reader: how the compressed cache is read, see mikv.cache.compressed.
        name: folder name; None = made from model, task, panel and the hash of what is asked.
        out: folder of all runs.
        title: name of the panel or policy, for the folder's name.
        config: resolved configuration as YAML, for the record.
    """

    model: ModelSpec
    panel: tuple[Policy, ...]
    task: Task
    limit: int
    question: str = "visible"
    batch_size: int = 4
    seed: int = 0
    reader: str = "working"
    name: str | None = None
    out: Path = Path("results/runs")
    title: str = "panel"
    config: str = ""

    def __post_init__(self) -> None:
        check_choice("protocol.question", self.question, QUESTION)
        check_choice("reader", self.reader, READERS)
        for name, value in (("task.limit", self.limit), ("batch_size", self.batch_size)):
            if value < 1:
                raise ValueError(f"{name}={value}: at least 1")
        labels = [policy.label for policy in self.panel]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            raise ValueError(f"the panel has {', '.join(twice)} more than once; each row must differ in something")

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What changes an outcome, besides policy and sample. Not: limit, batch size, reader, paths.

        Computed once: weights in a local folder are read for their fingerprint.
        """
        return {
            "model": {
                "name": self.model.name,
                "weights": self.model.describe(),
                "dtype": str(self.model.resolve_dtype()).removeprefix("torch."),
            },
            "task": task_identity(self.task),
            "protocol": {"question": self.question},
            "seed": self.seed,
        }

    def key(self, policy: Policy, doc_id: int) -> str:
        """Key of one policy's answer to one sample."""
        return fingerprint({**self.identity, "policy": policy_identity(policy), "doc_id": doc_id})

    def folder(self) -> Path:
        if self.name is not None:
            return self.out / self.name
        asked = {**self.identity, "limit": self.limit, "panel": [policy_identity(p) for p in self.panel]}
        return self.out / f"{self.model.name}-{self.task.name}-{self.title}-{fingerprint(asked)[:8]}"


def task_identity(task: Task) -> dict[str, Any]:
    """Name, version and parameters. A file is what it holds, not where it lies."""
    parameters = dataclasses.asdict(task)  # type: ignore[call-overload]
    for name, value in parameters.items():
        if isinstance(value, str) and Path(value).is_file():
            parameters[name] = content_fingerprint(Path(value))
    return {"name": task.name, "version": task.version, **parameters}


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
    """
    samples = run.task.samples(run.limit, run.seed)
    if not samples:
        raise RunError(f"the task {run.task.name} has no samples")
    with RunFolder(run.folder(), run.identity, run.config) as records:
        done = records.samples()
        todo = [(sample, missing) for sample in samples if (missing := _missing(run, sample, done))]
        if not todo:
            print(f"{records.path}: all {len(samples)} samples are done already")
        elif len(todo) < len(samples):
            print(f"{records.path}: going on, {len(samples) - len(todo)} of {len(samples)} samples are done")
        if todo:
            _answer(run, todo, records, done)
        summary = _summarize(run, samples, done)
        file = records.write_summary(summary)
    print_table(summary, run.task.flags)
    plot = save_curve(file.with_name("curve.png"), summary)
    print(f"plot     {plot}\nrecords  {file.with_name('samples.jsonl')}\nsummary  {file}")
    _check_exercised(run, summary)
    return summary


def _missing(run: Run, sample: Sample, done: dict[str, Row]) -> list[Policy]:
    return [policy for policy in run.panel if run.key(policy, sample.doc_id) not in done]


def _answer(run: Run, todo: Sequence[tuple[Sample, list[Policy]]], records: RunFolder, done: dict[str, Row]) -> None:
    """Compute what is missing, batch by batch; `done` grows as the records do."""
    from tqdm import tqdm

    loaded = load(run.model)
    prompts = {sample.doc_id: Prompt(*encode(loaded.tokenizer, sample, run.question)) for sample, _ in todo}
    _check_lengths(run, loaded, list(prompts.values()))
    engine = Engine(loaded.model, loaded.end_tokens, loaded.tokenizer.pad_token_id or 0, run.reader)
    with tqdm(total=len(todo), desc=f"{run.model.name} {run.task.name}", unit="sample") as progress:
        for batch in _batches(todo, run.batch_size):
            # policies that some sample of the batch lacks: after an interruption usually all of them
            panel = [p for p in run.panel if any(p in missing for _, missing in batch)]
            for answered, answers in _generate(engine, batch, prompts, panel, run.task.max_new_tokens):
                shared = {phase: spent / len(answered) for phase, spent in dataclasses.asdict(engine.take_seconds()).items()}
                rows = [
                    _row(run, policy, sample, loaded, prompts[sample.doc_id], answer) | {"seconds": shared}
                    for policy, per_sample in zip(panel, answers, strict=True)
                    for (sample, missing), answer in zip(answered, per_sample, strict=True)
                    if policy in missing
                ]
                records.append(rows)
                done.update((row["key"], row) for row in rows)
                progress.update(len(answered))


Batch = Sequence[tuple[Sample, list[Policy]]]


def _batches(todo: Batch, size: int) -> Iterator[Batch]:
    for start in range(0, len(todo), size):
        yield todo[start : start + size]


def _generate(
    engine: Engine, batch: Batch, prompts: dict[int, Prompt], panel: Sequence[Policy], max_new_tokens: int
) -> Iterator[tuple[Batch, list[list[Generation]]]]:
    """Answers of a batch; if memory runs out, of its halves, and so on down to single samples."""
    try:
        answers = engine.generate([prompts[sample.doc_id] for sample, _ in batch], panel, Decoding(max_new_tokens))
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        if len(batch) == 1:
            raise RunError(
                f"out of memory with a single sample of {prompts[batch[0][0].doc_id].tokens} tokens and {len(panel)} "
                "policies. Finished samples are kept. Ways out: a smaller panel, reader=packed (no dense working copy), "
                "shorter prompts, a larger machine."
            ) from error
        answers = None
    if answers is not None:
        yield batch, answers
        return
    gc.collect()  # the failed attempt's tensors hang on the traceback until here
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    print(f"out of memory with {len(batch)} samples at a time; trying {(len(batch) + 1) // 2}")
    for half in _batches(batch, (len(batch) + 1) // 2):
        yield from _generate(engine, half, prompts, panel, max_new_tokens)


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return any(sign in str(error).lower() for sign in _OUT_OF_MEMORY)


def _check_lengths(run: Run, loaded: Loaded, prompts: Sequence[Prompt]) -> None:
    too_long = [p.tokens for p in prompts if p.tokens + run.task.max_new_tokens > loaded.max_tokens]
    if too_long:
        raise RunError(
            f"{len(too_long)} of {len(prompts)} prompts do not fit {run.model.name}: the longest has {max(too_long)} "
            f"tokens, plus {run.task.max_new_tokens} for the answer, and the limit is {loaded.max_tokens}. Choose shorter "
            "prompts (task.lines=...) or a model with a longer context; cutting a prompt would remove what is asked for."
        )


def _row(run: Run, policy: Policy, sample: Sample, loaded: Loaded, prompt: Prompt, generation: Generation) -> Row:
    answer = loaded.tokenizer.decode(generation.tokens, skip_special_tokens=True).strip()
    head_dim = geometry(loaded.model.config).head_dim
    return {
        "key": run.key(policy, sample.doc_id),
        "policy": policy.name,
        "label": policy.label,
        "model": run.model.name,
        "task": run.task.name,
        "question": run.question,
        "doc_id": sample.doc_id,
        "answer": answer,
        "target": sample.target,
        **run.task.score(sample, answer),
        "prompt_tokens": prompt.tokens,
        "answer_tokens": len(generation.tokens),
        "ended": generation.ended,
        "compressed_tokens": generation.compressed_tokens,
        "kept_tokens": generation.usage.kept_tokens,
        "seen_tokens": generation.usage.seen_tokens,
        "nbytes": generation.usage.nbytes,
        "full_nbytes": generation.usage.full_nbytes,
        "head_dim": head_dim,
        "reader": run.reader,
    }


def _summarize(run: Run, samples: Sequence[Sample], done: dict[str, Row]) -> list[Row]:
    rows = {policy: [done[run.key(policy, sample.doc_id)] for sample in samples] for policy in run.panel}
    full = next((rows[policy] for policy in run.panel if policy.name == "full"), None)
    twins = None if full is None else {row["doc_id"]: row for row in full}
    summary = []
    for policy in run.panel:
        summary.append(
            {
                "policy": policy.name,
                "label": policy.label,
                "model": run.model.name,
                "task": run.task.name,
                "question": run.question,
                "metric": run.task.metric,
                **summarize(rows[policy], twins, run.task.flags),
                "size_percent_paper": policy.paper_size(rows[policy][0]["head_dim"]),
            }
        )
    return summary


def _check_exercised(run: Run, summary: Sequence[Row]) -> None:
    """A policy that never compressed anything was not evaluated, whatever its accuracy."""
    for policy, row in zip(run.panel, summary, strict=True):
        if policy.lossless or row["exercised"] == row["n"]:
            continue
        if row["exercised"] == 0:
            raise RunError(
                f"{policy.label} was never exercised: no context was long enough for it to compress a token, so its "
                "numbers are those of the full cache. Use longer prompts or a smaller budget."
            )
        print(f"note: {policy.label} compressed something in {row['exercised']} of {row['n']} samples only")
