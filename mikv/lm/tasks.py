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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager

from mikv.tasks.data import DataUnavailable, numbered_rows

if TYPE_CHECKING:
    import datasets

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
        files = None if data_dir is None else _files(name, config, Path(data_dir).expanduser())
        if files is not None:
            changes |= _local(config, files)
        # in a group, changes are laid over the task's own YAML; without, they are all there is
        whole = {**config, **changes} if name in self._own else {"group": name, "task": [{"task": name, **changes}]}
        try:
            with _quiet():
                return self._manager.load([whole])["tasks"][name]
        except Exception as error:  # the task's own code, on rows that it may not fit: KeyError, TypeError, UndefinedError, ...
            if files is not None and not isinstance(error, OSError | ImportError):
                raise ValueError(_unfit(name, config, files, error)) from error
            if isinstance(error, OSError | ValueError | RuntimeError):
                raise DataUnavailable(_how_to_get(name, config, error)) from error
            raise


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
    """Let a task make its instances for its first `limit` documents (None = all).

    Raises:
        ValueError: a document is not what the task expects; says which, before anything is asked.
    """
    _check_documents(task, "document", islice(task.eval_docs, limit))
    try:
        with _quiet():
            task.build_all_requests(limit=limit, **options)
    except Exception:  # the examples are read now, by the task's own code
        _check_documents(task, "example", task.fewshot_docs() or ())
        raise


def _check_documents(task: Task, what: str, documents: Iterable[Mapping[str, Any]]) -> None:
    for number, document in enumerate(documents):
        if (why := _unaskable(task, document)) is not None:
            raise ValueError(
                f"{task.config.task} can't make a question of its {what} {number} (counted from 0): {why}. Its fields are "
                f'{_listed(document)}; README, "Data without the hub", says what is wanted'
            )


def _unaskable(task: Task, document: Mapping[str, Any]) -> str | None:
    """Why a task can't make a question of a document; None = it can."""
    try:
        task.doc_to_text(document)
        target = task.doc_to_target(document)
        if getattr(task.config, "doc_to_choice", None) is not None:
            choices = task.doc_to_choice(document)
            if isinstance(target, int) and not 0 <= target < len(choices):
                return f"the right answer is number {target} of {len(choices)}"
    except Exception as error:  # the task's own code, on a document that it may not fit
        return f"{type(error).__name__}: {error}"
    return None


def _listed(document: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} ({type(value).__name__})" for name, value in document.items())


def _files(name: str, config: Mapping[str, Any], folder: Path) -> dict[str, Path]:
    """A task's files in a folder, by split. Raises DataUnavailable where one that is needed is not there."""
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
            files[split] = file
        elif split in needed or split == config.get("fewshot_split"):
            raise DataUnavailable(
                f"{name} needs the split {split!r} of {dataset}: none of {', '.join(tried)} is in {folder} "
                '(README, "Data without the hub")'
            )
    return files


def _local(config: Mapping[str, Any], files: Mapping[str, Path]) -> dict[str, Any]:
    """The rows of local files as a change of a task's configuration.

    They are read here: the loader of `datasets` tells neither file nor line of what is wrong, takes texts that look like dates
    for dates, and keeps copies in the user's cache.
    """
    import datasets

    splits = datasets.DatasetDict({split: _dataset(file) for split, file in files.items()})
    # splits that are not there and not needed must not be looked for
    absent = {field: None for field in _SPLITS if config.get(field) and config[field] not in files}
    return {"custom_dataset": lambda **_: splits, "dataset_kwargs": None, **absent}


def _dataset(file: Path) -> datasets.Dataset:
    """Rows of a JSON-lines file, all with the same fields, each of one type or null. Raises ValueError, OSError."""
    import datasets

    rows: list[dict[str, Any]] = []
    types: dict[str, type] = {}
    for where, row in numbered_rows(file):
        if rows and row.keys() != rows[0].keys():
            odd = ", ".join(sorted(row.keys() ^ rows[0].keys()))
            raise ValueError(
                f"{where} has other fields than the first line: {odd} is in one of them alone; wanted: the same in each"
            )
        for name, value in row.items():
            kind = float if type(value) is int else type(value)
            if value is not None and types.setdefault(name, kind) is not kind:
                raise ValueError(
                    f"{where}: {name} is of type {type(value).__name__}, and {types[name].__name__} before; wanted: the same"
                )
        rows.append(row)
    try:
        return datasets.Dataset.from_list(rows)
    except (ValueError, TypeError, OverflowError) as error:  # what lies within lists and objects differs in type
        raise ValueError(
            f"{file}: its rows do not make one table ({error}); wanted: values of the same types in each row"
        ) from error


def _unfit(name: str, config: Mapping[str, Any], files: Mapping[str, Path], error: Exception) -> str:
    listed = ", ".join(map(str, files.values()))
    _, first = next(numbered_rows(next(iter(files.values()))))
    return (
        f"{name} can't be asked with the rows of {listed} ({type(error).__name__}: {error}). Their fields are "
        f'{_listed(first)}; wanted: those of {config.get("dataset_path")} (README, "Data without the hub")'
    )


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
