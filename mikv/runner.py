"""Run a panel of policies on a task: units of work -> batches -> engine -> records -> summary, table and plot."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence

from mikv.engine import Engine, Served
from mikv.engine.requests import Response
from mikv.models.architecture import geometry
from mikv.models.load import Loaded, load, load_geometry
from mikv.plots import save_figures
from mikv.policy import Policy
from mikv.records import Row, RunFolder, check_identity, read_samples, to_lines
from mikv.run import Run
from mikv.run_summary import Collected, collect, summary_rows
from mikv.stopping import Stopping
from mikv.table import print_table
from mikv.work.base import Encoded, Unit, Work

# Part of the attention of a layer beyond which a policy is said to be badly off.
_FAR = 0.5


class RunError(RuntimeError):
    """The run can't be done or its outcome means nothing; the message says why. Records already made are kept."""


def execute(run: Run) -> list[Row]:
    """Do what is not done yet, then summarize. Returns the summary rows.

    A run that is finished is shown and nothing is written: its folder may be read-only.

    Raises:
        RunError, ModelUnavailable, RecordError, ValueError: before long work starts where that is possible.
        Stopped: by a signal, after a batch.
    """
    work = run.open()
    units = work.units()
    if not units:
        raise RunError(f"the task {run.task.name} has no samples")
    summary, collected = _finished(run, work, units) or _complete(run, work, units)
    _show(run, summary, collected)
    return summary


Summarized = tuple[list[Row], Collected]
"""Rows of the summary, and what they were made of."""


def _summarize(run: Run, work: Work, units: Sequence[Unit], done: dict[str, Row]) -> Summarized:
    collected = collect(done, units, list(run.policy_ids.values()))
    return summary_rows(work, collected.rows), collected


def _finished(run: Run, work: Work, units: Sequence[Unit]) -> Summarized | None:
    """What a folder says in which nothing is missing; None where there is something to do."""
    folder = run.folder()
    if not (folder / "run.json").exists():
        return None
    check_identity(folder, run.identity)
    done = read_samples(folder)
    if _missing(run, units, done):
        return None
    summary, collected = _summarize(run, work, units, done)
    file = folder / "summary.jsonl"
    if not file.exists() or not _says(file.read_text(encoding="utf-8"), summary):
        return None
    print(f"{folder}: all {len(units)} samples are done already")
    return summary, collected


def _says(text: str, summary: Sequence[Row]) -> bool:
    """Whether a summary has these rows, in any order: that of an earlier command with another panel is as good."""
    return sorted(text.splitlines()) == sorted(to_lines(summary).splitlines())


def _complete(run: Run, work: Work, units: Sequence[Unit]) -> Summarized:
    """Compute what is missing in the run's folder, and write its summary."""
    device = run.model.device_name()
    with Stopping() as stopping, RunFolder(run.folder(), run.identity, run.config, device=device) as records:
        done = records.samples()
        collect(done, units, list(run.policy_ids.values()))  # what can't be summarized is refused before more is computed
        todo = _missing(run, units, done)
        left = sum(map(len, todo.values()))
        if not todo:
            print(f"{records.path}: all {len(units)} samples are done already")
        elif left < len(units):
            print(f"{records.path}: going on, {len(units) - left} of {len(units)} samples are done")
        if todo:
            _answer(run, work, todo, records, done, stopping)
        summary, collected = _summarize(run, work, units, done)
        records.write_summary(summary)
    return summary, collected


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
        tier.check(head_dim)  # refuses groups that a head can't be cut into, before the weights are read
    loaded = load(run.model)
    engine = Engine(loaded.model, loaded.end_tokens, loaded.tokenizer.pad_token_id or 0, run.reader, run.attention)
    engine.verify_kernels(run.panel)
    unpacked = [policy.label for policy in run.panel if run.backend.reader_of(policy) != run.backend.reader]
    if unpacked:
        print(f"note: the kernels can't read what these store; a dense copy is made of it at each step: {', '.join(unpacked)}")
    encoded = _encode(run, work, [unit for units in todo.values() for unit in units], loaded)
    stopping.heed()  # loading takes minutes
    pace = 0.1 if sys.stderr.isatty() else 30  # seconds: a log keeps every state of the bar
    shape = "{desc}: {percentage:3.0f}%|{bar}| {n:.1f}/{total} [{elapsed}<{remaining}, {rate_fmt}]"
    name = f"{run.model.name} {run.task.name}"
    with tqdm(total=len(encoded), desc=name, unit="sample", mininterval=pace, bar_format=shape) as progress:
        finished = 0
        for lacking, units in todo.items():
            # the full cache comes first, whether its own records are there or not: fidelity is measured against it
            panel = [run.panel[0], *(policy for policy in lacking if policy != run.panel[0])]

            def watch(share: float, before: int = finished, here: int = len(units)) -> None:
                progress.update(before + share * here - progress.n)

            requests = {unit: encoded[unit].requests for unit in units}
            for complete in engine.serve(requests, panel, run.batch_size, run.fidelity, watch):
                for served in complete:
                    outcomes = work.outcomes(served.name, served.responses)
                    rows = [
                        _row(run, policy, served, encoded[served.name], mine, loaded) | outcome
                        for policy, mine, outcome in zip(panel, served.responses, outcomes, strict=True)
                        if policy in lacking
                    ]
                    done.update((row["key"], row) for row in records.append(rows))
                stopping.heed()  # between two batches, when all that is computed is recorded
            finished += len(units)


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


def _row(
    run: Run, policy: Policy, served: Served[Unit], encoded: Encoded, responses: Sequence[Response], loaded: Loaded
) -> Row:
    """What every record has. Of a unit with several prompts (windows of a document), bytes and tokens in
    the cache are sums, prompt_tokens is the longest one's."""
    nbytes: Counter[str] = Counter()
    for response in responses:
        nbytes.update(response.usage.nbytes)
    unit = served.name
    worst = [response.worst_layer for response in responses if response.worst_layer is not None]
    layer, distance = max(worst, key=lambda one: one[1], default=(None, None))
    return {
        "key": run.key(policy, unit),
        "policy": policy.name,
        "policy_id": run.policy_ids[policy],
        "label": policy.label,
        "model": run.model.name,
        "task": run.task.name,
        "question": run.question,
        "sample": unit.name,
        "subtask": unit.subtask,
        "doc_id": unit.doc_id,
        "asked": unit.asked,
        "prompt_tokens": max(request.prompt.tokens for request in encoded.requests),
        "cut_tokens": encoded.cut_tokens,
        "compressed_tokens": sum(response.compressed_tokens for response in responses),
        "kept_tokens": sum(response.usage.kept_tokens for response in responses),
        "seen_tokens": sum(response.usage.seen_tokens for response in responses),
        "nbytes": dict(nbytes),
        "full_nbytes": sum(response.usage.full_nbytes for response in responses),
        "size_percent_paper": policy.paper_size(geometry(loaded.model.config).head_dim),
        # from here on: what may differ where the same is computed again
        "worst_layer": layer,
        "layer_distance": distance,
        "allocated_nbytes": sum(response.usage.allocated_nbytes for response in responses),
        "peak_nbytes": _peak(loaded.model.device.type),
        "reader": run.backend.reader_of(policy),
        "attention": run.backend.attention or "torch",
        "batch": [served.prompts, len(served.responses)],
        "seconds": dict(served.seconds),
    }


def _peak(device: str) -> int | None:
    """Most bytes of memory that the process has held so far: of the GPUs' where the model runs on them, else of the machine's.
    None where the system does not tell."""
    if device == "cuda":
        import torch

        return sum(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _show(run: Run, summary: Sequence[Row], collected: Collected) -> None:
    """Table, plots and notes."""
    folder = run.folder()
    print_table(summary)
    samples = {rows[0]["label"]: rows for rows in collected.rows.values()}
    for kind, file in save_figures(folder, summary, samples):
        print(f"{kind:<8} {file}")
    print(f"records  {folder / 'samples.jsonl'}\nsummary  {folder / 'summary.jsonl'}")
    if collected.more or len(collected.rows) > len(run.panel):
        print(
            f"note: the summary is of all that the folder holds ({len(collected.rows)} policies, {summary[0]['samples']} "
            f"samples); this command asked for {len(run.panel)} and {summary[0]['samples'] - collected.more} of them"
        )
    if collected.replaced:
        print(f"note: {collected.replaced} records in the folder are of samples with other content than now, and don't count")
    _print_summary(run, summary)


def _print_summary(run: Run, summary: Sequence[Row]) -> None:
    """Say what a reader of the numbers must know. A policy that never compressed anything was not evaluated, whatever its
    accuracy: that fails the run."""
    if summary[0]["cut"]:
        cut, samples, tokens = summary[0]["cut"], summary[0]["samples"], summary[0]["cut_tokens"]
        print(f"note: {cut} of {samples} prompts did not fit the model and lost {tokens} tokens on the left")
    unended = [f"{row['label']} {row['unended']}" for row in summary if row["unended"]]
    if unended:
        print(f"note: of {summary[0]['samples']} answers each, so many ran into the limit of new tokens: {', '.join(unended)}")
    for row in summary:
        if row.get("layer_distance", 0) > _FAR:
            print(
                f"warning: {row['label']}: in layer {row['worst_layer']} what is stored moves "
                f"{100 * row['layer_distance']:.0f} % of the attention of a prompt's last tokens elsewhere"
            )
    compressing = {policy.label for policy in run.panel if not policy.lossless}
    for row in summary:
        if row["label"] not in compressing or row["exercised"] == row["samples"]:
            continue
        if row["exercised"] == 0:
            raise RunError(
                f"{row['label']} was never exercised: no context was long enough for it to compress a token, so its "
                "numbers are those of the full cache. Use longer prompts or a smaller budget."
            )
        print(f"note: {row['label']} compressed something in {row['exercised']} of {row['samples']} samples only")
