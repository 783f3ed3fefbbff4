"""lm-eval's tasks as runs: a panel in one pass, records, resuming, and what is refused or flagged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from own_tasks import YAML, write
from saved_models import save
from transformers import AutoTokenizer

from mikv.config import policy
from mikv.engine import Engine
from mikv.lm import Harness, humaneval
from mikv.lm.harness import save_tokenizer
from mikv.lm.humaneval import pass_at_1
from mikv.models.load import ModelSpec
from mikv.models.tiny import byte_tokenizer
from mikv.records import read_rows
from mikv.run import Run
from mikv.runner import RunError, execute
from mikv.tasks import sandbox

MODEL = ModelSpec("tiny-random")
PANEL = (policy("full"), policy("mikv"), policy("uniform", {"tier.bits": 2}), policy("h2o", {"keep": 0.1}))


def harness(own: tuple[Path, Path], name: str, **options: Any) -> Harness:
    return Harness(name, **({"include": str(own[0]), "data_dir": str(own[1])} | options))


def run(task: Harness, out: Path, panel: Any = PANEL, **options: Any) -> Run:
    return Run(MODEL, tuple(panel), task, **({"limit": None, "out": out, "batch_size": 3} | options))


def records(done: Run) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["label"], row["sample"]): row for row in read_rows(done.folder() / "samples.jsonl")}


def test_one_pass_serves_the_panel_and_each_policy_is_as_alone(own: tuple[Path, Path], tmp_path: Path) -> None:
    for name in ("own_group", "own_answer", "own_cloze", "own_pages"):
        task = harness(own, name, window=96, head=40)
        together = run(task, tmp_path)
        summary = execute(together)
        mine = records(together)
        assert len(mine) == len(PANEL) * summary[0]["samples"]
        for lossy in PANEL[1:]:
            alone = run(task, tmp_path / "alone", [PANEL[0], lossy])
            execute(alone)
            for place, row in records(alone).items():
                other = mine[place]
                assert row["score"] == other["score"]
                assert row["kl"] == pytest.approx(other["kl"], abs=5e-3)
                assert (row["nbytes"], row["compressed_tokens"]) == (other["nbytes"], other["compressed_tokens"])


@pytest.mark.parametrize("name", ["own_choice", "own_letters", "own_answer", "own_cloze", "own_pages"])
def test_compression_is_felt_and_the_full_cache_is_its_own_twin(own: tuple[Path, Path], tmp_path: Path, name: str) -> None:
    """A 2-bit cache moves every document's log-likelihoods or its fidelity: nothing is scored in one forward pass."""
    asked = run(harness(own, name, window=96, head=40), tmp_path)
    full, *others = execute(asked)
    assert (full["kl"], full["agreement"], full["nll_change"]) == (0, 1, 0)
    assert full["size_percent"] == pytest.approx(100)
    for row in records(asked).values():
        if row["policy"] == "uniform":
            assert row["kl"] > 1e-3
    for row in others:
        assert row["kl"] > 1e-3
        assert row["size_percent"] < 70
        assert row["exercised"] == row["samples"]


def test_summaries_hold_lm_evals_scores_by_task_and_group(own: tuple[Path, Path], tmp_path: Path) -> None:
    asked = run(harness(own, "own_group"), tmp_path)
    for row in execute(asked):
        assert (row["metric"], row["n"], row["samples"]) == ("acc", 18, 18)
        parts = row["by_task"]
        assert parts["own_group"]["acc,none"] == pytest.approx(row["value"])
        assert row["value"] == pytest.approx((parts["own_choice"]["acc,none"] + parts["own_letters"]["acc,none"]) / 2)
        mine = [r for r in records(asked).values() if r["label"] == row["label"]]
        assert row["value"] == pytest.approx(sum(r["score"] for r in mine) / 18)
    for row in execute(run(harness(own, "own_answer"), tmp_path)):
        assert row["metric"] == "exact_match strict"
        assert set(row["scores"]) == {"exact_match strict", "exact_match loose"}
    for row in execute(run(harness(own, "both", tasks=["own_choice", "own_cloze"]), tmp_path)):
        assert set(row["scores"]) == {"own_choice acc", "own_choice acc_norm", "own_cloze perplexity", "own_cloze acc"}
        assert (row["metric"], row["n"], row["samples"]) == ("own_choice acc", 9, 16)


def test_a_chosen_metric_decides_and_perplexities_are_better_when_lower(own: tuple[Path, Path], tmp_path: Path) -> None:
    (row,) = execute(run(harness(own, "own_choice", metric="acc_norm,none"), tmp_path, PANEL[:1]))
    assert row["metric"] == "acc_norm"
    assert not row["lower_is_better"]
    (row,) = execute(run(harness(own, "own_pages"), tmp_path, PANEL[:1]))
    assert row["metric"] == "word_perplexity"
    assert row["lower_is_better"]
    assert row["ci95"] is row["stderr"] is None
    with pytest.raises(ValueError, match=r"task\.metric=accuracy: there are own_choice:acc,none, own_choice:acc_norm,none"):
        run(harness(own, "own_choice", metric="accuracy"), tmp_path).open()


@pytest.mark.parametrize(
    ("name", "options", "kind"),
    [
        ("own_choice", {}, "outcome"),
        ("own_group", {}, "outcome"),
        ("own_answer", {}, "outcome"),
        ("own_cloze", {"metric": "acc,none"}, "outcome"),
        ("own_cloze", {"metric": "perplexity,none"}, "number"),
        ("own_pages", {}, "number"),
        ("own_scored", {}, "number"),  # its own function may give anything, under any name
    ],
)
def test_lm_evals_own_code_gives_outcomes_and_a_tasks_own_may_not(
    own: tuple[Path, Path], name: str, options: dict[str, Any], kind: str
) -> None:
    assert harness(own, name, **options).open(MODEL, 2, 0, "visible").kind == kind


def test_a_score_that_is_a_share_has_the_interval_of_a_number(own: tuple[Path, Path], tmp_path: Path) -> None:
    """All are 1, as it happens: as outcomes they would have Wilson's interval and a test."""
    for row in execute(run(harness(own, "own_scored"), tmp_path, PANEL[:2])):
        assert (row["value"], row["ci95"], row["mcnemar_p"], row["kind"]) == (1.0, None, None, "number")


def test_documents_that_ask_about_one_text_are_a_cluster(own: tuple[Path, Path], tmp_path: Path) -> None:
    """LongBench's and SQuAD's `context`, RACE's `article`, ...; other tasks have none."""
    asked = run(harness(own, "own_texts"), tmp_path, PANEL[:2])
    execute(asked)
    names = [row["cluster"] for (label, _), row in sorted(records(asked).items()) if label == "full"]
    assert (len(names), len(set(names))) == (18, 3)
    assert "amber" not in str(names)
    plain = run(harness(own, "own_choice"), tmp_path, PANEL[:2])
    execute(plain)
    assert not any("cluster" in row for row in records(plain).values())


def test_a_finished_run_computes_nothing_and_a_larger_one_goes_on(
    own: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = execute(run(harness(own, "own_group"), tmp_path, limit=4, name="x"))
    asked: list[int] = []
    score = Engine.score
    monkeypatch.setattr(Engine, "score", lambda self, s, *rest: (asked.append(len(s)), score(self, s, *rest))[1])
    again = execute(run(harness(own, "own_group"), tmp_path, limit=4, name="x"))
    assert asked == []
    for one, other in zip(first, again, strict=True):
        assert one == other
    execute(run(harness(own, "own_group"), tmp_path, limit=6, name="x"))
    assert sum(asked) == 4
    assert len(records(run(harness(own, "own_group"), tmp_path, limit=6, name="x"))) == len(PANEL) * 12


def test_keys_follow_what_is_asked_and_not_where_the_data_lie(own: tuple[Path, Path], tmp_path: Path) -> None:
    def asked(**options: Any) -> list[str | None]:
        return [unit.asked for unit in run(harness(own, "own_answer", **options), tmp_path).open().units()]

    base = asked()
    copy = tmp_path / "elsewhere"
    for file in ("test.jsonl", "train.jsonl"):
        (copy / file).parent.mkdir(exist_ok=True)
        (copy / file).write_bytes((own[1] / file).read_bytes())
    assert asked(data_dir=str(copy)) == base
    for other in ({"num_fewshot": 2}, {"system": "Be brief."}, {"gen_kwargs": {"max_gen_toks": 7}}):
        assert not set(asked(**other)) & set(base)
    (copy / "own_answer.yaml").write_text(YAML["own_answer"].replace("version: 1.0", "version: 1.1"))
    assert not set(asked(include=str(copy))) & set(base)
    pages = [run(harness(own, "own_pages", head=h), tmp_path).open().units()[0].asked for h in (1, 2)]
    assert pages[0] != pages[1]


def test_a_subset_takes_two_documents_of_each_task(own: tuple[Path, Path], tmp_path: Path) -> None:
    units = run(harness(own, "own_group", subset="tiny"), tmp_path).open().units()
    assert sorted(unit.name for unit in units) == ["own_choice/0", "own_choice/1", "own_letters/0", "own_letters/1"]
    assert len(run(harness(own, "own_group", subset="tiny"), tmp_path, limit=1).open().units()) == 2


def test_answers_that_run_into_the_limit_are_flagged(
    own: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = harness(own, "own_answer", gen_kwargs={"until": [], "max_gen_toks": 3})
    summary = execute(run(task, tmp_path))
    assert all(row["unended"] >= 6 for row in summary)
    assert "7 answers each, so many ran into the limit of new tokens" in capsys.readouterr().out


def test_a_context_of_one_token_exercises_nothing_and_fails(own: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(RunError, match="was never exercised"):
        execute(run(harness(own, "own_bare"), tmp_path, [PANEL[0], policy("mikv")]))


def test_sampled_answers_follow_the_seed(own: tuple[Path, Path], tmp_path: Path) -> None:
    task = harness(own, "own_answer", gen_kwargs={"do_sample": True, "temperature": 1.0, "until": [], "max_gen_toks": 12})

    def answers(seed: int, out: str, batch_size: int = 3) -> dict[Any, str]:
        done = run(task, tmp_path / out, PANEL[:2], seed=seed, batch_size=batch_size)
        execute(done)
        return {place: row["answer"] for place, row in records(done).items()}

    first = answers(0, "a")
    assert answers(0, "b", batch_size=1) == first
    assert answers(1, "c") != first
    greedy = run(harness(own, "own_answer", gen_kwargs={"until": [], "max_gen_toks": 12}), tmp_path / "g", PANEL[:2])
    execute(greedy)
    assert {place: row["answer"] for place, row in records(greedy).items()} != first


@pytest.mark.parametrize(
    ("name", "options", "more", "message"),
    [
        ("own_choice", {}, {"question": "hidden"}, "do not say where their question begins"),
        ("own_choice", {"subset": "small"}, {}, r"task\.subset=small: choose full or tiny"),
        ("own_pages", {"window": 10, "head": 11}, {}, r"task\.head=11"),
        ("own_code", {}, {}, "not in this project's confinement"),
        ("own_code", {"allow_code_execution": True}, {}, "not in this project's confinement"),
    ],
)
def test_what_can_not_be_done_is_refused(
    own: tuple[Path, Path], tmp_path: Path, name: str, options: dict[str, Any], more: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(harness(own, name, **options), tmp_path, **more).open()


@pytest.mark.parametrize(
    ("gen_kwargs", "message"),
    [({"num_beams": 4}, "num_beams=4 is not supported"), ({"max_gen_toks": 5000}, "max_gen_toks=5000: the model's limit")],
)
def test_generation_that_the_engine_can_not_do_is_refused_before_it_starts(
    own: tuple[Path, Path], tmp_path: Path, gen_kwargs: dict[str, Any], message: str
) -> None:
    with pytest.raises(RunError, match=message):
        execute(run(harness(own, "own_answer", gen_kwargs=gen_kwargs), tmp_path))


PROBLEM = {
    "task_id": "own/0",
    "prompt": 'def add(a, b):\n    """Sum."""\n',
    "test": "def check(candidate):\n    assert candidate(2, 3) == 5\n",
    "entry_point": "add",
}


def test_pass_at_1_runs_the_tests() -> None:
    assert pass_at_1(PROBLEM, ["    return a + b\n"]) == {"pass@1": 1.0}
    assert pass_at_1(PROBLEM, ["    return a - b\n"]) == {"pass@1": 0.0}
    assert pass_at_1(PROBLEM, [["    return a + b\n", "    return 5\n", "    while True: pass"][:2]]) == {"pass@1": 1.0}
    assert pass_at_1(PROBLEM, ["    raise SystemExit(0)\n"]) == {"pass@1": 0.0}


@pytest.mark.usefixtures("own")
def test_generated_code_runs_only_when_it_is_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "HumanEval.jsonl", [PROBLEM])
    ran: list[str] = []
    real = humaneval.run_program
    monkeypatch.setattr(humaneval, "run_program", lambda source: (ran.append(source), real(source))[1])
    options = {"data_dir": str(tmp_path), "gen_kwargs": {"max_gen_toks": 8}}
    with pytest.raises(ValueError, match="allow_code_execution=true"):
        run(Harness("humaneval", **options), tmp_path).open()
    assert ran == []
    (row,) = execute(run(Harness("humaneval", allow_code_execution=True, **options), tmp_path, PANEL[:1]))
    assert (row["metric"], row["value"]) == ("pass@1", 0.0)
    assert len(ran) == 1
    assert ran[0].startswith(PROBLEM["prompt"])
    assert ran[0].endswith("check(add)")


@pytest.mark.parametrize("allowed", [False, "yes", 1])
def test_generated_code_is_refused_before_its_data_are_looked_for(tmp_path: Path, allowed: Any) -> None:
    with pytest.raises(ValueError, match="allow_code_execution=true"):
        run(Harness("humaneval", allow_code_execution=allowed, data_dir=str(tmp_path / "nowhere")), tmp_path).open()


@pytest.mark.usefixtures("own")
def test_where_generated_code_can_not_be_confined_the_user_must_insist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "LAYERS", ())
    write(tmp_path / "HumanEval.jsonl", [PROBLEM])
    options: dict[str, Any] = {"data_dir": str(tmp_path), "gen_kwargs": {"max_gen_toks": 8}}
    with pytest.raises(sandbox.ConfinementError, match="allow_code_execution=unconfined"):
        run(Harness("humaneval", allow_code_execution=True, data_dir=str(tmp_path / "nowhere")), tmp_path).open()
    try:
        with pytest.warns(RuntimeWarning, match="generated programs may reach the network"):
            (row,) = execute(run(Harness("humaneval", allow_code_execution="unconfined", **options), tmp_path, PANEL[:1]))
        assert (row["metric"], row["value"]) == ("pass@1", 0.0)
    finally:
        with pytest.raises(sandbox.ConfinementError):  # not the next run's
            run(Harness("humaneval", allow_code_execution=True, **options), tmp_path).open()


def test_a_task_that_loads_the_tokenizer_itself_gets_a_copy_that_names_no_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """lm-eval loads it with trust_remote_code=True."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    config = save(tmp_path / "model") / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"auto_map": {"AutoTokenizer": [None, "own.Own"]}}))
    (tmp_path / "model" / "own.py").write_text("raise RuntimeError('the code was run')")
    with pytest.raises(RuntimeError, match="the code was run"):
        AutoTokenizer.from_pretrained(tmp_path / "model", trust_remote_code=True)
    save_tokenizer(ModelSpec("m", path=str(tmp_path / "model")), str(tmp_path / "copy"))
    copy = AutoTokenizer.from_pretrained(tmp_path / "copy", trust_remote_code=True)
    assert copy("some text").input_ids == byte_tokenizer()("some text").input_ids
