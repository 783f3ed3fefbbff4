"""What each step of our own policy (mikv/whiten.py) is worth: left out, or done otherwise, around its 18 % setting.

python -m experiments.steps model=smollm2-135m
python -m experiments.steps model=smollm2-recall task=linerecall task.limit=100
"""

from __future__ import annotations

from experiments.ablations import table
from experiments.base import arguments, run, show
from mikv.cli import explained, quiet

BASE = "whiten 2+0.5"
CHOICES = {
    "centre=none": "keys not centred",
    "centre=after": "keys centred after RoPE",
    "balance=none": "no balancer",
    "balance=max": "the paper's balancer",
    "rotate=False": "no rotation",
    "code=codebook": "each channel coded by itself",
    "sinks=0": "no exact sinks",
    "none important": "no important tokens",
    "2% random 8": "random tokens in their place",
    "last 1 5": "new tokens coded at once",
    "last 32 4": "newest tokens at 4 bits",
    "whiten 2": "no bits by head",
}


if __name__ == "__main__":
    quiet()
    with explained():
        show(table(run("steps", *arguments()), BASE, CHOICES))
