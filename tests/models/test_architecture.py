"""Which models the cache can serve, what it reads of them, and why it refuses the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from conftest import model

from mikv.models.architecture import SUPPORTED, Unsupported, geometry, layer_devices, rope_inv_freq
from mikv.models.tiny import tiny_config, tiny_model
from mikv.types import Geometry


@pytest.mark.parametrize("architecture", SUPPORTED)
def test_geometry_of_a_supported_architecture(architecture: str) -> None:
    config = tiny_config(architecture, layers=3, query_heads=8, kv_heads=2, head_dim=32)
    assert geometry(config) == Geometry(layers=3, query_heads=8, kv_heads=2, head_dim=32)


def test_the_four_architectures_of_the_design_are_supported() -> None:
    assert set(SUPPORTED) == {"llama", "mistral", "qwen2", "qwen3"}


@pytest.mark.parametrize("architecture", SUPPORTED)
def test_the_models_own_projections_have_that_geometry(architecture: str) -> None:
    stock: Any = model(architecture)
    layers, query_heads, kv_heads, head_dim = geometry(stock.config)
    attention = [layer.self_attn for layer in stock.get_decoder().layers]
    assert len(attention) == layers
    assert {a.q_proj.out_features for a in attention} == {query_heads * head_dim}
    assert {a.k_proj.out_features for a in attention} == {kv_heads * head_dim}


def test_head_dim_is_what_the_hidden_size_leaves_where_the_config_names_none() -> None:
    config = transformers.Qwen2Config(hidden_size=128, num_attention_heads=4, num_key_value_heads=2)
    config.head_dim = None
    assert geometry(config).head_dim == 32


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        pytest.param(
            transformers.MistralConfig(), "mistral has layers .*a window of 4096 tokens.*evict", id="mistral's window"
        ),
        pytest.param(transformers.Qwen2Config(use_sliding_window=True), "qwen2 has layers .*sliding_attention", id="qwen2's"),
        pytest.param(
            transformers.Qwen2Config(num_hidden_layers=2, layer_types=["full_attention", "chunked_attention"]),
            "qwen2 has layers .*chunked_attention",
            id="chunks without a window",
        ),
        pytest.param(transformers.Gemma3TextConfig(), "gemma3_text has layers .*sliding_attention", id="gemma3's"),
        pytest.param(transformers.Gemma2Config(), "gemma2 caps its attention scores", id="soft-capping"),
        pytest.param(transformers.DeepseekV3Config(), "deepseek_v3 has multi-head latent attention", id="latents"),
        pytest.param(transformers.GPT2Config(), r"'gpt2' is not among the tested ones \(llama, mistral", id="gpt2"),
        pytest.param(transformers.Phi3Config(), "'phi3' is not among", id="phi3"),
        pytest.param(tiny_config(head_dim=24), "llama has head_dim=24; .*multiple of 16", id="head_dim 24"),
        pytest.param(object(), r"'\?' is not among", id="no config at all"),
    ],
)
def test_what_the_cache_cannot_serve_is_refused_with_the_reason(config: Any, reason: str) -> None:
    with pytest.raises(Unsupported, match=reason):
        geometry(config)


@pytest.mark.parametrize(
    "make",
    [lambda: transformers.MistralConfig(sliding_window=None), lambda: transformers.Qwen2Config(sliding_window=4096)],
    ids=["mistral", "qwen2 with use_sliding_window=false"],
)
def test_a_window_that_is_switched_off_is_no_window(make: Any) -> None:
    assert geometry(make()).head_dim == 128


def test_the_advice_for_a_window_works_for_every_supported_model() -> None:
    """The message says which settings of config.json to change; Qwen2 saves one entry per layer besides the window."""
    saved = transformers.Qwen2Config(use_sliding_window=True, max_window_layers=2, num_hidden_layers=4).to_dict()
    with pytest.raises(Unsupported) as refused:
        geometry(transformers.Qwen2Config(**saved))
    saved["sliding_window"] = None
    if "layer_types" in str(refused.value):
        saved["layer_types"] = None
    if "use_sliding_window" in str(refused.value):
        saved["use_sliding_window"] = False
    assert geometry(transformers.Qwen2Config(**saved)).layers == 4


def test_every_layer_has_a_device() -> None:
    assert layer_devices(model(layers=3)) == [torch.device("cpu")] * 3


@pytest.mark.parametrize(
    ("rope", "fixed"),
    [
        ({"rope_type": "default", "rope_theta": 10_000.0}, True),
        ({"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0}, True),
        ({"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}, False),
    ],
    ids=lambda value: value["rope_type"] if isinstance(value, dict) else "",
)
def test_keys_can_be_re_indexed_only_where_frequencies_do_not_depend_on_the_length(rope: dict[str, Any], fixed: bool) -> None:
    frequencies = rope_inv_freq(tiny_model(tiny_config(rope_parameters=rope)))
    if not fixed:
        assert frequencies is None
        return
    assert frequencies is not None
    wanted = 10_000.0 ** (-torch.arange(0, 16, 2) / 16) / rope.get("factor", 1.0)
    torch.testing.assert_close(frequencies, wanted)
