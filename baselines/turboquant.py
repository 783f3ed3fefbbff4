"""TurboQuant (arXiv 2504.19874) as vLLM serves it: keys rotated and coded by a codebook, values by a scale and a minimum.

    keys     y = H k / |k|,  each channel the nearest of 2^b centroids of N(0, 1 / D);  k^ = |k| H y^ / |y^|   ("nc")
    values   one scale and one minimum per token and head

The norm is FP16, the rotation Hadamard's without signs; no QJL. The first and the last layers stay at 16 bits ("boundary",
two at each end for dense models), and are counted here. vLLM's preset k8v4, with FP8 keys, is left out. The code:
vllm-project/vllm, vllm/model_executor/layers/quantization/turboquant. Deviation: none that is known; what is stored of a
vector's norm is it over that of its levels, so that reading is one product.
"""

from mikv.budget import EVERYTHING, Boundary
from mikv.options import check_choice
from mikv.policy import Policy, describe_options
from mikv.quant.tier import Tier

PRESETS = {"4bit_nc": (4, 4), "k3v4_nc": (3, 4), "3bit_nc": (3, 3)}
"""Bits of keys and values, by vLLM's names."""


def turboquant(preset: str = "k3v4_nc", boundary: int = 2) -> Policy:
    """
    Args:
        preset: 4bit_nc, k3v4_nc or 3bit_nc.
        boundary: layers at each end that stay at 16 bits.
    """
    check_choice("turboquant: preset", preset, tuple(PRESETS))
    keys, values = PRESETS[preset]
    coded = Tier(key=["rotate", f"codebook{keys}"], value=f"affine{values}/all")
    return Policy(
        name="turboquant",
        label=f"turboquant {preset}" + describe_options(boundary=(boundary, 2)),
        tiers=(Tier(16), coded) if boundary else (coded,),
        budget=Boundary(boundary) if boundary else EVERYTHING,
    )
