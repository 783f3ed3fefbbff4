"""What do lm-eval's tasks cost under compression? Side by side in one run: plain lm-eval, ours with the full cache alone, ours
with a panel of 9 policies.

python scripts/bench_lm_eval.py --data ../shared/data

Timed is what follows loading and building the prompts: tokenization, model, cache, scores. The same batch size for all.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mikv.config import compose, policy
from mikv.engine import Engine
from mikv.lm import Harness
from mikv.lm.plain import plain_lm, plain_requests
from mikv.models.load import load
from mikv.policy import Policy

TASKS = {
    "mmlu": ["task.only=[anatomy,astronomy,high_school_world_history]", "task.limit=24"],
    "gsm8k": ["task.limit=8", "task.gen_kwargs={max_gen_toks: 128}"],
}
PANEL = [
    policy("full"),
    policy("h2o", {"keep": 0.2}),
    policy("h2o", {"keep": 0.5}),
    policy("streaming_llm", {"keep": 0.2}),
    policy("uniform", {"tier.bits": 4, "balance": True}),
    policy("uniform", {"tier.bits": 2, "balance": True}),
    policy("mikv", {"low.bits": 2}),
    policy("mikv", {"low.bits": 4}),
    policy("mikv", {"high.bits": 8, "low.bits": 4}),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with mmlu/ and gsm8k/ (README)")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    for name in args.tasks:
        compare(name, args.model, args.data, args.batch_size, args.rounds)


def compare(name: str, model: str, data: Path, batch_size: int, rounds: int) -> None:
    run = compose("policy=full", f"model={model}", f"task={name}", f"task.data_dir={data / name}", *TASKS[name])
    assert isinstance(run.task, Harness)
    work, ours = run.open(), load(run.model)
    lm = plain_lm(load(run.model, attention="sdpa"), batch_size)
    method, instances = plain_requests(run.task, run.model, run.limit, run.seed)

    engine = Engine(ours.model, ours.end_tokens, ours.tokenizer.pad_token_id or 0)

    def plain() -> None:
        getattr(lm, method)(instances, disable_tqdm=True)

    def panel_of(panel: Sequence[Policy], fidelity: bool) -> Callable[[], None]:
        def run_it() -> None:
            requests = {unit: work.encode(unit, ours).requests for unit in work.units()}
            for _ in engine.serve(requests, panel, batch_size, fidelity):
                pass

        return run_it

    ways = {
        "plain lm-eval": plain,
        "full alone": panel_of(PANEL[:1], False),
        f"panel of {len(PANEL)}": panel_of(PANEL, False),
    }
    if method == "generate_until":
        ways[f"panel of {len(PANEL)}, with fidelity"] = panel_of(PANEL, True)
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, work_it in ways.items():
            started = time.perf_counter()
            work_it()
            seconds[way].append(time.perf_counter() - started)
    median = {way: statistics.median(times) for way, times in seconds.items()}
    print(f"\n{name}: {len(work.units())} documents, {model}, batch size {batch_size}, median of {rounds} rounds")
    for way, spent in median.items():
        ratios = f"{median['plain lm-eval'] / spent:5.2f}x as fast as plain   {spent / median['full alone']:5.2f}x full alone"
        print(f"  {way:27s} {spent:7.2f} s   {ratios}", flush=True)


if __name__ == "__main__":
    main()
