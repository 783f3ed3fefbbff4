"""lm-eval's tasks as work of a run: its documents are units, its filters and metrics judge each policy's answers, its
aggregation makes the scores."""

from __future__ import annotations

import json
import random
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import numpy as np
from lm_eval.api.group import Group
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import mean, mean_stderr
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.models.huggingface import HFLM

from mikv.engine.requests import Fidelity, Generation, Response, Scores
from mikv.fingerprint import fingerprint
from mikv.lm.humaneval import HUMANEVAL
from mikv.lm.model import EncodedInstances, PanelLM
from mikv.lm.tasks import Catalogue, build_requests
from mikv.metrics.summary import Kind
from mikv.models.load import Loaded, ModelSpec, load_tokenizer
from mikv.tasks.data import cluster
from mikv.tasks.sandbox import permit
from mikv.work.base import Encoded, Row, Summary, Unit, Work, fidelity_row, unit_fidelity

# Documents of each task that a subset takes; None = all.
SUBSETS: dict[str, int | None] = {"full": None, "tiny": 2}
_OWN = {"humaneval": HUMANEVAL}
# What of a task's configuration makes a score of a reply.
_JUDGED = ("filter_list", "metric_list", "process_results", "doc_to_target", "doc_to_choice", "target_delimiter")
# Metrics that are 1 or 0 of each document where lm-eval's own code computes them. A task's own function may give anything under
# any name (truthfulqa_mc2's `acc` is a probability); those of ours are known.
_OUTCOMES = {"acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match"}
_OWN_OUTCOMES = {("humaneval", "pass@1")}
# Fields of a document that hold a text which other documents may ask about too.
_CONTEXTS = ("context", "passage", "article", "story", "paragraph")


@dataclass(frozen=True)
class Harness:
    """A benchmark of lm-eval.

    Args:
        name: lm-eval's task, group or tag; or a name for `tasks`.
        tasks: lm-eval's names, where there are several or they differ from `name`.
        only: of groups, only these tasks (mmlu: anatomy, astronomy, ...); null = all.
        subset: full, or tiny (the first 2 documents of each task); task.limit takes precedence.
        num_fewshot: examples in the prompt; null = as the task says.
        data_dir: a folder with the data as JSON lines (README, "Data without the hub"); null = from the hub.
        metric: which of lm-eval's metrics decides, as `metric,filter` or `task:metric,filter`; null = the first one.
        chat: write prompts with the model's chat template.
        multiturn: with `chat`, few-shot examples are turns of the conversation (else: one message).
        system: system instruction.
        gen_kwargs: changes of the task's generation parameters (until, max_gen_toks, do_sample, temperature, ...).
        window, head: of `loglikelihood_rolling`, see mikv.lm.model.
        metadata: for tasks that make their data (RULER: max_seq_lengths).
        include: a folder with task YAMLs in lm-eval's format, instead of its own.
        allow_code_execution: run code that the model writes, confined (mikv.tasks.sandbox); `unconfined` = also where this
            machine can't confine it.
    """

    name: str
    tasks: Sequence[str] | None = None
    only: Sequence[str] | None = None
    subset: str = "full"
    num_fewshot: int | None = None
    data_dir: str | None = None
    metric: str | None = None
    chat: bool = False
    multiturn: bool = True
    system: str | None = None
    gen_kwargs: Mapping[str, Any] | None = None
    window: int = 1024
    head: int = 512
    metadata: Mapping[str, Any] | None = None
    include: str | None = None
    allow_code_execution: bool | str = False

    def __post_init__(self) -> None:
        if self.subset not in SUBSETS:
            raise ValueError(f"task.subset={self.subset}: choose {' or '.join(SUBSETS)}")
        if not 1 <= self.head <= self.window:
            raise ValueError(f"task.head={self.head}: from 1 to task.window={self.window}")

    def identity(self) -> dict[str, Any]:
        """Prompts, documents and how they are judged are in each unit's `asked`; `metric` decides which score counts."""
        return {"name": self.name, "version": 1, "metric": self.metric}

    def scope(self) -> dict[str, Any]:
        return {"subset": self.subset, "only": sorted(self.only) if self.only else None, "num_fewshot": self.num_fewshot}

    def open(self, spec: ModelSpec, limit: int | None, seed: int, question: str) -> HarnessWork:
        if question != "visible":
            raise ValueError(
                f"protocol.question={question}: lm-eval's tasks do not say where their question begins, so the cache can't "
                "be compressed before it; use protocol.question=visible"
            )
        for name in self.tasks or [self.name]:
            if name in _OWN:  # before anybody waits for data
                self._check_execution(name)
        tops = self.load(spec, seed)
        tasks = _leaves(tops)
        for name, task in tasks.items():
            self._check(name, task)
            self._configure(task, seed)
        options: dict[str, Any] = {"system_instruction": self.system}
        if self.chat:
            options |= {
                "apply_chat_template": True,
                "fewshot_as_multiturn": self.multiturn,
                "chat_template": _chat_template(load_tokenizer(spec), self.system),
            }
        for task in tasks.values():
            build_requests(task, self.count(limit), **options)
        return HarnessWork(self, tops, tasks, seed)

    def load(self, spec: ModelSpec, seed: int) -> list[Task | Group]:
        """lm-eval's tasks and groups with their data. Raises ValueError, DataUnavailable."""
        random.seed(seed)
        np.random.seed(seed)  # what tasks that make their own data use
        metadata = dict(self.metadata or {})
        with TemporaryDirectory() as folder:
            if metadata.get("max_seq_lengths") and "tokenizer" not in metadata:
                save_tokenizer(spec, folder)
                metadata["tokenizer"] = folder
            catalogue = Catalogue(metadata, _OWN, self.include)
            return catalogue.load(self.tasks or [self.name], self.only, self._folder())

    def _folder(self) -> str | None:
        """The folder with the data, or the one of this name in it: one tree serves all tasks."""
        if self.data_dir is None:
            return None
        mine = Path(self.data_dir).expanduser() / self.name
        return str(mine) if mine.is_dir() else self.data_dir

    def count(self, limit: int | None) -> int | None:
        """Documents of each task; None = all."""
        return limit if limit is not None else SUBSETS[self.subset]

    def _check(self, name: str, task: Task) -> None:
        if getattr(task, "MULTIMODAL", False):
            raise ValueError(f"{name} has images or sound; only text is supported")
        if not getattr(task, "UNSAFE_CODE", False):
            return
        if name not in _OWN:
            raise ValueError(f"{name} runs code that the model writes, and not in this project's confinement; not supported")
        self._check_execution(name)

    def _check_execution(self, name: str) -> None:
        """Of a task that runs code in this project's confinement: may it, and does this machine confine it?"""
        if self.allow_code_execution is not True and self.allow_code_execution != "unconfined":
            raise ValueError(
                f"{name} runs code that the model writes. It is confined: no files, no network, no other processes, limited "
                "time and memory; against accidents and simple tricks, not attackers (mikv/tasks/sandbox). Say "
                "allow_code_execution=true where that is good enough"
            )
        permit(unconfined=self.allow_code_execution == "unconfined")

    def _configure(self, task: Task, seed: int) -> None:
        """As lm_eval.simple_evaluate does it."""
        if self.gen_kwargs and task.get_config("output_type") == "generate_until":
            task.set_config(key="generation_kwargs", value=dict(self.gen_kwargs), update=True)
        # 0 in a task's own YAML means that it can't have examples
        if self.num_fewshot is not None and task.get_config("num_fewshot") != 0:
            task.set_config(key="num_fewshot", value=self.num_fewshot)
        elif task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=seed)


def save_tokenizer(spec: ModelSpec, folder: str) -> None:
    """A copy for tasks that load it themselves: by a name lm-eval takes any commit, and runs the code that comes with it."""
    tokenizer = load_tokenizer(spec)
    tokenizer.init_kwargs.pop("auto_map", None)
    tokenizer.save_pretrained(folder)


class HarnessWork(Work):
    """A Harness, opened."""

    flags: tuple[str, ...] = ()

    def __init__(self, harness: Harness, tops: Sequence[Task | Group], tasks: Mapping[str, Task], seed: int) -> None:
        self._harness, self._tops, self._tasks, self._seed = harness, tops, tasks, seed
        self._instances: dict[str, list[Instance]] = {}
        self._units: list[Unit] = []
        for name, task in tasks.items():
            config = task.config.to_dict(keep_callable=False)  # functions as their source
            judged = json.dumps({option: config.get(option) for option in _JUDGED}, default=_named, sort_keys=True)
            by_doc: dict[int, list[Instance]] = defaultdict(list)
            for instance in task.instances:
                by_doc[int(instance.doc_id or 0)].append(instance)
            for doc_id, instances in by_doc.items():
                instances.sort(key=lambda instance: instance.idx)
                unit = Unit(doc_id, name, self._asked(task, instances, judged))
                self._units.append(unit)
                self._instances[unit.name] = instances
        self._headlines = self._find_headlines()
        self.metric, self._decisive = self._find_metric()
        leaf = self._tasks[self._members(self._decisive[0])[0]]
        self.lower_is_better = not leaf.higher_is_better().get(self._decisive[1].split(",")[0], True)
        self.kind = self._kind()
        self._lm: PanelLM | None = None
        self._encoded: dict[str, EncodedInstances] = {}

    def _asked(self, task: Task, instances: Sequence[Instance], judged: str) -> str:
        """Hash of a document: its requests, its own content (gold answers, what metrics read), and how replies are judged."""
        rolling = instances[0].request_type == "loglikelihood_rolling"
        return fingerprint(
            {
                "version": str(task.VERSION),
                "requests": [[instance.request_type, list(instance.args), instance.repeats] for instance in instances],
                "document": json.dumps(instances[0].doc, default=_named, sort_keys=True),
                "judged": judged,
                **({"window": self._harness.window, "head": self._harness.head} if rolling else {}),
            }
        )

    def units(self) -> list[Unit]:
        return self._units

    def instances(self) -> list[Instance]:
        """lm-eval's requests, all of them."""
        return [instance for instances in self._instances.values() for instance in instances]

    def encode(self, unit: Unit, loaded: Loaded) -> Encoded:
        if self._lm is None:
            self._lm = PanelLM(loaded, seed=self._seed, window=self._harness.window, head=self._harness.head)
        encoded = self._lm.encode(self._instances[unit.name])
        self._encoded[unit.name] = encoded
        return Encoded(encoded.requests, max(0, encoded.cut_tokens))

    def outcomes(self, unit: Unit, responses: Sequence[Sequence[Response]]) -> list[Row]:
        assert self._lm is not None
        task = self._tasks[str(unit.subtask)]
        instances, encoded = self._instances[unit.name], self._encoded.pop(unit.name)
        rolling = instances[0].request_type == "loglikelihood_rolling"
        fidelities = _over_windows(responses) if rolling else unit_fidelity(responses)
        rows = []
        for mine, fidelity in zip(responses, fidelities, strict=True):
            replies = self._lm.replies(instances, encoded, mine)
            metrics = self._judge(task, instances, replies)
            generations = [response for response in mine if isinstance(response, Generation)]
            rows.append(
                {
                    "answer": _answer(instances, replies),
                    "target": str(task.doc_to_target(instances[0].doc)) if not rolling else None,
                    "metrics": metrics,
                    "score": self._score(unit, metrics),
                    **({} if generations and len(generations) == 1 else {"replies": replies}),
                    **({"answer_tokens": sum(len(g.tokens) for g in generations)} if generations else {}),
                    **({"ended": all(g.ended for g in generations)} if generations else {}),
                    **_shared(instances[0].doc),
                    **fidelity_row(fidelity),
                }
            )
        return rows

    def _kind(self) -> Kind:
        """Of the decisive metric, in all tasks that it is a mean of; lm-eval does not say what values a metric can have."""
        task, key = self._decisive
        metric = key.split(",")[0]
        members = self._members(task)
        return "outcome" if all(_is_outcome(name, self._tasks[name], metric) for name in members) else "number"

    def _judge(self, task: Task, instances: Sequence[Instance], replies: Sequence[list[Any]]) -> dict[str, Any]:
        """lm-eval's filters, then its metrics of one document, by `metric,filter`."""
        for instance, resps in zip(instances, replies, strict=True):
            instance.resps, instance.filtered_resps = list(resps), {}
        for ensemble in task._filters:
            ensemble.apply(list(instances))
        metrics: dict[str, Any] = {}
        for name in instances[0].filtered_resps:
            results = task.process_results(instances[0].doc, [instance.filtered_resps[name] for instance in instances])
            metrics |= {f"{metric},{name}": value for metric, value in results.items()}
        return json.loads(json.dumps(metrics, default=_plain))  # as it will be read back from a record

    def _score(self, unit: Unit, metrics: Mapping[str, Any]) -> float | None:
        """The decisive metric of one document, where it is a mean over documents."""
        task, key = self._decisive
        value = metrics.get(key)
        if unit.subtask not in self._members(task) or not isinstance(value, int | float):
            return None
        return float(value) if self._aggregation(self._tasks[str(unit.subtask)], key) is mean else None

    def summarize(self, rows: Sequence[Row]) -> Summary:
        by_task: dict[str, dict[str, Any]] = {}
        for name, task in self._tasks.items():
            mine = [row["metrics"] for row in rows if row["subtask"] == name]
            if mine:
                by_task[name] = {"name": name, "sample_len": len(mine), **self._aggregate(task, mine)}
        for group in _groups(self._tops):
            by_task[group.name] = dict(group.aggregate(by_task))
        task_name, key = self._decisive
        scores = {label: by_task[name][k] for label, (name, k) in self._headlines.items() if k in by_task.get(name, {})}
        return Summary(by_task[task_name][key], scores, by_task)

    def _aggregate(self, task: Task, metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key in dict.fromkeys(key for one in metrics for key in one):
            values = [one[key] for one in metrics if key in one]
            aggregation = self._aggregation(task, key)
            result[key] = aggregation(values)
            metric, _, name = key.partition(",")
            known = aggregation is mean and len(values) > 1
            result[f"{metric}_stderr,{name}"] = mean_stderr(values) if known else "N/A"
        return result

    def _aggregation(self, task: Task, key: str) -> Any:
        return task.aggregation().get(key.split(",")[0], mean)  # lm-eval's own default

    def _members(self, name: str) -> list[str]:
        """Tasks of a group, or the task itself."""
        for group in _groups(self._tops):
            if group.name == name and name not in self._tasks:
                return [task.task_name for task in group.get_all_tasks()]
        return [name]

    def _find_headlines(self) -> dict[str, tuple[str, str]]:
        """What a table shows: (task or group, metric key) by label."""
        tops = [_name(top) for top in self._tops]
        labels: dict[str, tuple[str, str]] = {}
        for top in self._tops:
            filters = [ensemble.name for ensemble in self._tasks[self._members(_name(top))[0]]._filters]
            keys = [f"{metric},{name}" for name in filters for metric in self._metrics(top)]
            for key in keys:
                metric, _, name = key.partition(",")
                parts = [_name(top).removeprefix(f"{self._harness.name}_")] if len(tops) > 1 else []
                parts += [metric] if len(filters) == 1 else [metric, name]
                labels[" ".join(parts)] = (_name(top), key)
        return labels

    def _metrics(self, top: Task | Group) -> list[str]:
        if isinstance(top, Group):
            return [config.metric for config in top.aggregate_metric_list or []]
        return list(top.aggregation())

    def _find_metric(self) -> tuple[str, tuple[str, str]]:
        if not self._headlines:
            raise ValueError(f"the group {self._harness.name} has no score of its own; choose its tasks: task.tasks=[...]")
        if self._harness.metric is None:
            return next(iter(self._headlines.items()))
        task, _, key = self._harness.metric.rpartition(":")
        for label, (name, known) in self._headlines.items():
            if known == key and task in ("", name):
                return label, (name, known)
        known_keys = ", ".join(f"{name}:{key}" for name, key in self._headlines.values())
        raise ValueError(f"task.metric={self._harness.metric}: there are {known_keys}")


def _leaves(tops: Sequence[Task | Group]) -> dict[str, Task]:
    tasks: dict[str, Task] = {}
    for top in tops:
        for task in top.get_all_tasks() if isinstance(top, Group) else [top]:
            tasks[task.task_name] = task
    return tasks


def _groups(tops: Sequence[Task | Group]) -> list[Group]:
    """All groups, children before parents."""
    groups: list[Group] = []
    for top in tops:
        if isinstance(top, Group):
            groups += [*reversed(top.get_all_groups()), top]
    return groups


def _name(top: Task | Group) -> str:
    return top.name if isinstance(top, Group) else top.task_name


def _chat_template(tokenizer: Any, system: str | None) -> Any:
    """lm-eval's way to write a conversation; the method needs a tokenizer and no model.

    Where a template knows no system role, lm-eval leaves that message out. A task's description may go, an instruction that
    was asked for (task.system) may not: its rules would be broken by every policy alike.
    """
    holder = SimpleNamespace(tokenizer=tokenizer, chat_template_args={})

    def render(history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        text = HFLM.apply_chat_template(holder, history, add_generation_prompt)
        if system is not None and system.strip() not in text:
            raise ValueError(
                "the model's chat template drops task.system; use task.chat=false, or a model that has a system role"
            )
        return text

    return render


def _is_outcome(name: str, task: Task, metric: str) -> bool:
    if name in _OWN:
        return (name, metric) in _OWN_OUTCOMES and task.get_config("repeats") == 1
    own = callable(task.get_config("process_results")) or type(task).process_results is not ConfigurableTask.process_results
    return metric in _OUTCOMES and not own


def _shared(doc: Mapping[str, Any]) -> Row:
    """The `cluster` of a record: the text that a document asks about; none where it has no such field."""
    texts = [doc[name] for name in _CONTEXTS if isinstance(doc.get(name), str) and doc[name]]
    return {"cluster": cluster(texts[0])} if texts else {}


def _answer(instances: Sequence[Instance], replies: Sequence[list[Any]]) -> str | None:
    """For people who read records: what was said, or the continuation with the highest log-likelihood."""
    kind = instances[0].request_type
    if kind == "generate_until":
        return replies[0][0]
    if kind == "loglikelihood":
        best = max(range(len(instances)), key=lambda i: replies[i][0][0])
        return instances[best].args[1]
    return None


def _over_windows(responses: Sequence[Sequence[Response]]) -> list[Fidelity | None]:
    """Fidelity on a document that was scored in windows: the mean over its tokens."""
    lengths = []
    for response in responses[0]:
        assert isinstance(response, Scores)
        lengths.append(response.continuations[0].tokens)
    result: list[Fidelity | None] = []
    for mine in responses:
        parts = [scores.continuations[0].fidelity for scores in mine if isinstance(scores, Scores)]
        result.append(Fidelity(*(float(np.average(column, weights=lengths)) for column in zip(*parts, strict=True))))
    return result


def _named(value: Any) -> Any:
    """What JSON has no form for, in words that are the same in every process: a repr without addresses."""
    return value.tolist() if isinstance(value, np.generic | np.ndarray) else re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _plain(value: Any) -> Any:
    """numpy's numbers and arrays for JSON."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"a metric of type {type(value).__name__} can't be recorded")
