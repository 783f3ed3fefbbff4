"""What a run is: model, policies, task and protocol, checked; and the keys of its records, which cover all that changes an
outcome."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mikv.cache.backend import Backend, decide
from mikv.fingerprint import fingerprint, record_key
from mikv.models.load import ModelSpec, load_geometry
from mikv.options import QUESTIONS, check_choice, check_name, check_range
from mikv.policy import Policy
from mikv.tasks.base import Task
from mikv.work.base import Openable, Unit, Work, task_identity
from mikv.work.generation import open_task


@dataclass(frozen=True)
class Run:
    """Everything a run needs, checked.

    Args:
        model: which model.
        panel: policies, `full` first; labels are unique.
        task: what is asked.
        limit: number of samples (of each subtask); None = all that there are.
        question: visible or hidden, see mikv.engine.
        batch_size: prompts at a time; each brings a row per policy. It changes speed and memory, and how matrix products round:
            a code at a rounding tie may flip, and now and then an answer. Each record says in which batch it was made.
        seed: of the samples.
        reader, attention: how the compressed cache is read, see mikv.cache.backend; None = as it suits the device.
        fidelity: feed the full cache's own answers through each policy's cache (scored continuations always are).
        name: folder name within `out`; None = made from model, task, panel and the hash of what is asked.
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
        check_choice("protocol.question", self.question, QUESTIONS)
        _ = self.backend
        for option, value in (("task.limit", self.limit), ("batch_size", self.batch_size), ("seed", self.seed)):
            check_range(option, value)
        check_name(self.name)
        labels = [policy.label for policy in self.panel]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            raise ValueError(f"the panel has {', '.join(twice)} more than once; each row must differ in something")

    @cached_property
    def backend(self) -> Backend:
        """How caches will be read, known before the weights are: it is a part of the identity."""
        device, dtype = self.model.resolve_device(), self.model.resolve_dtype()
        return decide(self.reader, self.attention, device, dtype, lambda: load_geometry(self.model).head_dim)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What changes an outcome, besides policy and sample. Not: limit, paths, nor what only moves rounding (batch size,
        device, a reader that does the same), which stands in each row, or in the environment that it names.

        Computed once: weights in a local folder are read for their fingerprint.
        """
        return {
            "model": {
                "name": self.model.name,
                "weights": self.model.describe(),
                "dtype": str(self.model.resolve_dtype()).removeprefix("torch."),
                "max_tokens": self.model.max_tokens,
                "trust_remote_code": self.model.trust_remote_code,
            },
            "task": task_identity(self.task),
            "protocol": {"question": self.question, "fidelity": self.fidelity, **self.backend.protocol},
            "seed": self.seed,
        }

    @cached_property
    def policy_ids(self) -> dict[Policy, str]:
        """A hash of all that a policy is, by policy."""
        return {policy: fingerprint(policy.identity()) for policy in self.panel}

    def key(self, policy: Policy, unit: Unit) -> str:
        """Key of one policy's answer to one unit."""
        return record_key(self.identity, self.policy_ids[policy], dataclasses.asdict(unit))

    def open(self) -> Work:
        """Find the task's data and make its units."""
        return open_task(self.task, self.model, self.limit, self.seed, self.question)

    def folder(self) -> Path:
        """Where the records lie."""
        if self.name is not None:
            return self.out / self.name
        scope = {"limit": self.limit, **(self.task.scope() if isinstance(self.task, Openable) else {})}
        asked = {**self.identity, **scope, "panel": [policy.identity() for policy in self.panel]}
        return self.out / f"{self.model.name}-{self.task.name}-{self.title}-{fingerprint(asked)[:8]}"
