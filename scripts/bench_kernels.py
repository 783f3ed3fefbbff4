"""Time the kernels on a GPU, after they have been found correct there. Without a GPU: the correctness part alone, interpreted.

    python scripts/bench_kernels.py --json kernels.json
    python scripts/bench_kernels.py --batches 8 --tokens 16384 --models Llama-3-8B --caches "8;2;trellis 2" --only decode

*Decode attention* by model, batch, length and cache: time, bandwidth of the bytes the cache holds as a share of a copy
measured in the same run, and the time of torch's scaled_dot_product_attention over the same tokens in BF16 as a multiple.
Column sums beside causal attention, packing beside a copy. *Choices*: the same caches with other limits of registers, other
numbers of programs, a value-scale pass of other blocks. *End to end*: a Llama-2-7B of random weights by transformers' own
attention, with a full cache, MiKV and our own policy, alone and as a panel: tokens per second and peak memory.

The file is written after every row. What fails is said, with its error, and the rest goes on; the exit status is then 1.

Times are medians; buffers are rotated so that no call finds its data in the L2 cache; launches are recorded in a CUDA graph,
so that a kernel is timed and not Python. What does not fit into memory is left out, and said.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # run from anywhere in a checkout

import torch
import torch.nn.functional as F
from torch import Tensor

# What a cache is made of: share of the tokens, bits of keys, bits of values, kind of their codes.
CACHES: dict[str, list[tuple[float, int, int, str]]] = {
    "16": [(1.0, 16, 16, "affine")],
    "8": [(1.0, 8, 8, "affine")],
    "4": [(1.0, 4, 4, "affine")],
    "3": [(1.0, 3, 3, "affine")],
    "2": [(1.0, 2, 2, "affine")],
    "20% 16, 2": [(0.2, 16, 16, "affine"), (0.8, 2, 2, "affine")],
    "20% 8, 2": [(0.2, 8, 8, "affine"), (0.8, 2, 2, "affine")],
    "trellis 2": [(1.0, 2, 2, "trellis")],
    "trellis k3v2": [(1.0, 3, 2, "trellis")],
    "trellis 3": [(1.0, 3, 3, "trellis")],
    "trellis k4v3": [(1.0, 4, 3, "trellis")],
    "codebook 2": [(1.0, 2, 2, "codebook")],
    "codebook 4": [(1.0, 4, 4, "codebook")],
    "codebook 5": [(1.0, 5, 5, "codebook")],
}
MODELS = {"Llama-2-7B": (32, 32, 128), "Llama-3-8B": (32, 8, 128), "SmolLM2-135M": (9, 3, 64), "SmolLM2-1.7B": (32, 32, 64)}
# Other values of mikv/kernels/decode_launch.py's numbers, one at a time.
CHOICES: dict[str, list[int]] = {
    "as it is": [],
    "REGISTERS": [168, 255],
    "PROGRAMS_PER_PROCESSOR": [8, 16, 24],
    "SCALES_AT_ONCE": [64, 256],
}
PARTS = ("decode", "choices", "prefill", "end to end")
ROUNDS = 15
Row = dict[str, Any]


class Journal:
    """Rows, written after each one; what fails is a row, too."""

    def __init__(self, path: Path | None, environment: Row) -> None:
        self.path, self.environment = path, environment
        self.rows: list[Row] = []

    def add(self, what: Row, measure: Callable[[], Row | None], say: Callable[[Row], str]) -> None:
        """Measure, print, write down. None = does not fit."""
        label = "  ".join(f"{value}" for value in what.values())
        try:
            measured = measure()
        except Exception as error:
            traceback.print_exc(limit=-6)
            self.rows.append(what | {"error": f"{type(error).__name__}: {error}"[:500]})
            print(f"{label:44s} FAILED")
        else:
            self.rows.append(what | (measured or {"fits": False}))
            print(f"{label:44s} {say(measured) if measured else 'does not fit'}", flush=True)
        if self.path is not None:
            text = json.dumps({"environment": self.environment, "rows": self.rows}, indent=1)
            self.path.write_text(text + "\n", encoding="utf-8")

    @property
    def failed(self) -> int:
        return sum("error" in row for row in self.rows)


def main() -> int:
    args = options().parse_args()
    gpu = torch.cuda.is_available()
    if not gpu:
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
    device = torch.device("cuda" if gpu else "cpu")
    print(f"{torch.cuda.get_device_name() if gpu else 'no GPU: kernels are interpreted on the CPU, nothing is timed'}")
    models = {name: MODELS[name] for name in args.models.split(",")}
    if not correct(device, models, (1, 70) if not gpu else (1, 1000, 4097)):
        print("kernels are wrong: nothing is timed")
        return 1
    if not gpu:
        return 0
    caches = {name: CACHES[name] for name in args.caches.split(";")}
    batches, lengths = ([int(n) for n in text.split(",")] for text in (args.batches, args.tokens))
    parts = [part.strip() for part in args.only.split(",")]
    copy = copy_bandwidth(device)
    print(f"\ncopy: {copy / 1e9:.0f} GB/s, read and written")
    environment = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": version("triton")}
    journal = Journal(args.json, environment | {"date": time.strftime("%Y-%m-%d"), "copy_bytes_per_s": copy})
    if "decode" in parts:
        decode_rows(journal, device, models, batches, lengths, caches, copy)
    if "choices" in parts:
        choice_rows(journal, device, models, batches, lengths, caches, copy)
    if "prefill" in parts:
        prefill_rows(journal, device, models, lengths, copy)
    if "end to end" in parts:
        end_to_end(journal, device, llama2_7b(), torch.float16, tokens=4096, batches=(1, 4), steps=16)
    print(f"\nrows are in {args.json}" + (f"; {journal.failed} failed" if journal.failed else ""))
    return 1 if journal.failed else 0


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--tokens", default="4096,16384,32768")
    parser.add_argument("--caches", default=";".join(CACHES), help="of the decode rows, with semicolons between")
    parser.add_argument("--only", default=",".join(PARTS), help="parts to run: " + ", ".join(PARTS))
    parser.add_argument("--json", type=Path, default=Path("bench_kernels.json"), help="where the rows go (on a GPU)")
    return parser


def correct(device: torch.device, models: dict[str, tuple[int, int, int]], lengths: Sequence[int]) -> bool:
    """Every kernel against its reference; prints what was compared."""
    from mikv.kernels import pick
    from mikv.kernels.verify import MASS_TOLERANCE, TOLERANCE, decode_errors, random_segment

    fine = True

    def report(name: str, error: float, allowed: float) -> None:
        nonlocal fine
        fine &= error <= allowed
        print(f"{name:60s} {error:.1e}  {'ok' if error <= allowed else f'WRONG, at most {allowed:.0e}'}")

    for (name, (query_heads, heads, dim)), tokens in itertools.product(models.items(), lengths):
        generator = torch.Generator(device).manual_seed(tokens)
        group = query_heads // heads
        heads = min(heads, 2)
        query = torch.randn((2, group * heads, dim), generator=generator, device=device).half()
        errors = []
        for parts in CACHES.values():
            segments = [
                random_segment(2, heads, math.ceil(s * tokens), dim, k, v, device, generator, kind=kind)
                for s, k, v, kind in parts
            ]
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
        unit = key[0, 0].float()
        for bits in (5, 4, 3, 2):
            codes = [searched(unit, bits, kernel) for kernel in (True, False)]
            share = float((codes[0] != codes[1]).float().mean())
            report(f"trellis at {bits} bits, {name}, {tokens} tokens: share unequal", share, 0.0)
    return fine


def searched(unit: Tensor, bits: int, kernel: bool) -> Tensor:
    """Codes of a trellis, by the kernel or by torch."""
    from mikv.kernels.search_launch import search
    from mikv.quant.codes.trellis import Trellis, cells, walk

    edges, within, nearest = cells(Trellis(bits).table(unit.device))
    cell = torch.bucketize(unit, edges, out_int32=True)
    return (search if kernel else walk)(unit, cell, nearest, within)


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
    """Bytes per second that a copy reads and writes. By a kernel: a copy's own engine, which a graph takes, is slower."""
    source = torch.zeros(size // 4, dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    return 2 * size / seconds([lambda: torch.neg(source, out=target)], device)


def decode_rows(
    journal: Journal,
    device: torch.device,
    models: dict[str, tuple[int, int, int]],
    batches: Sequence[int],
    lengths: Sequence[int],
    caches: dict[str, list[tuple[float, int, int, str]]],
    copy: float,
) -> None:
    """Decode attention."""
    print("\ndecode attention: model, batch, tokens, cache          us    GB/s of copy   SDPA us")
    for (name, (query_heads, heads, dim)), batch, tokens in itertools.product(models.items(), batches, lengths):
        query = torch.randn((batch, query_heads, dim), device=device, dtype=torch.float16)
        sdpa = sdpa_seconds(query, heads, tokens, device)
        beside = {"sdpa_s": sdpa, "copy": copy}
        for cache, parts in caches.items():
            what = {"kernel": "decode", "model": name, "batch": batch, "tokens": tokens, "cache": cache}
            journal.add(what, partial(decode_row, query, heads, tokens, parts, beside), _decode_text)


def _decode_text(row: Row) -> str:
    rate, sdpa = row["bytes"] / row["s"], row["sdpa_s"]
    beside = f"{1e6 * sdpa:9.1f} {sdpa / row['s']:5.2f} x as fast" if sdpa else "does not fit"
    return f"{1e6 * row['s']:9.1f} {rate / 1e9:7.0f} {row['of_copy']:7.0%} {beside}"


def decode_row(query: Tensor, heads: int, tokens: int, parts: Sequence[tuple[float, int, int, str]], beside: Row) -> Row | None:
    """Time of one cache, and the bytes it holds; None = it does not fit. beside: what it is compared with."""
    from mikv.kernels import pick
    from mikv.kernels.verify import random_segment

    batch, query_heads, dim = query.shape
    number = copies(int(sum(batch * heads * share * tokens * dim * (k + v) / 8 for share, k, v, _ in parts)), query.device)
    if not number:
        return None

    def cache() -> list[Any]:
        tiers = [random_segment(batch, heads, round(s * tokens), dim, k, v, query.device, kind=kind) for s, k, v, kind in parts]
        shape = (-1, -1, query_heads // heads, -1)  # as a cache gives it: every query has its own shift
        shifts = [None if tier.shift is None else tier.shift.expand(shape).contiguous() for tier in tiers]
        return [tier._replace(wants_mass=False, shift=shift) for tier, shift in zip(tiers, shifts, strict=True)]

    caches = [cache() for _ in range(number)]
    calls = [lambda c=c: pick.decode_attention(query, c, dim**-0.5, "triton") for c in caches]
    taken, held = seconds(calls, query.device), held_bytes(caches[0])
    return {"s": taken, "bytes": held, "of_copy": held / taken / beside["copy"], "sdpa_s": beside["sdpa_s"]}


def choice_rows(
    journal: Journal,
    device: torch.device,
    models: dict[str, tuple[int, int, int]],
    batches: Sequence[int],
    lengths: Sequence[int],
    caches: dict[str, list[tuple[float, int, int, str]]],
    copy: float,
) -> None:
    """Decode attention at the largest batch and length, with other numbers than the launches'."""
    from mikv.kernels import decode_launch

    print("\nchoices: model, cache, what else")
    tried = [(name, value) for name, values in CHOICES.items() for value in (values or (None,))]
    for (model, (query_heads, heads, dim)), (cache, parts) in itertools.product(models.items(), caches.items()):
        query = torch.randn((max(batches), query_heads, dim), device=device, dtype=torch.float16)
        for name, value in tried:
            usual = getattr(decode_launch, name, None)
            what = {"kernel": "choice", "model": model, "cache": cache, "choice": name, "value": value}
            beside = {"sdpa_s": None, "copy": copy}
            try:
                if value is not None:
                    setattr(decode_launch, name, value)
                measure = partial(decode_row, query, heads, max(lengths), parts, beside)
                journal.add(what, measure, lambda row: f"{1e6 * row['s']:9.1f} us {row['of_copy']:7.0%}")
            finally:
                if value is not None:
                    setattr(decode_launch, name, usual)


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
    journal: Journal, device: torch.device, models: dict[str, tuple[int, int, int]], lengths: Sequence[int], copy: float
) -> None:
    """Column sums and packing of one prompt."""
    print("\nprefill of one prompt")
    for (name, (query_heads, heads, dim)), tokens in itertools.product(models.items(), lengths):
        query, key = (torch.randn((1, h, tokens, dim), device=device, dtype=torch.float16) for h in (query_heads, heads))
        what = {"model": name, "tokens": tokens}
        journal.add({"kernel": "column sums"} | what, partial(column_row, query, key), _prefill_text)
        for bits in (8, 4, 3, 2):
            journal.add({"kernel": f"pack {bits}"} | what, partial(pack_row, key, bits, copy), _prefill_text)
        for bits in (2, 3, 4):
            journal.add({"kernel": f"trellis {bits}"} | what, partial(trellis_row, key, bits, copy), _prefill_text)


def _prefill_text(row: Row) -> str:
    beside = f"{row['of_copy']:.0%} of a copy" if "of_copy" in row else f"{row['s'] / row['attention_s']:.2f} x attention"
    return f"{1e6 * row['s']:10.1f} us   {beside}"


def column_row(query: Tensor, key: Tensor) -> Row:
    """Column sums beside torch's causal attention."""
    from mikv.kernels import pick

    lse = torch.full(query.shape[:3], 8.0, device=query.device)
    scaling, shared = query.shape[3] ** -0.5, query.shape[1] != key.shape[1]
    taken = seconds([lambda: pick.column_sums(query, key, lse, scaling, None, "triton")], query.device)
    whole = seconds([lambda: F.scaled_dot_product_attention(query, key, key, is_causal=True, enable_gqa=shared)], query.device)
    return {"s": taken, "attention_s": whole}


def pack_row(key: Tensor, bits: int, copy: float) -> Row:
    """Balancing, quantizing and packing, as a share of what a copy of as many bytes takes."""
    from mikv.kernels import pick

    balancer = torch.ones((*key.shape[:2], key.shape[3]), device=key.device)
    taken = seconds([lambda: pick.encode(key, bits, 2, balancer, "triton")], key.device)
    moved = key.numel() * (2 + bits / 8 + 8 / key.shape[3])
    return {"s": taken, "of_copy": moved / taken / copy}


def trellis_row(key: Tensor, bits: int, copy: float) -> Row:
    """Coding by a trellis (torch), as a share of what a copy of as many bytes takes."""
    from mikv.quant.codes.trellis import Trellis

    code = Trellis(bits)
    moved = key.numel() * (2 + bits / 8 + 2 / key.shape[3])
    taken = seconds([lambda: code.encode(key.float(), torch.float16)], key.device)
    return {"s": taken, "of_copy": moved / taken / copy}


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
    journal: Journal, device: torch.device, config: Any, dtype: torch.dtype, tokens: int, batches: Sequence[int], steps: int
) -> None:
    """Decode with random weights: tokens per second and peak memory; alone, by transformers' own cache, and as a panel."""
    from transformers import AutoModelForCausalLM

    from mikv.attention.install import install
    from mikv.engine import Engine
    from mikv.mikv import mikv
    from mikv.policy import Policy
    from mikv.quant.tier import Tier
    from mikv.whiten import whiten

    install()
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="mikv").eval()
    engine = Engine(model, frozenset(), 0, "kernel", "triton")
    full = Policy(name="full", label="full", tiers=(Tier(16),))
    alone = [full, mikv(), mikv(high=Tier(8), low=Tier(2)), whiten(), whiten("k4v3", newest=8)]
    panels = {policy.label: [policy] for policy in alone} | {"all of them": alone}
    print("\nend to end, random weights: what, batch, tokens")
    for batch in batches:
        prompts = torch.randint(0, config.vocab_size, (batch, tokens)).tolist()
        what = {"kernel": "end to end", "policy": "transformers", "batch": batch, "tokens": tokens}
        journal.add(what, partial(stock_row, model, prompts, steps), _end_to_end_text)
        for label, panel in panels.items():
            measure = partial(panel_row, engine, panel, prompts, steps)
            journal.add(what | {"policy": label}, measure, _end_to_end_text)


def _end_to_end_text(row: Row) -> str:
    held = f"   cache {row['cache_bytes'] / 1e9:6.2f} GB" if "cache_bytes" in row else ""
    return (
        f"{row['tokens_per_s']:9.1f} tokens/s   prefill {row['prefill_s']:6.2f} s   compress {row['compress_s']:6.2f} s   "
        f"peak {row['peak_bytes'] / 1e9:6.2f} GB{held}"
    )


@torch.inference_mode()
def stock_row(model: Any, prompts: list[list[int]], steps: int) -> Row | None:
    """transformers' own growing cache and torch's attention."""
    device = model.device
    model.set_attn_implementation("sdpa")
    try:
        _free(device)
        ids = torch.tensor(prompts, device=device)
        begun = synchronized(device)
        cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
        prefilled = started = synchronized(device)
        for step in range(steps + 2):
            if step == 2:  # two steps to warm up
                started = synchronized(device)
            model(ids[:, :1], past_key_values=cache, use_cache=True, logits_to_keep=1)
        rate = len(prompts) * steps / (synchronized(device) - started)
    except torch.cuda.OutOfMemoryError:
        return None
    finally:
        model.set_attn_implementation("mikv")
    return {"tokens_per_s": rate, "prefill_s": prefilled - begun, "compress_s": 0.0, "peak_bytes": _peak(device)}


def panel_row(engine: Any, panel: Sequence[Any], prompts: list[list[int]], steps: int) -> Row | None:
    """A panel in our engine; tokens of all its policies are counted."""
    device = engine.model.device
    rows = len(prompts) * len(panel)
    try:
        _free(device)
        begun = synchronized(device)
        state = engine.prefill(prompts, set().union(*(policy.observers for policy in panel)))
        prefilled = synchronized(device)
        cache = engine.compress(state, panel)
        compressed = started = synchronized(device)
        del state
        _free(device)
        fed, active = torch.zeros(rows, dtype=torch.int64), torch.ones(rows, dtype=torch.bool)
        for step in range(steps + 2):
            if step == 2:  # two steps to compile and to warm up
                started = synchronized(device)
            engine.step(cache, fed, torch.full((rows,), len(prompts[0]) + step), active)
        rate = rows * steps / (synchronized(device) - started)
    except torch.cuda.OutOfMemoryError:
        return None
    held = sum(sum(usage.nbytes.values()) for usage in cache.usage())
    times = {"prefill_s": prefilled - begun, "compress_s": compressed - prefilled}
    return {"tokens_per_s": rate, **times, "peak_bytes": _peak(device), "cache_bytes": held}


def _free(device: torch.device) -> None:
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else 0


def synchronized(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    sys.exit(main())
