"""The price of a curve: a panel against one policy alone, and against separate runs of its policies.

    python scripts/bench_curve.py                          # demo panel, line recall, the embedded model
    python scripts/bench_curve.py --samples 2 --lines 40

All three are measured in this process, on the same prompts, after a warm-up, alternating; medians of the rounds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # run from anywhere in a checkout

from mikv.config import compose
from mikv.engine import Engine
from mikv.engine.requests import Generating
from mikv.models.load import load
from mikv.policy import Policy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--panel", default="demo")
    parser.add_argument("--model", default="smollm2-recall")
    parser.add_argument("--samples", type=int, default=1, help="prompts per batch")
    parser.add_argument("--lines", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()

    run = compose(f"panel={args.panel}", f"model={args.model}", f"task.lines={args.lines}")
    loaded = load(run.model)
    engine = Engine(loaded.model, loaded.end_tokens, loaded.tokenizer.pad_token_id or 0)
    work = run.open()
    requests = [request for unit in work.units()[: args.samples] for request in work.encode(unit, loaded).requests]
    prompts = [request.prompt for request in requests]
    decoding = next(request.decoding for request in requests if isinstance(request, Generating))

    def seconds(panel: Sequence[Policy]) -> float:
        started = time.perf_counter()
        engine.generate(prompts, panel, decoding)
        return time.perf_counter() - started

    seconds(run.panel)  # warm-up, of the largest case
    whole, separate = [], []
    for _ in range(args.rounds):
        whole.append(seconds(run.panel))
        separate.append([seconds([policy]) for policy in run.panel])
    one = statistics.median(s for rounds in separate for s in rounds)
    panel, apart = statistics.median(whole), statistics.median(map(sum, separate))
    print(f"{run.model.name}, {args.samples} prompt(s) of {prompts[0].tokens} tokens, {args.rounds} rounds, medians")
    print(f"one policy alone (median over policies)    {one:6.2f} s")
    print(f"panel of {len(run.panel):2d} policies together             {panel:6.2f} s   {panel / one:.2f}x one policy")
    print(f"its policies in {len(run.panel):2d} separate runs          {apart:6.2f} s   {apart / panel:.2f}x the panel")


if __name__ == "__main__":
    main()
