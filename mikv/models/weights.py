"""Were all weights loaded, and none left over? transformers fills what is missing with random numbers and drops the rest."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

# A name with a number in it belongs to one of several layers.
_OF_A_LAYER = re.compile(r"\.\d+\.")


def check_loaded(model: Any, info: Mapping[str, Any]) -> None:
    """Refuse a model that is not the one that its files describe.

    Args:
        model: as from_pretrained(..., ignore_mismatched_sizes=True, output_loading_info=True) gives it.
        info: what it gives beside it. Tied weights and buffers that old checkpoints have are in none of its lists.

    Raises:
        ValueError: says how many tensors, and the first of them.
    """
    every = len(model.state_dict())
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"{len(missing)} of the model's {every} tensors are missing from the weights ({some(missing)}) and would be random "
            "numbers: files are missing, or the configuration is another model's. Get the whole model again"
        )
    if mismatched := sorted(info["mismatched_keys"]):
        name, there, wanted = mismatched[0]
        raise ValueError(
            f"{len(mismatched)} of the model's {every} tensors have another shape than by the configuration ({name}: "
            f"{list(there)} in the weights, {list(wanted)} wanted): it is another model's. Get the whole model again"
        )
    if info["error_msgs"]:
        raise ValueError("; ".join(info["error_msgs"]))
    unexpected = sorted(info["unexpected_keys"])
    if left_over := [name for name in unexpected if _OF_A_LAYER.search(name)]:
        raise ValueError(
            f"{len(left_over)} tensors of the weights belong to no layer that the configuration describes ({some(left_over)}): "
            "the model would be cut. Get the configuration that belongs to these weights"
        )
    if unexpected:
        print(
            f"note: {len(unexpected)} tensors of the weights have no place in the model and are not used ({some(unexpected)})"
        )


def some(names: Collection[str]) -> str:
    """The first three of some names."""
    first = list(names)[:3]
    return ", ".join(first) + (", ..." if len(names) > len(first) else "")
