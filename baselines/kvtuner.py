"""KVTuner (ICML 2025, arXiv 2502.04420): every layer has its own bits of keys and of values, out of 8, 4 and 2.

    layer l     code = round((x - min) / step) per token, step = (max - min) / (2^b - 1), b = k_l for keys and v_l for values

The bits are found offline, for one model, by a search that trades accuracy on GSM8K for mean bits; what it found is the method.
baselines/kvtuner.yaml holds the authors' settings for four models, at most 4 or 6 bits in the mean. In most layers values get
fewer bits than keys.

Official: cmd2001/KVTuner, calibration_presets/*_pertoken_*.yaml and flexible_quant/flexible_quant/vanilla_quantizer.py (no
licence file; the bits are data, nothing else is taken): no residual, one range per head's vector.

Deviations from that code, none of which makes it weaker: the minimum is stored in FP16, where the code rounds it to a multiple
of the step; a token is coded once, where the code reads its whole cache and codes it anew with every second new token. Its
settings for KIVI's quantizer are left out: here only the last tier may code tokens in blocks, and each layer would want one.

By default, for a model whose layers nobody has tuned, a rule of thumb that is not theirs: the first layer at 8 bits, all others
at 4 (`rest=k4v2` for values at 2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from mikv.budget import WholeLayers
from mikv.policy import Policy
from mikv.quant.tier import Tier, recoded

Layer = Tier | str | int | Sequence[int]
_PRESETS = Path(__file__).with_suffix(".yaml")


@dataclass(frozen=True)
class LayerTiers(WholeLayers):
    """Each layer's tier.

    Args:
        places: the tier of each layer, by index, from the first layer to the last; no tier is without a layer.
        repeat: a model may have any number of layers: those behind the last one that is given are as it is.
    """

    places: tuple[int, ...]
    repeat: bool = False

    @property
    def tiers(self) -> int:
        return max(self.places) + 1

    def place(self, layer: int, total: int) -> int:
        given = len(self.places)
        if given != total and not self.repeat:
            raise ValueError(
                f"kvtuner: bits of {given} layers for a model of {total}; give a pair of key and value bits for each of its "
                "layers: policy.layers=[[8,8],[4,2],...], or leave out preset and layers"
            )
        return self.places[min(layer, given - 1)]


def kvtuner(
    preset: str | None = None,
    layers: Sequence[Layer] | None = None,
    first: Tier | str | int = 8,
    rest: Tier | str | int = 4,
) -> Policy:
    """
    Args:
        preset: a name of baselines/kvtuner.yaml, for a model of that many layers.
        layers: the bits of each layer, from the first to the last: pairs of key and value bits, [[8, 8], [4, 2], ...], or
            tiers in short, [8, k4v2, ...]. A chain that is given in full is taken as it is.
        first, rest: of the first layer and of all others, where neither is given.
    """
    if preset is not None and layers is not None:
        raise ValueError(f"kvtuner: preset={preset} and layers={layers} both give the bits of the layers; leave one out")
    written: Sequence[Layer] = (first, rest)
    label = "kvtuner"
    if preset is not None:
        written, label = _preset(preset), f"kvtuner {preset}"
    elif layers is not None:
        written = layers
    if not written:
        raise ValueError("kvtuner: layers=[]: wanted the bits of each layer, [[8,8],[4,2],...]")
    chosen = [_layer(one) for one in written]
    tiers = sorted(dict.fromkeys(chosen), key=lambda tier: (tier.k + tier.v, tier.k), reverse=True)
    if layers is not None:
        label += f" {len(chosen)} layers, {sum(tier.k + tier.v for tier in chosen) / 2 / len(chosen):.2f} bits"
    elif preset is None:
        label += f" {chosen[0]}, {chosen[1]}"
    return Policy(
        name="kvtuner",
        label=label,
        tiers=tuple(tiers),
        budget=LayerTiers(tuple(map(tiers.index, chosen)), repeat=preset is None and layers is None),
    )


def _layer(written: Layer) -> Tier:
    if isinstance(written, Sequence) and not isinstance(written, str):
        if len(written) != 2:
            raise ValueError(f"kvtuner: {list(written)} for a layer; wanted two numbers, bits of keys and of values")
        written = Tier(key_bits=written[0], value_bits=written[1])
    return recoded(written, lambda bits: f"affine{bits}/all", lambda bits: f"affine{bits}/all")


@cache
def presets() -> dict[str, list[str]]:
    """Tiers of the layers, in short, by name."""
    import yaml

    return {name: text.split() for name, text in yaml.safe_load(_PRESETS.read_text(encoding="utf-8")).items()}


def _preset(name: str) -> list[str]:
    if name not in presets():
        raise ValueError(f"kvtuner: there is no preset {name!r}; there are {', '.join(presets())}")
    return presets()[name]
