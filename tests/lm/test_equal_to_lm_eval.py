"""With the full cache everything is plain lm-eval's, sample by sample: choices, texts, log-likelihoods, scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
from conftest import prompt
from lm_eval.api.instance import Instance

from mikv.config import policy
from mikv.lm import Harness, PanelLM
from mikv.lm.plain import Samples, evaluate_plain, plain_lm
from mikv.models import load as loading
from mikv.models.load import ModelSpec, load
from mikv.models.tiny import byte_tokenizer
from mikv.records import read_rows
from mikv.run import Run
from mikv.runner import execute

# What a float32 model's 16-bit cache (float16) may move a log-likelihood by; what bfloat16 may, both ways.
NOISE = {"float32": 0.05, "bfloat16": 2.0}
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if not loop.last %}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}\n<assistant>{% endif %}"
)


def spec(dtype: str = "float32", **more: Any) -> ModelSpec:
    return ModelSpec("tiny-random", dtype=dtype, **more)


def harness(own: tuple[Path, Path], name: str, **options: Any) -> Harness:
    return Harness(name, include=str(own[0]), data_dir=str(own[1]), **options)


def ours(task: Harness, model: ModelSpec, out: Path, limit: int | None = None, seed: int = 3) -> tuple[dict[str, Any], Samples]:
    """Summary and records of a run with the full cache."""
    run = Run(model, (policy("full"),), task, limit, seed=seed, out=out)
    (summary,) = execute(run)
    rows = read_rows(run.folder() / "samples.jsonl")
    return summary, {(row["subtask"], row["doc_id"]): row for row in rows}


def theirs(task: Harness, model: ModelSpec, limit: int | None = None, seed: int = 3, batch: int = 2) -> tuple[Any, Samples]:
    return evaluate_plain(plain_lm(load(model, attention="sdpa"), batch), task, model, limit, seed)


def assert_equal(mine: tuple[dict[str, Any], Samples], plain: tuple[Any, Samples], noise: float, exact: bool = True) -> None:
    summary, rows = mine
    results, samples = plain
    assert rows.keys() == samples.keys()
    for place, row in rows.items():
        other = samples[place]
        for reply, reference in zip(row.get("replies", [[row["answer"]]]), other["replies"], strict=True):
            if isinstance(reference[0], str):
                assert reply == reference
            elif isinstance(reference[0], tuple):
                assert reply[0][0] == pytest.approx(reference[0][0], abs=noise)
                assert not exact or reply[0][1] == reference[0][1]
            else:
                assert reply[0] == pytest.approx(reference[0], rel=1e-3)
        if exact:
            assert row["metrics"].keys() == other["metrics"].keys()
            for key, value in other["metrics"].items():
                assert row["metrics"][key] == pytest.approx(value, rel=1e-2)
    for task, metrics in results.items():
        for key, value in metrics.items():
            if exact and isinstance(value, float):
                assert summary["by_task"][task][key] == pytest.approx(value, rel=1e-2)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("own_choice", {}),
        ("own_choice", {"num_fewshot": 2}),
        ("own_letters", {}),
        ("own_answer", {}),
        ("own_answer", {"num_fewshot": 3, "gen_kwargs": {"until": ["\n", " "], "max_gen_toks": 9}}),
        ("own_answer", {"gen_kwargs": {"until": [], "max_gen_toks": 12, "repetition_penalty": 1.4}}),
        ("own_cloze", {}),
        ("own_group", {}),
    ],
)
def test_scores_are_those_of_plain_lm_eval(own: tuple[Path, Path], tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    task = harness(own, name, **options)
    assert_equal(ours(task, spec(), tmp_path), theirs(task, spec()), NOISE["float32"])


@pytest.mark.parametrize("name", ["own_choice", "own_letters"])
def test_in_bfloat16_log_likelihoods_are_within_its_noise(own: tuple[Path, Path], tmp_path: Path, name: str) -> None:
    task = harness(own, name)
    got, reference = ours(task, spec("bfloat16"), tmp_path), theirs(task, spec("bfloat16"))
    assert_equal(got, reference, NOISE["bfloat16"], exact=False)


@pytest.mark.parametrize("name", ["own_choice", "own_answer"])
@pytest.mark.parametrize(
    "options",
    [
        {"chat": True, "num_fewshot": 2},
        {"chat": True, "num_fewshot": 2, "multiturn": False},
        {"chat": True, "system": "Answer in one word."},
        {"system": "Answer in one word."},
    ],
)
def test_chat_templates_examples_and_system_instructions_are_lm_evals(
    own: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, options: dict[str, Any]
) -> None:
    def templated() -> Any:
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = TEMPLATE
        return tokenizer

    monkeypatch.setattr(loading, "byte_tokenizer", templated)
    task = harness(own, name, **options)
    assert_equal(ours(task, spec(), tmp_path, limit=3), theirs(task, spec(), limit=3), NOISE["float32"])
    bare = harness(own, name)
    work, plain = (t.open(spec(), 1, 0, "visible") for t in (task, bare))
    assert work.units()[0].asked != plain.units()[0].asked


def test_a_system_instruction_is_not_dropped_in_silence(own: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Templates without a system role: lm-eval leaves the message out."""

    def templated() -> Any:
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = (
            "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + TEMPLATE
        )
        return tokenizer

    monkeypatch.setattr(loading, "byte_tokenizer", templated)
    assert harness(own, "own_choice", chat=True).open(spec(), 1, 0, "visible").units()  # its description is left out
    with pytest.raises(ValueError, match=r"drops task\.system"):
        harness(own, "own_choice", chat=True, system="Be brief.").open(spec(), 1, 0, "visible")


@pytest.mark.parametrize("limit", [120, 150])
@pytest.mark.parametrize("name", ["own_choice", "own_answer"])
def test_what_is_too_long_is_cut_on_the_left_as_lm_eval_does_and_counted(
    own: tuple[Path, Path], tmp_path: Path, name: str, limit: int
) -> None:
    task, model = harness(own, name, num_fewshot=2), spec(max_tokens=limit)
    # one at a time: lm-eval pads a batch on the left before it cuts it there
    got, reference = ours(task, model, tmp_path), theirs(task, model, batch=1)
    assert_equal(got, reference, NOISE["float32"])
    summary, rows = got
    assert summary["cut"] == len(rows)
    for row in rows.values():
        assert row["cut_tokens"] > 0
        assert row["prompt_tokens"] <= limit


def test_windows_with_a_head_of_one_are_lm_evals(own: tuple[Path, Path], tmp_path: Path) -> None:
    task = harness(own, "own_pages", window=64, head=1)
    model = spec(max_tokens=64)
    assert_equal(ours(task, model, tmp_path), theirs(task, model), NOISE["float32"])


@pytest.mark.parametrize(("window", "head"), [(64, 32), (96, 10), (2000, 5)])
def test_a_page_in_windows_is_every_token_once_given_its_head(
    own: tuple[Path, Path], tmp_path: Path, window: int, head: int
) -> None:
    """Against one forward pass of the stock model per window."""
    _, rows = ours(harness(own, "own_pages", window=window, head=head), spec(), tmp_path)
    stock = load(spec(), attention="eager")
    for (_, doc_id), row in rows.items():
        page = json.loads((own[1] / "test.jsonl").read_text().splitlines()[doc_id])["page"]
        ids = [256, *stock.tokenizer(page)["input_ids"]]
        total, done = 0.0, 1
        while done < len(ids):
            end = min(len(ids), done + (window if done == 1 else window - head + 1))
            begin = max(0, end - window - 1)
            with torch.inference_mode():
                logits = torch.log_softmax(stock.model(torch.tensor([ids[begin : end - 1]])).logits[0].float(), -1)
            wanted = torch.tensor(ids[done:end])
            total += logits[-len(wanted) :].gather(-1, wanted[:, None]).sum().item()
            done = end
        assert row["replies"][0][0] == pytest.approx(total, rel=1e-3)


def test_through_lm_evals_own_interface_the_last_policy_answers(own: tuple[Path, Path]) -> None:
    """simple_evaluate with a PanelLM: full as plain lm-eval, a lossy policy not."""
    task, loaded = harness(own, "own_group"), load(spec())
    values = {}
    for label, panel in {
        "full": [policy("full")],
        "lossy": [policy("full"), policy("uniform", {"tier.bits": 2})],
    }.items():
        results = lm_eval.simple_evaluate(
            PanelLM(loaded, panel), tasks=task.load(spec(), 0), bootstrap_iters=0, fewshot_random_seed=3
        )
        values[label] = [s["resps"][0][0][0] for s in results["samples"]["own_choice"]]
    plain = [
        sample["replies"][0][0][0] for place, sample in sorted(theirs(task, spec())[1].items()) if place[0] == "own_choice"
    ]
    assert values["full"] == pytest.approx(plain, abs=NOISE["float32"])
    assert max(abs(a - b) for a, b in zip(values["lossy"], plain, strict=True)) > 0.1


@pytest.mark.parametrize(
    ("text", "over"), [("the end", True), ("the end..", True), ("the en", False), ("", False), ("end", True)]
)
def test_an_answer_is_over_when_a_stop_string_of_several_tokens_appears(text: str, over: bool) -> None:
    """It is looked for in two tokens more than it has: it may come in another tokenization."""
    lm = PanelLM(load(spec()))
    stop = lm._stop(lm._until(["end", "", "stop"]))
    assert stop.strings == ("end", "stop", "<|end|>")
    assert stop(list(lm.tok_encode(text))) == over


def test_repeats_are_answers_of_their_own() -> None:
    """lm-eval hands an instance in as often as it repeats; sampled answers differ, greedy ones are computed once."""
    lm = PanelLM(load(spec()), [policy("full")], seed=5)
    text = bytes(prompt(30).context).decode("latin-1")

    def said(**kwargs: Any) -> list[str]:
        instance = Instance("generate_until", {}, (text, {"until": [], "max_gen_toks": 8, **kwargs}), 0, ("x", 0, 3))
        return lm.generate_until([instance] * 3, disable_tqdm=True)

    greedy, sampled = said(do_sample=False), said(do_sample=True, temperature=1.0)
    assert len(set(greedy)) == 1
    assert len(set(sampled)) == 3
    assert said(do_sample=True, temperature=1.0) == sampled
