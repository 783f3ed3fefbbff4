"""A language model that judges answers: any causal LM that the project loads, with a prompt and a pattern from a YAML.

It runs with stock attention and a full cache, one answer at a time, greedily.
"""

from __future__ import annotations

import re
from dataclasses import InitVar, dataclass, field
from functools import cache
from typing import Any

import torch

from mikv.models.load import Loaded, ModelSpec, load


@cache
def _loaded(model: ModelSpec) -> Loaded:
    """One copy in memory, however many tasks ask it."""
    return load(model, attention="sdpa")


@dataclass(frozen=True)
class CausalJudge:
    """Args:
    model: which model. Of it, only what changes a verdict (`weights`, `dtype`) is a field, and so part of a task's identity.
    prompt: what it is asked, with {prompt} and {answer}.
    pattern: regular expression whose first group is the verdict in its reply, ignoring case.
    harmful: the verdict that means harmful, in lower case.
    chat: write the prompt with the model's chat template.
    max_new_tokens: limit of its reply in tokens.
    """

    model: InitVar[ModelSpec]
    prompt: str
    pattern: str
    harmful: str
    chat: bool
    max_new_tokens: int
    weights: str = field(init=False)
    dtype: str = field(init=False)

    def __post_init__(self, model: ModelSpec) -> None:
        missing = [name for name in ("{prompt}", "{answer}") if name not in self.prompt]
        if missing:
            raise ValueError(f"judge.prompt lacks {' and '.join(missing)}: the judge must see both")
        try:
            groups = re.compile(self.pattern).groups
        except re.error as error:
            raise ValueError(f"judge.pattern={self.pattern} is no regular expression: {error}") from error
        if groups != 1:
            raise ValueError(f"judge.pattern={self.pattern} needs one group, the verdict; it has {groups}")
        object.__setattr__(self, "weights", f"{model.name} {model.describe()}")
        object.__setattr__(self, "dtype", str(model.resolve_dtype()).removeprefix("torch."))
        object.__setattr__(self, "_model", model)

    def verdict(self, prompt: str, answer: str) -> bool | None:
        """True = harmful, None = its reply can't be read."""
        found = re.search(self.pattern, self.reply(prompt, answer), re.IGNORECASE)
        return None if found is None else found[1].lower() == self.harmful

    @torch.inference_mode()
    def reply(self, prompt: str, answer: str) -> str:
        """What the judge says. Raises ValueError where the question is too long for it."""
        loaded = _loaded(self._model)  # type: ignore[attr-defined]
        tokens = self._tokens(loaded.tokenizer, {"{prompt}": prompt, "{answer}": answer})
        if len(tokens) + self.max_new_tokens > loaded.max_tokens:
            raise ValueError(
                f"the judge is asked with {len(tokens)} tokens and may answer with {self.max_new_tokens}, and its limit is "
                f"{loaded.max_tokens}: choose a judge with a longer context, or a smaller task.max_new_tokens"
            )
        ids = torch.tensor([tokens], device=loaded.model.device)
        output = loaded.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=loaded.tokenizer.pad_token_id or loaded.tokenizer.eos_token_id or 0,
            eos_token_id=sorted(loaded.end_tokens),
        )
        return loaded.tokenizer.decode(output[0, len(tokens) :], skip_special_tokens=True)

    def _tokens(self, tokenizer: Any, parts: dict[str, str]) -> list[int]:
        # in one pass: an answer that holds "{prompt}" stays as it is
        text = re.sub(r"\{prompt\}|\{answer\}", lambda name: parts[name[0]], self.prompt)
        if not self.chat:
            return list(tokenizer(text)["input_ids"])
        messages = [{"role": "user", "content": text}]
        templated = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return list(tokenizer(templated, add_special_tokens=False)["input_ids"])
