"""Whether the engine computes the same on this machine by its kernels as by torch: every kind of policy, two 16-bit types.

    python scripts/check_gpu.py --json check.json

A small random model reads two prompts of unequal length and takes 40 steps, with caches read by the kernels, by the dense
working copy, and in FP32 by torch on the CPU. Printed is how far the kernels' logits are from the working copy's, beside how
far compression itself takes them from the full cache's: both as a share of what the logits spread. Exit status 1 where the
first is not far below the second, or something fails. Without a GPU the kernels are interpreted, and steps are few.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # run from anywhere in a checkout

import torch
from torch import Tensor

LENGTHS = (700, 433)
# Of the kernels' distance from the working copy, in spreads of the logits. Where a score ranks tokens, a last digit may
# rank two of them otherwise, and all that follows is another cache's.
ALLOWED = {"float16": 0.03, "bfloat16": 0.15}


def main() -> int:
    args = options().parse_args()
    gpu = torch.cuda.is_available()
    if not gpu:
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
    device = torch.device("cuda" if gpu else "cpu")
    lengths = LENGTHS if gpu else (60, 37)
    steps = args.steps or (40 if gpu else 3)
    print(torch.cuda.get_device_name() if gpu else "no GPU: kernels are interpreted on the CPU")
    print(f"{'type':9s} {'policy':28s} kernels - working  kernels - CPU FP32  policy - full   seconds of a step")
    rows: list[dict[str, Any]] = []
    for dtype in args.types.split(",") if gpu else ("float16",):
        full: Tensor | None = None
        for policy in policies():
            row: dict[str, Any] = {"dtype": dtype, "policy": policy.label}
            started = time.perf_counter()
            try:
                kernels, seconds = logits(policy, dtype, device, "kernel", "triton", lengths, steps)
                working, _ = logits(policy, dtype, device, "working", None, lengths, steps)
                exact, _ = logits(policy, "float32", torch.device("cpu"), "working", None, lengths, steps)
                full = working if full is None else full
                row |= {"working": apart(kernels, working), "exact": apart(kernels, exact), "full": apart(working, full)}
                row |= {"step_s": seconds, "right": row["working"] <= ALLOWED[dtype]}  # NaN is not
                figures = f"{row['working']:17.4f} {row['exact']:19.4f} {row['full']:14.4f} {seconds:19.4f}"
                print(f"{dtype:9s} {policy.label:28s} {figures}  {'' if row['right'] else 'WRONG'}", flush=True)
            except Exception as error:
                traceback.print_exc(limit=-5)
                row |= {"right": False, "error": f"{type(error).__name__}: {error}"[:500]}
                print(f"{dtype:9s} {policy.label:28s} FAILED", flush=True)
            rows.append(row | {"took_s": time.perf_counter() - started})
            if args.json is not None:
                environment = {"device": str(device), "torch": torch.__version__}
                environment |= {"device": torch.cuda.get_device_name()} if gpu else {}
                args.json.write_text(json.dumps({"environment": environment, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    wrong = sum(not row["right"] for row in rows)
    print(f"{wrong} of {len(rows)} wrong" if wrong else f"all {len(rows)} right")
    return 1 if wrong else 0


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the rows there, after each one")
    parser.add_argument("--types", default="float16,bfloat16", help="of the model; without a GPU float16 alone")
    parser.add_argument("--steps", type=int, help="tokens that are fed; default 40, without a GPU 3")
    return parser


def policies() -> list[Any]:
    """One of each kind; the full cache first."""
    from baselines.full import full
    from baselines.h2o import h2o
    from baselines.streaming_llm import streaming_llm
    from baselines.uniform import uniform
    from mikv.mikv import mikv
    from mikv.whiten import whiten

    return [
        full(),
        uniform(4, balance=True),
        uniform(3),
        h2o(keep=0.3),
        streaming_llm(keep=0.3),
        mikv(),
        mikv(high=8, low=3),
        whiten(),
        whiten(2, extra=0.5),
        whiten("k4v3", newest=8),
        whiten("k3v2", keep=0.1, window=8, code="codebook"),
    ]


def logits(
    policy: Any, dtype: str, device: torch.device, reader: str, attention: str | None, lengths: tuple[int, ...], steps: int
) -> tuple[Tensor, float]:
    """Logits [steps, prompts, vocabulary] of given tokens through a cache, FP32 on the CPU; median seconds of a step."""
    from mikv.attention.install import install
    from mikv.engine import Engine
    from mikv.models.tiny import tiny_config, tiny_model

    install()
    config = tiny_config(layers=4, query_heads=8, kv_heads=2, head_dim=64, hidden_size=256, initializer_range=0.06)
    model = tiny_model(config).to(getattr(torch, dtype)).to(device)
    engine = Engine(model, frozenset(), 257, reader, attention)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, 256, (length,), generator=generator).tolist() for length in lengths]
    cache = engine.compress(engine.prefill(prompts, policy.observers), [policy])
    active, positions = torch.ones(len(prompts), dtype=torch.bool), torch.tensor(lengths)
    out, times = [], []
    for step in range(steps):
        fed = torch.randint(0, 256, (len(prompts),), generator=generator)
        started = time.perf_counter()
        out.append(engine.step(cache, fed, positions + step, active).float().cpu())
        times.append(time.perf_counter() - started)
    return torch.stack(out), sorted(times)[len(times) // 2]


def apart(one: Tensor, other: Tensor) -> float:
    """Root mean square difference as a share of the standard deviation of `other`."""
    return float((one - other).square().mean().sqrt() / other.std())


if __name__ == "__main__":
    sys.exit(main())
