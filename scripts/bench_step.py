"""What a step of decoding costs with our own policy beside uniform 4 bits: processor seconds of one core, steps in turns.

    python scripts/bench_step.py
    python scripts/bench_step.py --model smollm2-135m --prompts 4 --tokens 511 --steps 30

Each policy has a cache of its own of the same prompts; ratios are medians over steps of the same step's times. Processor time,
so that other work on the machine counts less; the first two steps, which fill caches, don't count.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # run from anywhere in a checkout

POLICIES: dict[str, tuple[str, dict[str, Any]]] = {
    "uniform 4": ("uniform", {"tier": 4, "balance": True}),
    "whiten 2": ("whiten", {}),
    "whiten k4v3 last 32 8": ("whiten", {"low": "k4v3", "newest": 8}),
    "whiten 2 code=codebook": ("whiten", {"code": "codebook"}),
    "whiten 2+0.5": ("whiten", {"extra": 0.5}),
}
WARM = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="a name of conf/model")
    parser.add_argument("--prompts", type=int, default=4, help="rows of the batch")
    parser.add_argument("--tokens", type=int, default=511, help="of a prompt")
    parser.add_argument("--steps", type=int, default=20, help="steps that are timed")
    options = parser.parse_args()

    import torch
    from tqdm import tqdm

    from mikv.config import compose, policy
    from mikv.engine import Engine
    from mikv.models.load import load
    from mikv.work.fidelity import TEXTS

    torch.set_num_threads(1)
    loaded = load(compose(f"model={options.model}", "task=fidelity").model)
    engine = Engine(loaded.model, loaded.end_tokens, loaded.max_tokens)
    panel = {label: policy(name, overrides) for label, (name, overrides) in POLICIES.items()}
    text = loaded.tokenizer(TEXTS["prose"].read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)["input_ids"]
    rows, length = options.prompts, options.tokens
    contexts = [text[row * length : (row + 1) * length] for row in range(rows)]
    if len(contexts[-1]) < length:
        parser.error(f"the text has {len(text)} tokens, too few for {rows} prompts of {length}")
    state = engine.prefill(contexts, set().union(*(one.observers for one in panel.values())))
    caches = {label: engine.compress(state, [one]) for label, one in panel.items()}
    times: dict[str, list[float]] = {label: [] for label in panel}
    active = torch.ones(rows, dtype=torch.bool)
    for step in tqdm(range(options.steps + WARM), desc="steps"):
        for label, cache in caches.items():
            start = time.process_time()
            engine.step(cache, torch.full((rows,), step), torch.full((rows,), length + step), active)
            times[label].append(time.process_time() - start)
    base = times["uniform 4"][WARM:]
    print(f"{options.model}, {rows} prompts of {length} tokens, {options.steps} steps, one core, medians")
    for label, of_it in times.items():
        ratio = statistics.median(mine / theirs for mine, theirs in zip(of_it[WARM:], base, strict=True))
        print(f"  {label:24} {statistics.median(of_it[WARM:]):.3f} s {ratio:6.2f}x uniform 4")


if __name__ == "__main__":
    main()
