"""What the cache of one prompt looks like. Arrays as in mikv.inside: L layers, H KV heads, T tokens, D channels."""

from __future__ import annotations

from typing import Any

import numpy as np

_BEFORE, _AFTER = "#D55E00", "#0072B2"


def importance_map(importance: np.ndarray, title: str) -> Any:
    """Importance over the tokens of a prompt: mean over all heads, and by layer. importance [L, H, T]; both scales are
    logarithmic, since a few tokens receive most of the attention."""
    from matplotlib.colors import LogNorm

    figure, (above, below) = _pyplot().subplots(
        2, 1, figsize=(10, 5.6), sharex=True, height_ratios=(1, 1.6), layout="constrained"
    )
    by_layer = np.maximum(importance.mean(axis=1), 1e-6)
    above.plot(by_layer.mean(axis=0), color=_AFTER, linewidth=0.8)
    above.set_yscale("log")
    above.set_ylabel("importance,\nmean of all layers")
    above.grid(True, linewidth=0.3)
    image = below.imshow(by_layer, norm=LogNorm(), cmap="cividis", aspect="auto", interpolation="nearest")
    below.set_ylabel("layer")
    below.set_xlabel("token of the prompt")
    figure.colorbar(image, ax=below, label="importance (attention received),\nmean over KV heads")
    figure.suptitle(title, fontsize=11)
    return figure


def tier_map(bits: np.ndarray, title: str) -> Any:
    """In how many bits each token's key is held, by layer: mean over the KV heads, which choose apart. bits [L, H, T]."""
    figure, ax = _pyplot().subplots(figsize=(10, 3.8), layout="constrained")
    image = ax.imshow(bits.mean(axis=1), cmap="cividis", vmin=0, vmax=16, aspect="auto", interpolation="nearest")
    ax.set_xlabel("token of the prompt")
    ax.set_ylabel("layer")
    figure.colorbar(image, ax=ax, label="bits of a key,\nmean over KV heads", ticks=[0, 2, 4, 8, 16])
    figure.suptitle(title, fontsize=11)
    return figure


def outlier_channels(query_absmax: np.ndarray, key_absmax: np.ndarray, balancer: np.ndarray, title: str) -> Any:
    """Largest magnitude of each channel of queries and keys of one layer and head, before and after the balancer. [D] each."""
    figure, axes = _pyplot().subplots(1, 2, figsize=(10, 3.8), sharey=True, layout="constrained")
    both = (
        ("before", query_absmax, key_absmax, ("max |q|", "max |k|")),
        ("after balancing", query_absmax / balancer, key_absmax * balancer, ("max |q / b|", "max |k b|")),
    )
    for ax, (name, queries, keys, labels) in zip(axes, both, strict=True):
        ax.plot(queries, color=_BEFORE, linewidth=2.4, alpha=0.7, label=labels[0])
        ax.plot(keys, color=_AFTER, linewidth=1.0, label=labels[1])
        ax.set_title(name, fontsize=10)
        ax.set_xlabel("channel")
        ax.grid(True, linewidth=0.3)
        ax.legend(fontsize=9)
    axes[0].set_ylabel("largest magnitude over the prompt")
    figure.suptitle(title, fontsize=11)
    return figure


def channel_errors(error: dict[str, np.ndarray], query_absmax: np.ndarray, title: str) -> Any:
    """Error of stored keys by channel of one layer and head: as it is, and as large as a dot product can feel it.

    error: root mean square [D] by the name of what was stored; query_absmax [D].
    """
    figure, axes = _pyplot().subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for (name, of), colour, style in zip(error.items(), (_AFTER, _BEFORE, "#009E73"), ("-", "--", ":"), strict=False):
        for ax, values in zip(axes, (of, of * query_absmax), strict=True):
            ax.plot(np.maximum(values, 1e-6), style, color=colour, linewidth=1.3, label=name)
    for ax, label in zip(axes, ("error of the stored key (RMS over tokens)", "the same, times max |q|"), strict=True):
        ax.set_yscale("log")
        ax.set_xlabel("channel")
        ax.set_ylabel(label)
        ax.grid(True, linewidth=0.3)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=9, frameon=False)
    figure.suptitle(title, fontsize=11)
    return figure


def _pyplot() -> Any:
    import matplotlib.pyplot as plt

    return plt
