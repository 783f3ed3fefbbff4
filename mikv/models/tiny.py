"""Tiny random models and a byte-level tokenizer: what the mechanical tests run on, in milliseconds, from no file."""

from __future__ import annotations

from typing import Any

import torch

# One class per supported architecture; all read the same few numbers.
_CONFIGS = {"llama": "LlamaConfig", "mistral": "MistralConfig", "qwen2": "Qwen2Config", "qwen3": "Qwen3Config"}
_END, _PAD = "<|end|>", "<|pad|>"


def byte_tokenizer() -> Any:
    """One token per byte, 258 with the end token and padding; a fast tokenizer without files or merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=_END, pad_token=_PAD)


def tiny_config(
    architecture: str = "llama",
    layers: int = 2,
    query_heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    **more: Any,
) -> Any:
    """Config of a tiny model; `more` goes to the architecture's config class."""
    import transformers

    options = {
        "vocab_size": 258,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": layers,
        "num_attention_heads": query_heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": 4096,
        "eos_token_id": 256,
        "pad_token_id": 257,
        "bos_token_id": None,
        # random weights of the usual size give nearly uniform attention; these make it peaked, as in a trained model
        "initializer_range": 0.2,
        "sliding_window": None,
    }
    return getattr(transformers, _CONFIGS[architecture])(**(options | more))


def tiny_model(config: Any, dtype: torch.dtype = torch.float32, seed: int = 0, attention: str = "mikv") -> Any:
    """A model with random weights, the same for the same seed; the caller's random state is not touched."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention).eval()
