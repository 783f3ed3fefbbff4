"""Keys cover what changes an outcome: every option of every group of conf/, changed one by one, makes other keys, or stands on
the short list of what may not matter (a store that hashes less returns another run's answers: trap T29)."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import own_rows
import pytest
import torch
import yaml
from conftest import POLICIES
from omegaconf import DictConfig, OmegaConf

from mikv.config import CONF, checked, compose, policy
from mikv.identity import identity_of
from mikv.models.tiny import byte_tokenizer, tiny_config, tiny_model
from mikv.policy import Policy
from mikv.run import Run

# What may not matter, and why. Names end so; everything else must change the keys.
MAY_NOT_MATTER = {
    "batch_size": "rounding only; stands in each row",
    "reader": "the dense readers agree bit for bit; the kernels' protocol is in the key (test_runner.py)",
    "name": "where records lie",
    "out": "where records lie",
    "conf_dir": "where YAMLs lie; what they say is in the keys (test_own_folder.py)",
    "allow_code_execution": "without it the task is refused",
    "model.device": "rounding only; stands in the environment",
    "model.device_map": "rounding only; stands in the environment",
    "model.hub": "the weights that are taken are in the key (tests/models)",
    "model.revision": "the weights that are taken are in the key (tests/models)",
    "model.gguf_package": "the weights that are taken are in the key (tests/models)",
    "model.source": "the weights that are taken are in the key (tests/models)",
    "limit": "chooses samples",
    "task.only": "chooses samples",
    "task.subset": "chooses samples",
    "categories": "chooses samples",
    "data_dir": "what its files hold is in the key",
    "task.include": "what its tasks ask is in the key",
    "task.name": "of lm-eval's tasks it is in the key (below)",
}
ROOT = ("name", "out")  # these are meant alone: model.name is another option
STATEMENTS = ("tracker", "launcher", "experiment")  # groups of which no run depends

# Another value of an option whose kind does not tell one.
OTHER: dict[str, Any] = {
    "keep": 0.3, "recent": 0.3, "budget": "fixed", "positions": {"original": "contiguous", "contiguous": "original"},
    "bits": {16: 8, 8: 16, 5: 4, 4: 3, 2: 3}, "code": "codebook",
    "high.key_bits": 5, "high.value_bits": 5, "key_bits": 3, "value_bits": 3,
    "group": 8,    "dtype": "bfloat16", "model.max_tokens": 3000, "attention": "reference", "question": "hidden",
    "kind": {"extraction": "hijacking", "hijacking": "helpful", "helpful": "hijacking"},
    "source": {"xquad": "nq_open", "nq_open": "xquad", "advbench": "jailbreakbench", "harmbench": "advbench",
               "jailbreakbench": "advbench"},
    "part": {"ending": "translation", "translation": "ending"}, "depths": {None: 2, 5: 4}, "system": "Be brief.",
    "model.name": "other", "key": "affine3", "value": "affine3",
    "kernel": 7, "residual": 256, "mass": 0.5, "least": 0.5, "first": 0.3, "epsilon": 0.1,
    "heads": "layer",
    "extra": 0.5, "centre": "after", "policy.balance": {"rms": "max", True: False, False: True}, "importance": "random",
    "probes": 0.2, "per": "length",
    "preset": {"k3v4_nc": "4bit_nc", None: "Qwen2.5-7B-Instruct_pertoken_KVTuner4_0"}, "layers": [[8, 8], [4, 2]],
}  # fmt: skip
# Options that need a file, a repository or another option; each has a test of its own.
ELSEWHERE = ("model.path", "model.adapter", "task.file", "task.text", "file", "judge", "_target_", "task.metric")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return own_rows.write(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and its tokenizer."""
    folder = tmp_path_factory.mktemp("weights")
    tiny_model(tiny_config()).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def keys(run: Run) -> set[str]:
    return {run.key(policy, unit) for policy in run.panel for unit in run.open().units()}


def leaves(config: Any, at: str) -> Iterator[tuple[str, Any]]:
    """Options with their values; lists count as one."""
    for name, value in config.items():
        if isinstance(value, DictConfig | dict):
            yield from leaves(value, f"{at}.{name}")
        else:
            yield f"{at}.{name}".lstrip("."), value


def listed(name: str, names: Any) -> bool:
    options = [known for known in names if known not in ROOT]
    return name in ROOT or any(f".{name}".endswith(f".{known}") or f".{known}." in f".{name}." for known in options)


def other(name: str, value: Any) -> Any:
    """Another value of an option."""
    found = next((of for known, of in OTHER.items() if f".{name}".endswith(f".{known}")), None)
    if isinstance(found, dict):
        found = found[value]
    if found is not None:
        return found
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    raise AssertionError(f"say in OTHER what {name}={value} may be changed to, or in MAY_NOT_MATTER why it does not matter")


def changes(options: Any, at: str) -> list[tuple[str, str]]:
    """For each option of a group that matters: its name, and it with another value, as on a command line."""
    found = []
    for name, value in leaves(options, at):
        if not listed(name, MAY_NOT_MATTER) and not listed(name, ELSEWHERE):
            value = None if value == "???" else value
            found.append((name, f"{name}={json.dumps(other(name, value))}"))
    return found


def unseen(base: list[str], options: Any, at: str) -> list[str]:
    """Options of a group whose change leaves a key as it was."""
    before = keys(compose(*base))
    full = {run.key(run.panel[0], unit) for run in [compose(*base)] for unit in run.open().units()}
    blind = []
    for _, line in changes(options, at):
        after = keys(compose(*base, line))
        # of a policy's options the full cache, which is in every panel, has none
        if not after.isdisjoint(before - full if at.startswith(("policy", "panel")) else before):
            blind.append(line)
    return blind


def composed(*lines: str) -> DictConfig:
    return checked(lines)


def test_options_of_the_run_itself() -> None:
    root = {name: value for name, value in composed().items() if not isinstance(value, DictConfig) or name == "protocol"}
    base = ["model=tiny-random", "task=guardedrecall", "task.lines=2", "task.limit=2"]
    assert {"seed", "fidelity", "protocol.question", "attention"} == {name for name, _ in changes(root, "")} - {
        "panel",
        "judge",
    }
    assert unseen(base, {k: v for k, v in root.items() if k not in ("panel", "judge")}, "") == []


@pytest.mark.parametrize("name", sorted(file.stem for file in (CONF / "model").glob("*.yaml")))
def test_options_of_every_model(name: str, weights: Path) -> None:
    base = [f"model={name}", f"model.path={weights}", "task.lines=2", "task.limit=2"]
    options = composed(f"model={name}").model
    assert unseen(base, options, "model") == []


@pytest.mark.parametrize("name", POLICIES)
def test_options_of_every_policy(name: str) -> None:
    base = ["model=tiny-random", "task.lines=2", "task.limit=2", f"policy={name}"]
    base += ["policy.keep=0.2"] if name == "whiten" else []  # without important tokens their tier means nothing
    options = composed(f"policy={name}").policy
    blind = unseen(base, options, "policy")
    # 16 bits have no groups: there the option means nothing, at 8 bits it does
    exact = [tier for tier, of_tier in options.items() if isinstance(of_tier, DictConfig) and of_tier.bits == 16]
    assert blind == [f"policy.{tier}.group=8" for tier in exact]
    for line, tier in zip(blind, exact, strict=True):
        at_8 = [*base, f"policy.{tier}.bits=8"]
        full = {run.key(run.panel[0], unit) for run in [compose(*at_8)] for unit in run.open().units()}
        assert (keys(compose(*at_8)) - full).isdisjoint(keys(compose(*at_8, line)))


@pytest.mark.parametrize("name", sorted(file.stem for file in (CONF / "panel").glob("*.yaml")))
def test_entries_of_every_panel_are_policies_of_their_own(name: str) -> None:
    """An entry is a policy with options, all of which are tested above; no two of a panel share keys."""
    run = compose("model=tiny-random", "task.lines=2", "task.limit=2", f"panel={name}")
    assert len(keys(run)) == 2 * len(run.panel)


def targets(*endings: str) -> list[str]:
    """Tasks whose constructor's name ends so."""
    files = (CONF / "task").glob("*.yaml")
    return sorted(file.stem for file in files if yaml.safe_load(file.read_text())["_target_"].endswith(endings))


SUITES = targets("Suite")
OWN = sorted({file.stem for file in (CONF / "task").glob("*.yaml")} - set(SUITES) - set(targets("lm.Harness")))


@pytest.mark.parametrize("name", OWN)
def test_options_of_every_task_of_the_project(name: str, data: str) -> None:
    base = ["model=tiny-random", f"task={name}", "task.limit=2"]
    options = composed(f"task={name}").task
    base += [f"task.data_dir={data}"] if "data_dir" in options and name != "key_value" else []
    base += ["task.depths=3"] if name == "linerecall" else []
    assert unseen(base, options, "task") == []


@pytest.mark.parametrize("name", SUITES)
def test_an_option_of_a_suites_part_is_in_the_keys_of_that_part_alone(name: str, data: str) -> None:
    """Its other options are those of the task, tested above."""
    without = ["~task.parts.truthfulqa"] if name == "hallucination" else []
    base = ["model=tiny-random", f"task={name}", f"task.data_dir={data}", "task.limit=2", *without]

    def by_part(*lines: str) -> dict[str, set[str]]:
        run, found = compose(*base, *lines), defaultdict(set)
        for unit in run.open().units():
            found[str(unit.subtask).split("/")[0]].add(run.key(run.panel[1], unit))
        return found

    before = by_part()
    parts = [part for part, options in composed(f"task={name}").task.parts.items() if "max_new_tokens" in options]
    assert len(parts) > 2
    for part in parts:
        after = by_part(f"task.parts.{part}.max_new_tokens=77")
        assert {name for name in before if after[name] != before[name]} == {part}
        assert after[part].isdisjoint(before[part])


def test_options_of_lm_evals_tasks(own: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """One constructor serves all of them; options that only some kinds of tasks heed are tried on these."""
    tasks, folder = own
    base = ["model=tiny-random", "task=lm_eval", f"task.include={tasks}", f"task.data_dir={folder}", "task.limit=2"]
    answer, pages = [*base, "task.name=own_answer"], [*base, "task.name=own_pages"]
    monkeypatch.setattr("mikv.lm.harness._chat_template", lambda *_: written)
    chat = [*answer, "task.chat=true", "task.num_fewshot=2"]
    tried: dict[str, tuple[list[str], list[str]]] = {
        "name": (answer, ["task.name=own_cloze"]),
        "tasks": (answer, ["task.tasks=[own_cloze]"]),
        "num_fewshot": (answer, ["task.num_fewshot=2"]),
        "metric": (answer, ["task.metric='exact_match,loose'"]),
        "chat": (answer, ["task.chat=true"]),
        "multiturn": (chat, ["task.multiturn=false"]),
        "system": (answer, ["task.system=Hello"]),
        "gen_kwargs": (answer, ["task.gen_kwargs={max_gen_toks: 5}"]),
        "window": (pages, ["task.window=600"]),
        "head": (pages, ["task.head=5"]),
    }
    for option, (on, line) in tried.items():
        assert keys(compose(*on, *line)).isdisjoint(keys(compose(*on))), option
    options = {str(name) for name in composed("task=lm_eval").task if name != "_target_"}
    rest = options - tried.keys() - {"metadata"}  # for tasks that make their own data, whose content is in the key
    assert all(listed(f"task.{name}", MAY_NOT_MATTER) for name in rest), rest
    for file in (CONF / "task").glob("*.yaml"):
        kept = yaml.safe_load(file.read_text())
        if kept["_target_"] == "mikv.lm.Harness":
            assert kept.keys() - {"_target_", "allow_code_execution"} <= options, file


def written(history: list[dict[str, str]], **_: Any) -> str:
    """A chat template."""
    return "|".join(f"{message['role']}: {message['content']}" for message in history)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"([0-9])"', '"([0-8])"'),
        ("ignore_case: true", "ignore_case: false"),
        ('doc_to_target: "{{answer}}"', 'doc_to_target: "{{answer}}!"'),
    ],
    ids=["filter", "metric", "gold"],
)
def test_how_an_answer_is_judged_is_in_the_key(old: str, new: str, own: tuple[Path, Path], tmp_path: Path) -> None:
    """Of a task in lm-eval's format: filters, metrics, gold answers. The prompts are the same."""
    tasks, folder = own
    text = (tasks / "own_answer.yaml").read_text()
    assert old in text
    found = []
    for name, content in (("before", text), ("again", text), ("after", text.replace(old, new))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "own_answer.yaml").write_text(content)
        lines = [f"task.include={tmp_path / name}", f"task.data_dir={folder}", "task.num_fewshot=0", "task.limit=2"]
        found.append(keys(compose("model=tiny-random", "task=lm_eval", "task.name=own_answer", *lines)))
    assert found[0] == found[1]
    assert found[0].isdisjoint(found[2])


def test_what_only_metrics_read_of_a_document_is_in_the_key(own: tuple[Path, Path], tmp_path: Path) -> None:
    """IFEval's arguments, alternative answers: fields that stand in no prompt."""
    tasks, folder = own
    found = []
    for name in ("before", "after"):
        shutil.copytree(folder, tmp_path / name)
        for file in (tmp_path / name).rglob("*.jsonl"):
            rows = [json.loads(line) | {"also": name} for line in file.read_text().splitlines()]
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        lines = [f"task.include={tasks}", f"task.data_dir={tmp_path / name}", "task.limit=2"]
        found.append(keys(compose("model=tiny-random", "task=lm_eval", "task.name=own_answer", *lines)))
    assert found[0].isdisjoint(found[1])


@pytest.mark.parametrize(
    ("task", "file", "field", "value"),
    [
        ("tensor_trust", "system_prompt/tensor_trust_extraction.jsonl", "access_code", "another"),
        ("sys_ifeval", "system_prompt/sys_ifeval.jsonl", "kwargs", [{"relation": "at most", "num_words": 3}, {}]),
        ("context_qa", "xquad_en/xquad_en.jsonl", "answers", {"text": ["1650", "1651"], "answer_start": [3, 3]}),
        ("memo_trap", "memo_trap/1-proverb-ending.jsonl", "answer", 1),
        ("ruler_file", "ruler_4096/niah_multikey_3_first200.jsonl", "outputs", [own_rows.NEEDLES[3][1]]),
        ("key_value", "lost_in_the_middle/kv_retrieval_75_keys_first200.jsonl", "value", "x"),
    ],
)
def test_gold_answers_and_what_scoring_reads_are_in_the_key(
    task: str, file: str, field: str, value: Any, tmp_path: Path
) -> None:
    """The prompt is the same, the right answer another one: a stored score would be stale."""
    before = own_rows.write(tmp_path / "before")
    edited = [dict(row) for row in own_rows.ROWS[file]]
    edited = [row | {field: value} if row[field] != value else row | {field: 0} for row in edited]
    if task == "key_value":
        edited = [
            row | {"ordered_kv_records": [[k, "x" if k == row["key"] else v] for k, v in row["ordered_kv_records"]]}
            for row in edited
        ]
    after = own_rows.write(tmp_path / "after", {file: edited})
    base = ["model=tiny-random", f"task={task}", "task.limit=2"]
    one, two = (keys(compose(*base, f"task.data_dir={folder}")) for folder in (before, after))
    assert one.isdisjoint(two)


@dataclass(frozen=True)
class Decaying(Policy):
    """A policy of one's own: a field that the project does not know."""

    half_life: int = 32


def test_a_field_that_a_subclass_of_a_policy_adds_is_in_the_key() -> None:
    plain = policy("mikv")
    fields = {name: getattr(plain, name) for name in plain.__dataclass_fields__}
    one, two = Decaying(**fields), Decaying(**fields, half_life=64)
    assert len({json.dumps(p.identity()) for p in (plain, one, two)}) == 3
    assert replace(one, name="other", label="other").identity() == one.identity()


def test_an_identity_of_what_is_not_known_is_refused() -> None:
    """Better no key than one that says nothing of an object's state."""
    with pytest.raises(TypeError, match="can't be a part of a record's key"):
        identity_of({"scores": torch.zeros(2)})
    assert identity_of({"a": (1, {2}, Path("x"))}) == {"a": [1, [2], "x"]}


def test_the_groups_are_all_looked_at() -> None:
    groups = {folder.name for folder in CONF.iterdir() if folder.is_dir()}
    assert groups == {"model", "policy", "panel", "task", "judge", *STATEMENTS}
    for group in STATEMENTS[:2]:
        base = compose("model=tiny-random", "task.lines=2", "task.limit=1")
        for file in (CONF / group).glob("*.yaml"):
            assert keys(compose("model=tiny-random", "task.lines=2", "task.limit=1", f"{group}={file.stem}")) == keys(base)
    assert OmegaConf.is_config(composed().launcher)
