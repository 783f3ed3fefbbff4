"""A tiny random model as a GGUF file, as llama.cpp's converter would write it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from mikv.models.tiny import byte_tokenizer, tiny_config, tiny_model


def write_gguf(
    file: Path, seed: int = 0, said: dict[str, Any] | None = None, leave_out: str = "", more: Sequence[str] = (), **shape: Any
) -> Path:
    """Write a tiny llama.

    Args:
        file: where to.
        seed: of the weights.
        said: metadata that differ from what the weights are, by name without the architecture ("block_count"); None = unsaid.
        leave_out: the name of a tensor that is not written.
        more: names of further tensors, of 8 numbers each.
        shape: of the model, as tiny_config takes it.
    """
    file.parent.mkdir(exist_ok=True)
    config = tiny_config(**shape)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    metadata = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "rope.dimension_count": config.head_dim,
        "vocab_size": config.vocab_size,
        **(said or {}),
    }
    writer = gguf.GGUFWriter(file, metadata.pop("architecture", "llama"))
    for name, value in metadata.items():
        if value is None:
            continue
        add = writer.add_string if isinstance(value, str) else writer.add_uint32
        add(f"{writer.arch}.{name}", value)
    writer.add_float32(f"{writer.arch}.attention.layer_norm_rms_epsilon", config.rms_norm_eps)
    vocabulary = byte_tokenizer().get_vocab()
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*sorted(vocabulary, key=vocabulary.__getitem__)[:-1], "ab"])  # transformers needs one merge
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(config.eos_token_id)
    for name, tensor in tiny_model(config, seed=seed).state_dict().items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads is not None:  # llama.cpp pairs the channels of a rotation otherwise
            tensor = tensor.view(heads, 2, -1, tensor.shape[-1]).transpose(1, 2).reshape(tensor.shape)
        written = names.get_name(name, try_suffixes=(".weight",))
        if written != leave_out:
            writer.add_tensor(written, tensor.to(torch.float32).contiguous().numpy().astype(np.float32))
    for name in more:
        writer.add_tensor(name, np.ones(8, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
