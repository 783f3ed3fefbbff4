"""From a sample's messages to token ids, split where the cache is compressed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mikv.tasks.base import Message, Sample

QUESTION = ("visible", "hidden")


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


def encode(tokenizer: Any, sample: Sample, question: str) -> tuple[list[int], list[int]]:
    """Token ids of a prompt: (context to be compressed, question to be fed through the compressed cache).

    question: `visible` = everything but the last token is context; `hidden` = the context ends where the sample's
    question begins. The ids together are the same in both.
    """
    text = render(tokenizer, sample.messages)
    for message in sample.messages:
        if message["content"].strip() not in text:  # a dropped safety rule would make every answer a breach
            raise ValueError(f"the chat template drops or rewrites the {message['role']} message; choose a model that keeps it")
    templated = bool(getattr(tokenizer, "chat_template", None))  # a template writes its own special tokens
    encoded = tokenizer(text, add_special_tokens=not templated, return_offsets_mapping=True)
    ids = list(encoded["input_ids"])
    if question == "visible":
        return ids[:-1], ids[-1:]
    begin = text.rindex(sample.question.strip())  # templates may strip a message
    split = next(i for i, (start, end) in enumerate(encoded["offset_mapping"]) if start >= begin and end > start)
    return ids[:split], ids[split:]
