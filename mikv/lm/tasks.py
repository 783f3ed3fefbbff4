"""lm-eval's tasks with their data from the hub or from local JSON-lines files.

A local folder holds what the hub's data set holds, a file per split (README, "Data without the hub"):

    SPLIT.jsonl                  gsm8k, and most
    CONFIGURATION/SPLIT.jsonl    mmlu: a folder per subject
    CONFIGURATION.jsonl          truthfulqa: multiple_choice.jsonl
    the publishers' own names    HumanEval.jsonl, test_pages.jsonl (wikitext)
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager

from mikv.tasks.data import DataUnavailable

# File names that follow no rule, by the hub's name of the data set and the split.
_PUBLISHED = {
    ("openai/openai_humaneval", "test"): "HumanEval.jsonl",
    ("EleutherAI/wikitext_document_level", "test"): "test_pages.jsonl",
}
_SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")


class Catalogue:
    """The tasks that lm-eval knows, and some given as configurations of their own.

    Args:
        metadata: passed to tasks that make their own data (RULER: max_seq_lengths, tokenizer).
        own: configurations by name, for tasks that lm-eval has in a form that can't be used.
        include: more folders with lm-eval's YAML files; None = its own.
    """

    def __init__(
        self,
        metadata: Mapping[str, Any] | None = None,
        own: Mapping[str, dict[str, Any]] | None = None,
        include: str | None = None,
    ) -> None:
        logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it announces each default that a task relies on
        self._manager = TaskManager(metadata=dict(metadata or {}), include_path=include, include_defaults=include is None)
        self._own = own or {}

    def load(self, names: Sequence[str], only: Sequence[str] | None, data_dir: str | None) -> list[Task | Group]:
        """Tasks and groups by name, tags as the tasks that they stand for.

        Args:
            names: of tasks, groups, tags.
            only: keep only these tasks of the groups (the part of the name behind the group's is enough); None = all.
            data_dir: folder with local files; None = the hub.

        Raises:
            ValueError: unknown names.
            DataUnavailable: data are missing.
        """
        wanted = None if only is None else set(only)
        found: set[str] = set()
        loaded: list[Task | Group] = []
        for name in names:
            self._check(name)
            loaded += self._build(name, name, wanted, found, data_dir)
        if wanted is not None and found != wanted:
            unknown = sorted(wanted - found)
            every = sorted({short for name in names for short in self._short_names(name, name)})
            raise ValueError(f"task.only names {', '.join(unknown)}; there are {', '.join(every)}")
        return loaded

    def _check(self, name: str) -> None:
        if name in self._manager.task_index or name in self._own:
            return
        near = get_close_matches(name, self._manager.all_tasks, n=3)
        meant = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"lm-eval has no task {name!r}{meant} (`lm-eval ls tasks` lists all)")

    def _members(self, name: str) -> list[str] | None:
        """Names that a group or tag stands for; None for a task."""
        entry = self._manager.task_index.get(name)
        if entry is None or name in self._own or entry.kind.name in ("TASK", "PY_TASK"):
            return None
        if entry.kind.name == "TAG":
            return sorted(entry.tags)
        listed = (entry.cfg or {}).get("task")
        return [item if isinstance(item, str) else item.get("task") or item["group"] for item in listed or []]

    def _short_names(self, name: str, top: str) -> Iterator[str]:
        members = self._members(name)
        if members is None:
            yield _short(name, top)
        for member in members or []:
            yield from self._short_names(member, top)

    def _build(self, name: str, top: str, wanted: set[str] | None, found: set[str], data_dir: str | None) -> list[Task | Group]:
        members = self._members(name)
        if members is None:
            mine = {name, _short(name, top)} & (wanted or set())
            found |= mine
            return [self._task(name, data_dir)] if wanted is None or mine or name == top else []
        children = [built for member in members for built in self._build(member, top, wanted, found, data_dir)]
        entry = self._manager.task_index[name]
        if entry.kind.name == "TAG" or not children:
            return children
        config = {key: value for key, value in (entry.cfg or {}).items() if key in _GROUP_FIELDS}
        group = Group.from_config(config)
        for child in children:
            group.add(child)
        return [group]

    def _task(self, name: str, data_dir: str | None) -> Task:
        entry = self._manager.task_index.get(name)
        config = self._own.get(name) or (entry.cfg if entry is not None else None) or {}
        changes: dict[str, Any] = {}
        if data_dir is not None:
            changes |= {"custom_dataset": None, **_local(name, config, Path(data_dir).expanduser())}
        # in a group, changes are laid over the task's own YAML; without, they are all there is
        whole = {**config, **changes} if name in self._own else {"group": name, "task": [{"task": name, **changes}]}
        try:
            with _quiet():
                return self._manager.load([whole])["tasks"][name]
        except (OSError, ConnectionError, ValueError, RuntimeError) as error:
            if data_dir is not None:
                raise
            raise DataUnavailable(_how_to_get(name, config, error)) from error


_GROUP_FIELDS = ("group", "group_alias", "aggregate_metric_list", "metadata")


def _short(name: str, top: str) -> str:
    return name.removeprefix(f"{top}_")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Progress bars of a hundred small data sets drown everything else."""
    import datasets

    datasets.disable_progress_bars()
    with contextlib.redirect_stderr(io.StringIO()):
        yield


def build_requests(task: Task, limit: int | None, **options: Any) -> None:
    """Let a task make its instances for its first `limit` documents (None = all)."""
    with _quiet():
        task.build_all_requests(limit=limit, **options)


def _local(name: str, config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Where a task's data lie in a folder, as a change of its configuration."""
    if not folder.is_dir():
        raise DataUnavailable(f"task.data_dir={folder} is not a folder")
    dataset, configuration = str(config.get("dataset_path", "")), config.get("dataset_name")
    splits = sorted({config[field] for field in _SPLITS if config.get(field)})
    needed = {config.get("test_split") or config.get("validation_split")}
    files = {}
    for split in splits:
        tried = []
        if published := _PUBLISHED.get((dataset, split)):
            tried.append(published)
        if configuration:
            tried += [f"{configuration}/{split}.jsonl", f"{configuration}.jsonl"]
        tried.append(f"{split}.jsonl")
        file = next((folder / candidate for candidate in tried if (folder / candidate).is_file()), None)
        if file is not None:
            files[split] = str(file.resolve())
        elif split in needed or split == config.get("fewshot_split"):
            raise DataUnavailable(
                f"{name} needs the split {split!r} of {dataset}: none of {', '.join(tried)} is in {folder} "
                '(README, "Data without the hub")'
            )
    # splits that are not there and not needed must not be looked for
    absent = {field: None for field in _SPLITS if config.get(field) and config[field] not in files}
    return {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}, **absent}


def _how_to_get(name: str, config: Mapping[str, Any], error: Exception) -> str:
    reason = (str(error).strip().splitlines() or [repr(error)])[0]
    dataset, configuration = config.get("dataset_path"), config.get("dataset_name")
    which = f"{dataset} ({configuration})" if configuration else str(dataset)
    return (
        f"the data of {name} ({which}) can't be had here: {reason}\nWays to get them:\n"
        f"  - hf download --repo-type dataset {dataset}        (once, with internet; gated data sets: accept the terms on "
        "the data set's page and `hf auth login` first)\n"
        '  - task.data_dir=/folder        (the same data as JSON-lines files; README, "Data without the hub")'
    )
