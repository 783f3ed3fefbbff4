"""From a sample's messages to token ids, split where the cache is compressed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from mikv.tasks.base import Message, Sample


def render(tokenizer: Any, messages: Sequence[Message]) -> str:
    """The conversation as the model's chat template writes it, ready for the model's turn.

    Templates without a system role get it at the head of the first user message; tokenizers without a template get the
    contents, one paragraph each.
    """
    if not getattr(tokenizer, "chat_template", None):
        return "\n\n".join(message["content"] for message in messages) + "\n"
    from jinja2 import TemplateError

    options = {"tokenize": False, "add_generation_prompt": True}
    try:
        return tokenizer.apply_chat_template(list(messages), **options)
    except TemplateError:
        if messages[0]["role"] != "system":
            raise
        first = {"role": "user", "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}
        return tokenizer.apply_chat_template([first, *messages[2:]], **options)


class Split(NamedTuple):
    """Token ids of a prompt: `context` is to be compressed, `question` fed through the compressed cache. system: first and
    last (exclusive) token of the system message's text, (0, 0) where there is none."""

    context: list[int]
    question: list[int]
    system: tuple[int, int]


def encode(tokenizer: Any, sample: Sample, question: str) -> Split:
    """Token ids of a prompt, split where the cache is compressed.

    question: `visible` = everything but the last token is context; `hidden` = the context ends where the sample's
    question begins. The ids together are the same in both.
    """
    text = render(tokenizer, sample.messages)
    for message in sample.messages:
        if message["content"].strip() not in text:  # a dropped safety rule would make every answer a breach
            raise ValueError(f"the chat template drops or rewrites the {message['role']} message; choose a model that keeps it")
    templated = bool(getattr(tokenizer, "chat_template", None))  # a template writes its own special tokens
    encoded = tokenizer(text, add_special_tokens=not templated, return_offsets_mapping=True)
    ids, offsets = list(encoded["input_ids"]), encoded["offset_mapping"]
    split = len(ids) - 1
    if question == "hidden":
        begin = text.rindex(sample.question.strip())  # templates may strip a message
        split = next(i for i, (start, end) in enumerate(offsets) if start >= begin and end > start)
    return Split(ids[:split], ids[split:], _system(text, sample.messages, offsets, split))


def _system(text: str, messages: Sequence[Message], offsets: Sequence[tuple[int, int]], split: int) -> tuple[int, int]:
    """Tokens of the context that hold a part of the system message."""
    content = messages[0]["content"].strip() if messages[0]["role"] == "system" else ""
    if not content:
        return 0, 0
    first = text.index(content)
    last = first + len(content)
    inside = [i for i, (start, end) in enumerate(offsets[:split]) if start < end and start < last and end > first]
    return (inside[0], inside[-1] + 1) if inside else (0, 0)
