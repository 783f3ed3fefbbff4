"""Tiny models as they lie on a disk, and what they answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from conftest import NO_END, prompt

from mikv.config import policy
from mikv.engine import Engine
from mikv.engine.requests import Decoding
from mikv.models.load import Loaded
from mikv.models.tiny import byte_tokenizer, tiny_config, tiny_model


def save(folder: Path, seed: int = 0, **shape: Any) -> Path:
    """A local folder as `hf download` or save_pretrained leaves it."""
    tiny_model(tiny_config(**shape), seed=seed).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def answer(loaded: Loaded) -> list[int]:
    engine = Engine(loaded.model, NO_END, 257, "working")
    return engine.generate([prompt(20)], [policy("full")], Decoding(8))[0][0].tokens


def save_adapter(folder: Path, seed: int = 0, **shape: Any) -> Any:
    """A LoRA adapter of the tiny model of that shape, as peft saves it. Returns the adapted model."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tuned: Any = get_peft_model(tiny_model(tiny_config(**shape)), config)
    tuned.save_pretrained(folder)
    return tuned
