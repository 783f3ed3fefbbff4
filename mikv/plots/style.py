"""What all figures share: one colour and marker a policy, in the report too; names drawn as they are; files."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

# Okabe and Ito's palette, safe for colour-blind readers.
_STYLE = {
    "full": ("#000000", "*"),
    "mikv": ("#0072B2", "o"),
    "h2o": ("#D55E00", "s"),
    "streaming_llm": ("#E69F00", "D"),
    "uniform": ("#009E73", "^"),
    "random": ("#999999", "v"),
    "recent_only": ("#CC79A7", "P"),
    "whiten": ("#7B3294", "<"),
    # what evicts, by the attention that it asks; what quantizes
    "snapkv": ("#F0A0A0", "o"),
    "pyramidkv": ("#A65628", "^"),
    "adakv": ("#E41A1C", "v"),
    "criticalkv": ("#B22222", ">"),
    "defensivekv": ("#67000D", "P"),
    "tova": ("#FDBF6F", "p"),
    "expected_attention": ("#F781BF", "h"),
    "keydiff": ("#B8A000", "8"),
    "knorm": ("#666600", "d"),
    "kivi": ("#17BECF", "s"),
    "hf_quantized": ("#666666", "X"),
    "turboquant": ("#1F3A93", "D"),
    "kvarn": ("#56B4E9", "p"),
    "zipcache": ("#4DAF4A", "h"),
    "kvtuner": ("#006D2C", "8"),
}
# Of all others, by a number that their name gives: the same in every figure, though now and then two share one.
_OTHERS = [
    ("#56B4E9", "X"),
    ("#8C564B", "p"),
    ("#7B3294", "<"),
    ("#808000", ">"),
    ("#1F3A93", "h"),
    ("#17BECF", "d"),
    ("#B22222", "8"),
]


def look(policy: str) -> tuple[str, str]:
    """Colour and matplotlib's marker of a policy, by its name."""
    return _STYLE.get(policy) or _OTHERS[zlib.crc32(policy.encode()) % len(_OTHERS)]


def literal(name: str) -> str:
    """A name for matplotlib, which would read what stands between two dollar signs as a formula, and stop at a wrong one."""
    return name.replace("$", r"\$")


def pyplot() -> Any:
    """pyplot without a screen."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save(figure: Any, file: Path) -> None:
    """Write a figure and close it."""
    figure.savefig(file)
    pyplot().close(figure)
