"""From messages to token ids: chat templates of every kind, and the split where the cache is compressed."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from mikv.models.tiny import byte_tokenizer
from mikv.tasks.base import Message, Sample
from mikv.tasks.lines import GuardedRecall, LineRecall
from mikv.tasks.prompting import encode, render

CHAT = "{% for m in messages %}[{{ m.role }}]{{ m.content }}[/]{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
STRIPPING = CHAT.replace("m.content", "m.content | trim")
# as Mistral's and Gemma's: the system role is an error
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHAT
BROKEN = "{{ raise_exception('only on Sundays') }}"

SYSTEM: Message = {"role": "system", "content": "Be brief."}
USER: Message = {"role": "user", "content": "Who are you?"}


def tokenizer(template: str | None = None) -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize(
    ("template", "wanted"),
    [
        (None, "Be brief.\n\nWho are you?\n"),
        (CHAT, "[system]Be brief.[/][user]Who are you?[/][assistant]"),
        (NO_SYSTEM, "[user]Be brief.\n\nWho are you?[/][assistant]"),
    ],
)
def test_a_conversation_is_written_as_the_models_template_does(template: str | None, wanted: str) -> None:
    assert render(tokenizer(template), [SYSTEM, USER]) == wanted


def test_later_turns_stay_when_the_system_message_moves() -> None:
    later: list[Message] = [{"role": "assistant", "content": "A model."}, {"role": "user", "content": "Which?"}]
    wanted = "[user]Be brief.\n\nWho are you?[/][assistant]A model.[/][user]Which?[/][assistant]"
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who are you?"}, *later]
    before = copy.deepcopy(messages)
    assert render(tokenizer(NO_SYSTEM), messages) == wanted
    assert messages == before  # the sample is another policy's too


@pytest.mark.parametrize("messages", [[USER], [SYSTEM, USER]])
def test_a_template_that_fails_for_another_reason_is_not_hushed_up(messages: list[Message]) -> None:
    with pytest.raises(Exception, match="only on Sundays"):
        render(tokenizer(BROKEN), messages)


TEMPLATES = pytest.mark.parametrize("template", [None, CHAT, STRIPPING, NO_SYSTEM], ids=["none", "chat", "strip", "no system"])
SAMPLES = [LineRecall(lines=4).samples(1, 0)[0], *GuardedRecall(lines=4).samples(2, 0)]


@TEMPLATES
@pytest.mark.parametrize("sample", SAMPLES, ids=["plain", "guarded", "open"])
def test_visible_and_hidden_are_the_same_ids_split_at_two_places(sample: Sample, template: str | None) -> None:
    """T5: the axis is where the cache is compressed, not what the model reads."""
    chat = tokenizer(template)
    context, held_back, _ = encode(chat, sample, "visible")
    before, question, _ = encode(chat, sample, "hidden")
    assert context + held_back == before + question == ids_of(chat, render(chat, sample.messages))
    assert len(held_back) == 1
    asked = sample.question.strip()
    assert chat.decode(question).startswith(asked)
    assert asked not in chat.decode(before)
    assert chat.decode(before).endswith(">\n\n")  # the whole record


@pytest.mark.parametrize(
    ("template", "after"),
    [(None, " \n"), (CHAT, " [/][assistant]"), (STRIPPING, "[/][assistant]")],
    ids=["none", "chat", "strip"],
)
def test_the_question_ends_the_prompt(template: str | None, after: str) -> None:
    """T5: what is fed last is the question, then only what the template adds for the model's turn."""
    chat = tokenizer(template)
    sample = SAMPLES[0]
    assert chat.decode(encode(chat, sample, "hidden")[1]) == sample.question.strip() + after


def test_a_question_whose_text_stands_in_the_context_too_is_split_at_its_last_place() -> None:
    sample = Sample(0, [{"role": "user", "content": "Why? Because. Why?"}], "Why?", "")
    chat = tokenizer(CHAT)
    assert chat.decode(encode(chat, sample, "hidden")[0]) == "[user]Why? Because. "


def with_start_token(template: str | None) -> Any:
    """A tokenizer that writes a start token by itself, as Llama's does."""
    from tokenizers.processors import TemplateProcessing

    chat = tokenizer(template)
    chat.backend_tokenizer.post_processor = TemplateProcessing(single="<|end|> $A", special_tokens=[("<|end|>", 256)])
    return chat


@pytest.mark.parametrize(("template", "starts"), [(None, 1), ("<|end|>" + CHAT, 1), (CHAT, 0)])
def test_the_start_token_is_written_once(template: str | None, starts: int) -> None:
    """A template writes its own special tokens; a second start token is a prompt that no model was trained on."""
    chat = with_start_token(template)
    for where in ("visible", "hidden"):
        context, question, _ = encode(chat, SAMPLES[0], where)
        assert (context + question).count(256) == starts
        assert context[:1] == [256] * starts or not starts


@TEMPLATES
@pytest.mark.parametrize("where", ["visible", "hidden"])
def test_the_system_message_is_found_in_the_context(where: str, template: str | None) -> None:
    chat = tokenizer(template)
    split = encode(chat, Sample(0, [{"role": "system", "content": " Be brief.\n"}, USER], USER["content"], ""), where)
    begin, end = split.system
    assert chat.decode(split.context[begin:end]) == "Be brief."


def test_without_a_system_message_no_token_is_one() -> None:
    assert encode(tokenizer(CHAT), SAMPLES[0], "visible").system == (0, 0)


def test_characters_of_several_bytes_do_not_move_the_split() -> None:
    sample = Sample(0, [{"role": "user", "content": "Grüße, 世界 👋. Ça va?"}], "Ça va?", "")
    chat = tokenizer(CHAT)
    before, question, _ = encode(chat, sample, "hidden")
    assert chat.decode(before) == "[user]Grüße, 世界 👋. "
    assert chat.decode(question).startswith("Ça va?")


def test_a_sample_whose_last_message_does_not_end_with_the_question_is_refused() -> None:
    with pytest.raises(ValueError, match="sample 7: the last message must end with the question"):
        Sample(7, [USER], "Where?", "")


def test_a_template_that_drops_the_system_message_is_refused() -> None:
    """Guarded recall without its rule would report a breach for every answer."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"
    messages = [{"role": "system", "content": "rule"}, {"role": "user", "content": "text question"}]
    with pytest.raises(ValueError, match="drops or rewrites the system message"):
        encode(tokenizer, Sample(0, messages, "question", "x"), "visible")
