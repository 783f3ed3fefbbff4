"""What a cache costs on a CPU: memory of prefill, resident size of the packed cache, time of a decode step. No GPU needed.

    python scripts/bench_memory.py                  # 4k to 32k tokens: some minutes
    python scripts/bench_memory.py --tokens 1024,2048,4096 --step-tokens 2048

A random Llama of two layers in the shape of SmolLM2-135M's (9 query heads, 3 KV heads, head_dim 64), float32.

1. *Prefill with H2O scores*: peak memory of the process above what it held before, for each length in a process of its own.
   It must grow linearly: twice the tokens, twice the memory (a T x T matrix would take four times as much).
2. *The packed cache* of the longest prompt: what the process gives back when it is deleted, beside what nbytes() says.
3. *A decode step* over packed tiers beside one over the 16-bit cache as a dense copy, the same model: unpacked at each step
   (reader=packed) and read where it lies (reader=kernel). Medians, alternating.

Exits with 1 if memory grows by more than 2.3 per doubling, if nbytes() is off by more than 10 %, or if a step that reads the
packed cache where it lies takes more than three times one over the 16-bit cache. Linux only: it reads /proc.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # run from anywhere in a checkout

import torch

from mikv.attention.install import install
from mikv.cache.compressed import CompressedCache
from mikv.cache.prefill import PrefillState
from mikv.engine import Engine
from mikv.importance.scores import ColumnSums
from mikv.mikv import mikv
from mikv.models.tiny import tiny_config, tiny_model
from mikv.policy import Policy
from mikv.quant.tier import Tier

MB = 10**6
FULL = Policy(name="full", label="16 bits", tiers=(Tier(16),))
PANEL = [mikv(), mikv(high=Tier(8), low=Tier(3)), mikv(high=Tier(8), low=Tier(4))]
GROWTH, SIZE, STEP = 2.3, 0.10, 3.0
# glibc raises this threshold by itself, and then keeps what was freed: the peak would be that of its habits.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(2**20), "MALLOC_ARENA_MAX": "1"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="4096,8192,16384,32768", help="lengths of prefill, each twice the one before")
    parser.add_argument("--step-tokens", type=int, default=8192, help="tokens in the cache when decode steps are timed")
    parser.add_argument("--rounds", type=int, default=9, help="steps per cache; the median counts")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)  # what this script starts for each length
    args = parser.parse_args()
    if args.one is not None:
        print(json.dumps(memory(args.one)))
        return 0

    rows = []
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    print("\nprefill with H2O scores: peak above what was held before")
    for tokens in map(int, args.tokens.split(",")):
        command = [sys.executable, __file__, "--one", str(tokens)]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **ALLOCATOR})
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        growth = f"   x {rows[-1]['peak'] / rows[-2]['peak']:.2f}" if len(rows) > 1 else ""
        print(
            f"{tokens:7d} tokens {rows[-1]['peak'] / MB:9.1f} MB {rows[-1]['peak'] / tokens:9.0f} B/token{growth}", flush=True
        )
    last = rows[-1]
    ratio = last["resident"] / last["nbytes"]
    print(f"\npacked caches of {last['tokens']} tokens, {', '.join(policy.label for policy in PANEL)}")
    print(f"nbytes() {last['nbytes'] / MB:.1f} MB, given back by the process {last['resident'] / MB:.1f} MB, ratio {ratio:.3f}")
    slowest = steps(args.step_tokens, args.rounds)

    growths = [after["peak"] / before["peak"] for before, after in pairwise(rows)]
    missed = [f"peak memory grew by {growth:.2f}" for growth in growths if growth > GROWTH]
    missed += [f"resident size is {ratio:.3f} of nbytes()"] if abs(ratio - 1) > SIZE else []
    missed += [f"a packed step took {slowest:.2f} of a 16-bit one"] if slowest > STEP else []
    print("\n" + ("\n".join(missed) if missed else "all within bounds"))
    return 1 if missed else 0


def small_engine() -> Engine:
    install()
    shape = {"layers": 2, "query_heads": 9, "kv_heads": 3, "head_dim": 64, "hidden_size": 576, "intermediate_size": 1536}
    config = tiny_config("llama", **shape, vocab_size=49152, max_position_embeddings=2**17, initializer_range=0.02)
    return Engine(tiny_model(config), frozenset(), 0)


def prefilled(engine: Engine, tokens: int) -> PrefillState:
    ids = torch.randint(0, 49152, (tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    return engine.prefill([ids], {ColumnSums()})


def memory(tokens: int) -> dict[str, Any]:
    """Bytes of one prefill, and of the panel's packed caches made of it."""
    engine = small_engine()
    engine.reader = "packed"
    prefilled(engine, 64)  # whatever is set up once
    before = resident()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    state = prefilled(engine, tokens)
    peak = status("VmHWM") - before
    caches = [engine.compress(state, [policy]) for policy in PANEL]
    del state
    nbytes = sum(sum(cache.usage()[0].nbytes.values()) for cache in caches)
    held = resident()
    caches.clear()
    return {"tokens": tokens, "peak": peak, "nbytes": nbytes, "resident": held - resident()}


def status(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def resident() -> int:
    """Bytes that the process holds, once what was freed has been given back to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return status("VmRSS")


def steps(tokens: int, rounds: int) -> float:
    """Time decode steps; the slowest packed cache that is read where it lies, as a multiple of the 16-bit cache."""
    engine = small_engine()
    state = prefilled(engine, tokens)
    caches: dict[tuple[str, str], CompressedCache] = {}
    for policy in (FULL, *PANEL):
        for way, reader in (("dense copy", "working"), ("unpacked each step", "packed"), ("read where it lies", "kernel")):
            engine.reader = reader
            caches[policy.label, way] = engine.compress(state, [policy])
    del state
    times: dict[tuple[str, str], list[float]] = {key: [] for key in caches}
    for step in range(rounds):
        for key, cache in caches.items():
            started = time.perf_counter()
            engine.step(cache, torch.tensor([step]), torch.tensor([tokens + step]), torch.tensor([True]))
            times[key].append(time.perf_counter() - started)
    base = statistics.median(times[FULL.label, "dense copy"])
    print(f"\none decode step at {tokens} tokens")
    for (label, way), seconds in times.items():
        middle = statistics.median(seconds)
        print(f"{label:20s} {way:20s} {1e3 * middle:8.1f} ms   {middle / base:5.2f} x the 16-bit cache")
    packed = [key for key in times if key[0] != FULL.label and key[1] == "read where it lies"]
    return max(statistics.median(times[key]) for key in packed) / base


if __name__ == "__main__":
    sys.exit(main())
