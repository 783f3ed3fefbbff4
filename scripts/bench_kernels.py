"""Time the kernels on a GPU, after they have been found correct there. Without a GPU: the correctness part alone, interpreted.

    python scripts/bench_kernels.py --json kernels.json
    python scripts/bench_kernels.py --batches 8 --tokens 16384 --models Llama-3-8B --no-end-to-end

*Decode attention* by model, batch, length and cache: time, bandwidth of the bytes the cache holds as a share of a copy
measured in the same run, and the time of torch's scaled_dot_product_attention over the same tokens in BF16 as a multiple.
Column sums beside causal attention, packing beside a copy. *End to end*: a Llama-2-7B of random weights with a full and
with a MiKV cache, tokens per second and peak memory.

Times are medians; buffers are rotated so that no call finds its data in the L2 cache; launches are recorded in a CUDA graph,
so that a kernel is timed and not Python. What does not fit into memory is left out, and said.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # run from anywhere in a checkout

import torch
import torch.nn.functional as F
from torch import Tensor

# What a cache is made of: share of the tokens, bits of keys, bits of values.
CACHES: dict[str, list[tuple[float, int, int]]] = {
    "16": [(1.0, 16, 16)],
    "8": [(1.0, 8, 8)],
    "4": [(1.0, 4, 4)],
    "3": [(1.0, 3, 3)],
    "2": [(1.0, 2, 2)],
    "20% 16, 2": [(0.2, 16, 16), (0.8, 2, 2)],
    "20% 8, 2": [(0.2, 8, 8), (0.8, 2, 2)],
}
MODELS = {"Llama-2-7B": (32, 32, 128), "Llama-3-8B": (32, 8, 128), "SmolLM2-135M": (9, 3, 64), "SmolLM2-1.7B": (32, 32, 64)}
ROUNDS = 15
Row = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--tokens", default="4096,16384,32768")
    parser.add_argument("--no-end-to-end", action="store_true", help="leave out the Llama-2-7B of random weights")
    parser.add_argument("--json", type=Path, default=Path("bench_kernels.json"), help="where the rows go (on a GPU)")
    args = parser.parse_args()
    gpu = torch.cuda.is_available()
    if not gpu:
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
    device = torch.device("cuda" if gpu else "cpu")
    print(f"{torch.cuda.get_device_name() if gpu else 'no GPU: kernels are interpreted on the CPU, nothing is timed'}")
    if not correct(device, (1, 70) if not gpu else (1, 1000, 4097)):
        print("kernels are wrong: nothing is timed")
        return 1
    if not gpu:
        return 0
    models = {name: MODELS[name] for name in args.models.split(",")}
    batches, lengths = ([int(n) for n in text.split(",")] for text in (args.batches, args.tokens))
    copy = copy_bandwidth(device)
    print(f"\ncopy: {copy / 1e9:.0f} GB/s, read and written")
    rows = [*decode_rows(device, models, batches, lengths, copy), *prefill_rows(device, models, lengths, copy)]
    if not args.no_end_to_end:
        rows += end_to_end(device, llama2_7b(), torch.float16, tokens=4096, batches=(1, 8), steps=64)
    environment = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "copy_bytes_per_s": copy}
    args.json.write_text(json.dumps({"environment": environment, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    print(f"\nrows are in {args.json}")
    return 0


def correct(device: torch.device, lengths: Sequence[int]) -> bool:
    """Every kernel against its reference; prints what was compared."""
    from mikv.kernels import pick
    from mikv.kernels.verify import MASS_TOLERANCE, TOLERANCE, decode_errors, random_segment

    fine = True

    def report(name: str, error: float, allowed: float) -> None:
        nonlocal fine
        fine &= error <= allowed
        print(f"{name:60s} {error:.1e}  {'ok' if error <= allowed else f'WRONG, at most {allowed:.0e}'}")

    for (name, (query_heads, heads, dim)), tokens in itertools.product(MODELS.items(), lengths):
        generator = torch.Generator(device).manual_seed(tokens)
        group = query_heads // heads
        heads = min(heads, 2)
        query = torch.randn((2, group * heads, dim), generator=generator, device=device).half()
        errors = []
        for parts in CACHES.values():
            segments = [random_segment(2, heads, math.ceil(s * tokens), dim, k, v, device, generator) for s, k, v in parts]
            errors.append(decode_errors(query, segments))
        out, mass = torch.tensor(errors).amax(dim=0).tolist()  # NaN stays NaN
        report(f"decode attention, {name}, {tokens} tokens, {len(CACHES)} caches", out, TOLERANCE[query.dtype])
        report(f"attention mass, {name}, {tokens} tokens", mass, MASS_TOLERANCE)
        key = torch.randn((2, heads, tokens, dim), generator=generator, device=device).half()
        queries = torch.randn((2, group * heads, tokens, dim), generator=generator, device=device).half()
        sums = [pick.column_sums(queries, key, None, dim**-0.5, None, which) for which in ("triton", "reference")]
        report(f"column sums, {name}, {tokens} tokens", float((sums[0] - sums[1]).abs().max() / (group * tokens)), 1e-4)
        balancer = torch.rand((2, heads, dim), generator=generator, device=device) + 0.5
        for bits in (8, 4, 3, 2):
            made = [_parts(pick.encode(key, bits, 2, balancer, which)) for which in ("triton", "reference")]
            unequal = sum(int((a != b).sum()) for a, b in zip(*made, strict=True))
            # a GPU's torch divides by a constant by its reciprocal: one scale in many differs in its last bit
            share = unequal / sum(part.numel() for part in made[0])
            report(f"pack at {bits} bits, {name}, {tokens} tokens: share unequal", share, 0.0 if device.type == "cpu" else 1e-3)
    return fine


def _parts(vectors: Any) -> list[Tensor]:
    """Codes, scales and minima."""
    return [vectors.data, vectors.scale, vectors.zero]


def held_bytes(segments: Sequence[Any]) -> int:
    tensors = [part for s in segments for x in (s.keys, s.values) for part in x[1:] if part is not None]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def seconds(calls: Sequence[Callable[[], Any]], device: torch.device) -> float:
    """Median time of one of some calls that are made one after the other."""
    for call in calls:
        call()  # compiles, allocates
    if device.type != "cuda":
        started = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - started) / len(calls)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(ROUNDS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / len(calls))
    return statistics.median(times[2:] or times)


def copies(one: int, device: torch.device) -> int:
    """How many buffers of `one` bytes are rotated so that they are four times the L2 cache; 0 = they don't fit."""
    if device.type != "cuda":
        return 1
    wanted = math.ceil(4 * torch.cuda.get_device_properties(device).L2_cache_size / one)
    torch.cuda.empty_cache()
    room = int(torch.cuda.mem_get_info(device)[0] * 0.85)
    return wanted if wanted * one <= room else 0


def copy_bandwidth(device: torch.device, size: int = 2**30) -> float:
    """Bytes per second that a copy reads and writes."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / seconds([lambda: target.copy_(source)], device)


def decode_rows(
    device: torch.device,
    models: dict[str, tuple[int, int, int]],
    batches: Sequence[int],
    lengths: Sequence[int],
    copy: float,
) -> list[Row]:
    """Decode attention; prints a line per row."""
    rows: list[Row] = []
    print("\ndecode attention  batch tokens cache             us    GB/s of copy   SDPA us")
    for (name, (query_heads, heads, dim)), batch, tokens in itertools.product(models.items(), batches, lengths):
        query = torch.randn((batch, query_heads, dim), device=device, dtype=torch.float16)
        sdpa = sdpa_seconds(query, heads, tokens, device)
        for cache, parts in CACHES.items():
            row = decode_row(query, heads, tokens, parts)
            what = f"{name:16s} {batch:5d} {tokens:6d} {cache:10s}"
            if row is None:
                print(f"{what} does not fit")
                continue
            rate = row["bytes"] / row["s"]
            row |= {"model": name, "batch": batch, "tokens": tokens, "cache": cache, "of_copy": rate / copy, "sdpa_s": sdpa}
            rows.append(row)
            beside = f"{1e6 * sdpa:9.1f} {sdpa / row['s']:5.2f} x as fast" if sdpa else "does not fit"
            print(f"{what} {1e6 * row['s']:9.1f} {rate / 1e9:7.0f} {rate / copy:7.0%} {beside}", flush=True)
    return rows


def decode_row(query: Tensor, heads: int, tokens: int, parts: Sequence[tuple[float, int, int]]) -> Row | None:
    """Time of one cache, and the bytes it holds; None = it does not fit."""
    from mikv.kernels import pick
    from mikv.kernels.verify import random_segment

    batch, _, dim = query.shape
    number = copies(int(sum(batch * heads * share * tokens * dim * (k + v) / 8 for share, k, v in parts)), query.device)
    if not number:
        return None

    def cache() -> list[Any]:
        tiers = [random_segment(batch, heads, round(s * tokens), dim, k, v, query.device) for s, k, v in parts]
        return [tier._replace(wants_mass=False) for tier in tiers]

    caches = [cache() for _ in range(number)]
    calls = [lambda c=c: pick.decode_attention(query, c, dim**-0.5, "triton") for c in caches]
    return {"kernel": "decode", "s": seconds(calls, query.device), "bytes": held_bytes(caches[0])}


def sdpa_seconds(query: Tensor, heads: int, tokens: int, device: torch.device) -> float | None:
    """torch's own attention of one query per row over 16-bit keys and values."""
    batch, query_heads, dim = query.shape
    number = copies(batch * heads * tokens * dim * 4, device)
    if not number:
        return None
    q = query.to(torch.bfloat16).unsqueeze(2)
    shape = (batch, heads, tokens, dim)
    pairs = [[torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(2)] for _ in range(number)]
    shared = query_heads != heads
    return seconds(
        [lambda k=k, v=v: F.scaled_dot_product_attention(q, k, v, enable_gqa=shared) for k, v in pairs],  # type: ignore[misc]
        device,
    )


def prefill_rows(
    device: torch.device, models: dict[str, tuple[int, int, int]], lengths: Sequence[int], copy: float
) -> list[Row]:
    """Column sums and packing of one prompt; prints a line per row."""
    rows: list[Row] = []
    print("\nprefill of one prompt")
    for (name, (query_heads, heads, dim)), tokens in itertools.product(models.items(), lengths):
        query, key = (torch.randn((1, h, tokens, dim), device=device, dtype=torch.float16) for h in (query_heads, heads))
        for row in (column_row(query, key), *(pack_row(key, bits, copy) for bits in (8, 4, 3, 2))):
            rows.append(row | {"model": name, "tokens": tokens})
            beside = (
                f"{row['of_copy']:.0%} of a copy" if "of_copy" in row else f"{row['s'] / row['attention_s']:.2f} x attention"
            )
            print(f"{name:16s} {tokens:6d} {row['kernel']:12s} {1e6 * row['s']:10.1f} us   {beside}", flush=True)
    return rows


def column_row(query: Tensor, key: Tensor) -> Row:
    """Column sums beside torch's causal attention."""
    from mikv.kernels import pick

    lse = torch.full(query.shape[:3], 8.0, device=query.device)
    scaling, shared = query.shape[3] ** -0.5, query.shape[1] != key.shape[1]
    taken = seconds([lambda: pick.column_sums(query, key, lse, scaling, None, "triton")], query.device)
    whole = seconds([lambda: F.scaled_dot_product_attention(query, key, key, is_causal=True, enable_gqa=shared)], query.device)
    return {"kernel": "column sums", "s": taken, "attention_s": whole}


def pack_row(key: Tensor, bits: int, copy: float) -> Row:
    """Balancing, quantizing and packing, as a share of what a copy of as many bytes takes."""
    from mikv.kernels import pick

    balancer = torch.ones((*key.shape[:2], key.shape[3]), device=key.device)
    taken = seconds([lambda: pick.encode(key, bits, 2, balancer, "triton")], key.device)
    moved = key.numel() * (2 + bits / 8 + 8 / key.shape[3])
    return {"kernel": f"pack {bits}", "s": taken, "of_copy": moved / taken / copy}


def llama2_7b() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=2**15,
    )


def end_to_end(
    device: torch.device, config: Any, dtype: torch.dtype, tokens: int, batches: Sequence[int], steps: int
) -> list[Row]:
    """Decode with random weights: tokens per second and peak memory, full cache and MiKV, by the kernels."""
    from transformers import AutoModelForCausalLM

    from mikv.attention.install import install
    from mikv.engine import Engine
    from mikv.importance.scores import ColumnSums
    from mikv.mikv import mikv
    from mikv.policy import Policy
    from mikv.quant.tier import Tier

    install()
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="mikv").eval()
    engine = Engine(model, frozenset(), 0, "kernel", "triton")
    full = Policy(name="full", label="full", tiers=(Tier(16),))
    rows: list[Row] = []
    print("\nend to end, random weights: decode steps after a prompt")
    for batch, policy in itertools.product(batches, (full, mikv(), mikv(high=Tier(8), low=Tier(2)))):
        prompts = torch.randint(0, config.vocab_size, (batch, tokens)).tolist()
        try:
            state = engine.prefill(prompts, {ColumnSums()})
            cache = engine.compress(state, [policy])
            del state
            if device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            fed, active = torch.zeros(batch, dtype=torch.int64), torch.ones(batch, dtype=torch.bool)
            started = 0.0
            for step in range(steps + 2):
                if step == 2:  # two steps to compile and to warm up
                    started = synchronized(device)
                engine.step(cache, fed, torch.full((batch,), tokens + step), active)
            rate = batch * steps / (synchronized(device) - started)
        except torch.cuda.OutOfMemoryError:
            print(f"{policy.label:20s} batch {batch:3d} {tokens} tokens: does not fit")
            continue
        peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
        held = sum(sum(usage.nbytes.values()) for usage in cache.usage())
        row = {"kernel": "end to end", "policy": policy.label, "batch": batch, "tokens": tokens}
        rows.append(row | {"tokens_per_s": rate, "peak_bytes": peak, "cache_bytes": held})
        print(
            f"{policy.label:20s} batch {batch:3d} {rate:9.1f} tokens/s   peak {peak / 1e9:6.2f} GB   cache {held / 1e9:6.2f} GB"
        )
        del cache
    return rows


def synchronized(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    sys.exit(main())
