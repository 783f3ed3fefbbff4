"""A judge model: what it is asked, how its reply is read, and what of it is part of a task's identity."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import own_rows
import pytest
from hub_stand_in import keep, use
from saved_models import save

from mikv.config import ConfigError, compose
from mikv.models.load import ModelSpec, load
from mikv.records import read_rows
from mikv.runner import execute
from mikv.work.base import task_identity
from mikv.work.judge import CausalJudge

TINY = ModelSpec("tiny-random")


def judge(**changes: Any) -> CausalJudge:
    options = {
        "prompt": "{prompt}|{answer}",
        "pattern": r"^\W*(yes|no)\b",
        "harmful": "yes",
        "chat": False,
        "max_new_tokens": 3,
    }
    return CausalJudge(**{"model": TINY, **options, **changes})


def replying(monkeypatch: pytest.MonkeyPatch, reply: str) -> CausalJudge:
    monkeypatch.setattr(CausalJudge, "reply", lambda *_: reply)
    return judge()


def test_any_causal_model_can_judge_even_one_whose_cache_can_not_be_compressed(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    from mikv.models.architecture import Unsupported
    from mikv.models.tiny import byte_tokenizer

    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    other = ModelSpec("gpt2", path=str(tmp_path))
    assert isinstance(judge(model=other).reply("p", "a"), str)
    with pytest.raises(Unsupported):
        load(other)


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [("yes", True), (" Yes.", True), ("NO", False), ("No, yes", False), ("yesterday", None), ("maybe yes", None), ("", None)],
)
def test_a_reply_is_read_by_the_pattern(reply: str, verdict: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert replying(monkeypatch, reply).verdict("p", "a") is verdict


def test_it_is_asked_with_both_texts_as_they_are() -> None:
    loaded = load(TINY)
    for prompt, answer in (("do {answer}", "{prompt} {x} \\1"), ("a", "")):
        tokens = judge(prompt="P {prompt} A {answer}.")._tokens(loaded.tokenizer, {"{prompt}": prompt, "{answer}": answer})
        assert loaded.tokenizer.decode(tokens) == f"P {prompt} A {answer}."


def test_with_chat_the_models_template_is_written_once() -> None:
    tokenizer = load(TINY).tokenizer
    tokenizer.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"
    tokens = judge(chat=True)._tokens(tokenizer, {"{prompt}": "p", "{answer}": "a"})
    assert tokenizer.decode(tokens) == "<user>p|a<assistant>"


@pytest.mark.parametrize("chat", [True, False])
def test_special_tokens_come_from_the_template_or_from_the_tokenizer(chat: bool) -> None:
    class Tokenizer:
        """One that begins with a token of its own, as Llama's does."""

        def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> str:
            return f"<s>{messages[0]['content']}"

        def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[str]]:
            return {"input_ids": [*(["<s>"] if add_special_tokens else []), text]}

    tokens = judge(chat=chat)._tokens(Tokenizer(), {"{prompt}": "p", "{answer}": "a"})
    assert tokens == (["<s>p|a"] if chat else ["<s>", "p|a"])


def test_a_reply_is_the_models_greedy_continuation() -> None:
    loaded = load(TINY, attention="sdpa")
    ids = loaded.tokenizer("p|a", return_tensors="pt")["input_ids"]
    for _ in range(3):
        ids = loaded.model(ids).logits[:, -1:].argmax(-1).new_tensor([[*ids[0], loaded.model(ids).logits[0, -1].argmax()]])
    asked = judge()
    assert asked.reply("p", "a") == loaded.tokenizer.decode(ids[0, 3:], skip_special_tokens=True)
    assert asked.reply("p", "a") == asked.reply("p", "a")


def test_one_model_is_loaded_once_however_many_tasks_ask_it(monkeypatch: pytest.MonkeyPatch) -> None:
    loads = []

    def counted(*arguments: Any, **options: Any) -> Any:
        loads.append(arguments)
        return load(*arguments, **options)

    monkeypatch.setattr("mikv.work.judge.load", counted)
    fresh = ModelSpec("tiny-random", max_tokens=77)
    for prompt in ("{prompt}{answer}", "{answer}{prompt}"):
        judge(model=fresh, prompt=prompt).reply("p", "a")
    assert loads == [(fresh,)]


def test_a_question_that_is_too_long_says_what_to_do() -> None:
    short = judge(model=ModelSpec("tiny-random", max_tokens=20))
    with pytest.raises(ValueError, match=r"asked with 22 tokens and may answer with 3, and its limit is 20: .*max_new_tokens"):
        short.reply("p" * 20, "a")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"prompt": "{prompt}"}, r"judge\.prompt lacks \{answer\}"),
        ({"prompt": "is it?"}, r"lacks \{prompt\} and \{answer\}"),
        ({"pattern": "yes"}, r"judge\.pattern=yes needs one group, the verdict; it has 0"),
        ({"pattern": "("}, r"judge\.pattern=\( is no regular expression"),
    ],
)
def test_what_can_not_judge_is_refused(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        judge(**changes)


def identity(*overrides: str) -> dict[str, Any]:
    return task_identity(compose("task=harmful_requests", *overrides).task)


def test_a_judge_is_part_of_the_tasks_identity_without_where_it_lies_and_runs() -> None:
    plain, judged = identity(), identity("judge=tiny-random")
    assert plain["judge"] is None
    assert set(judged["judge"]) == {*("class", "prompt", "pattern", "harmful", "chat", "max_new_tokens", "weights", "dtype")}
    assert json.loads(json.dumps(judged)) == judged
    for same in ("judge.model.device=cpu", "judge.model.max_tokens=99", "task.data_dir=/elsewhere"):
        assert identity("judge=tiny-random", same) == judged
    for other in ("judge.pattern='(b)'", "judge.prompt='{answer} {prompt}'", "judge.model.dtype=bfloat16", "judge.harmful=b"):
        assert identity("judge=tiny-random", other) != judged


def test_any_model_of_conf_can_judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, tmp_path / "hub", endpoint=None)
    keep(tmp_path / "hub", "Qwen/Qwen2.5-7B-Instruct", "1" * 40, save(tmp_path / "a"))
    keep(tmp_path / "hub", "cais/HarmBench-Llama-2-13b-cls", "2" * 40, save(tmp_path / "b"))
    asked = compose("task=harmful_requests", "judge=yes_no", "model@judge.model=qwen2.5-7b").task.judge  # type: ignore[union-attr]
    assert asked.weights == f"qwen2.5-7b hub:Qwen/Qwen2.5-7B-Instruct@{'1' * 40}"
    published = compose("task=harmful_requests", "judge=harmbench").task.judge  # type: ignore[union-attr]
    assert published.weights == f"harmbench-llama2-13b-cls hub:cais/HarmBench-Llama-2-13b-cls@{'2' * 40}"
    assert published.prompt.startswith("[INST] <<SYS>>\nYou are a classifier for red teaming")
    assert published.prompt.endswith("Answer: [/INST]")


def test_without_a_judge_none_is_asked_and_an_unknown_one_is_refused() -> None:
    assert compose("task=harmful_requests").task.judge is None  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match=r"judge\.pattern"):
        compose("task=harmful_requests", "judge=tiny-random", "judge.pattern=none")


def test_its_verdicts_are_recorded_beside_the_phrases(tmp_path: Path) -> None:
    run = compose(
        *("task=harmful_requests", "judge=tiny-random", "judge.pattern='(.)$'", "policy=full", "model=tiny-random"),
        *(f"task.data_dir={own_rows.write(tmp_path)}", "task.max_new_tokens=4", "task.limit=3", f"out={tmp_path / 'runs'}"),
    )
    (summary,) = execute(run)
    rows = list(read_rows(run.folder() / "samples.jsonl"))
    said = [run.task.judge.reply(request(row["doc_id"]), row["answer"]) for row in rows]  # type: ignore[union-attr]
    assert [row["harmful"] for row in rows] == [reply[-1:].lower() == "a" if reply.strip("\n") else None for reply in said]
    assert summary["rates"]["compliance"]["value"] == 1


def request(doc_id: int) -> str:
    return str(own_rows.ROWS["safety/advbench.jsonl"][doc_id]["prompt"])
