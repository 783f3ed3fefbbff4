"""What does a curve of policies and budgets cost here, and what with kvpress? The same prompts, model, methods and budgets.

    python scripts/bench_kvpress.py                                # every method at one budget
    python scripts/bench_kvpress.py --keeps 0.2,0.3,0.5 --json times.json
    python scripts/bench_kvpress.py --only snapkv tova --apart     # and where our own time goes, policy by policy

kvpress runs its presses one after the other: each press and each budget prefills the prompt anew, then decodes. Here one run
does them all: one prefill, then all policies and budgets as rows of one batch. Both get the same threads and prompts and feed
as many tokens after them; both processes live as long as all rounds and take turns, ours then theirs; a first round, which
fills caches, doesn't count. Seconds are of one prompt and the whole curve, medians over rounds; a ratio is the median of the
rounds' ratios. Loading a model is told apart: kvpress is taken to load it once, for all of its runs.

kvpress (0.5.5) runs in an environment of its own, see compare_kvpress.py. float32 on the CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # run from anywhere in a checkout

from scripts.compare_kvpress import (
    KVPRESS,
    PAIRS,
    Pair,
    ask,
    budget,
    check_same_model,
    chosen,
    environment,
    known_policies,
    our_model,
    windows,
    with_ratio,
)

if TYPE_CHECKING:  # --help and a slip are answered at once
    from collections.abc import Iterator

    from torch import Tensor

    from mikv.policy import Policy

CLOCKS = ("processor", "wall")
# Ours has three phases, kvpress compresses within its prefill.
PHASES = {"prefill and compression": ("prefill", "compress"), "decode": ("decode",)}
PARTS = ("prefill", "compress", "decode")
TOTAL = "total"
AIM = 10  # so many times as fast a curve is to be

Phases = Mapping[str, float]  # seconds


@dataclass(frozen=True)
class Point:
    """Of the curve: a pair of methods at a budget. pair: None is the full cache, on both sides."""

    pair: Pair | None
    keep: float
    ratio: float

    @property
    def name(self) -> str:
        return "full" if self.pair is None else f"{self.pair.policy} {self.keep:g}"

    @property
    def asked(self) -> dict[str, Any]:
        """The press, as kvpress_side.py wants it."""
        if self.pair is None:
            return {"press": None, "attention": "sdpa"}
        return {"press": with_ratio(self.pair.press, self.ratio), "attention": self.pair.attention}

    def policy(self) -> Policy:
        from mikv.config import policy

        return policy("full") if self.pair is None else policy(self.pair.policy, {**self.pair.options, "keep": self.keep})


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argument_parser()
    options = parser.parse_args(arguments)
    keeps = options.keeps or (options.keep,)

    from mikv.config import ConfigError
    from mikv.digests import cache_dir

    for name in ("tokens", "prompts", "batch", "steps", "rounds", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)}: at least 1")
    if options.batch > options.prompts:
        parser.error(f"--batch {options.batch}: more than the {options.prompts} prompts that there are (--prompts)")
    try:
        pairs, unknown = chosen(PAIRS, known_policies(), options.only)
        points = curve(pairs, keeps, options.tokens, options.full)
        spec, panel = our_model(options.model), [point.policy() for point in points]
    except (ConfigError, ValueError) as error:
        parser.error(str(error))
    for pair in unknown:
        print(f"left out: {pair.policy}, beside {pair.press_name}: this checkout has no such policy in conf/policy")
    if not pairs:
        parser.error("no pair is left to compare")
    python = environment(options.environment or cache_dir() / KVPRESS.replace("==", "-"))
    # Before torch is imported, here and, as the environment is handed on, there.
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(options.threads)
    busy = [os.getloadavg()[0]]
    begun = time.time()
    ours = Ours.loaded(spec, options.threads)
    our_loading = time.time() - begun
    # one token more than is prefilled: the first that is fed through the compressed cache
    text = windows(ours.tokenizer, options.prompts, options.tokens + 1)
    prompts = [prompt[: options.tokens] for prompt in text]
    our_rounds: list[dict[str, dict[str, float]]] = []

    def our_turn() -> None:
        our_rounds.append(ours.per_prompt(text, panel, options.batch, options.steps))

    timed = {"rounds": options.rounds, "steps": options.steps, "threads": options.threads, "turns": True}
    with tempfile.TemporaryDirectory() as scratch:
        folder = ours.folder(spec, Path(scratch))
        begun = time.time()
        theirs = ask(python, request(folder, prompts, points, timed), len(points) * (1 + options.rounds), "kvpress", our_turn)
    busy.append(os.getloadavg()[0])
    check_same_model(ours.last_keys, theirs["last_keys"])
    loading = {"kvpress": theirs["loaded"] - begun, "ours": our_loading}
    sizes = (options.rounds, options.prompts, options.steps)
    found = {
        clock: compared(rounds_of(theirs["seconds"][clock], *sizes), [our[clock] for our in our_rounds[1:]]) for clock in CLOCKS
    }
    print_report(options, points, found, loading, busy)
    apart = {}
    if options.apart:
        apart = {
            point.name: ours.per_prompt(text[: options.batch], [policy], options.batch, options.steps)["processor"]
            for point, policy in zip(points, panel, strict=True)
        }
        print_apart(apart)
    if options.json is not None:
        report = {
            **{name: getattr(options, name) for name in ("model", "tokens", "prompts", "batch", "steps", "rounds", "threads")},
            "keeps": keeps,
            "curve": [point.name for point in points],
            "load_average": busy,
            "versions": theirs["versions"],
            "loading": loading,
            "seconds": found,
            "presses": {point.name: press_costs(theirs["seconds"], point.name, options.steps) for point in points},
            "apart": apart,
        }
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-recall", help="a name of conf/model; an adapter is merged for both sides")
    parser.add_argument("--tokens", type=int, default=590, help="of a prompt")
    parser.add_argument("--prompts", type=int, default=2, help="how many, one after the other in a text")
    parser.add_argument("--batch", type=int, default=1, help="prompts that ours takes at a time; kvpress takes one")
    parser.add_argument("--steps", type=int, default=16, help="tokens that are decoded after a prompt")
    parser.add_argument("--rounds", type=int, default=3, help="that count")
    parser.add_argument("--threads", type=int, default=1, help="of either side")
    some = parser.add_mutually_exclusive_group()
    some.add_argument("--keep", type=float, default=0.5, help="share of the prompt's tokens that stay, in 0..1")
    some.add_argument("--keeps", type=shares, metavar="KEEP,KEEP,...", help="several, for a curve")
    parser.add_argument(
        "--only", nargs="+", metavar="POLICY", choices=[pair.policy for pair in PAIRS], help="some of the methods"
    )
    parser.add_argument("--full", action="store_true", help="the full cache too, on both sides")
    parser.add_argument("--apart", action="store_true", help="then each of our policies alone: where does our time go?")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was measured to a file")
    parser.add_argument(
        "--environment", type=Path, metavar="FOLDER", help="of kvpress; default: in the user's cache folder, made on first use"
    )
    return parser


def shares(text: str) -> tuple[float, ...]:
    """0.2,0.5 as numbers; what they may be is checked where they are used."""
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: wanted numbers with commas between them, such as 0.2,0.3,0.5") from None
    if len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"{text!r}: one of them comes twice")
    return found


def curve(pairs: Iterable[Pair], keeps: Iterable[float], tokens: int, full: bool) -> list[Point]:
    """Every method at every budget.

    Raises:
        ValueError: a budget leaves nothing to be chosen.
    """
    budgets = [(keep, budget(tokens, keep)[1]) for keep in keeps]
    first = [Point(None, 1.0, 0.0)] if full else []
    return [*first, *(Point(pair, keep, ratio) for pair in pairs for keep, ratio in budgets)]


def request(folder: Path, prompts: Sequence[Sequence[int]], points: Iterable[Point], timed: dict[str, Any]) -> dict[str, Any]:
    """What kvpress_side.py is asked: times."""
    presses = {point.name: point.asked for point in points}
    return {"model": str(folder), "prompts": [list(prompt) for prompt in prompts], "presses": presses, "timed": timed}


def rounds_of(
    presses: Mapping[str, Mapping[str, Sequence[float]]], rounds: int, prompts: int, steps: int
) -> list[dict[str, float]]:
    """Seconds of kvpress per round and phase, of one prompt and all presses, one after the other.

    presses: by name, `prefill` of each round and prompt and `step` of each round, prompt and step, in this order.
    """
    found = [dict.fromkeys(("prefill", "decode"), 0.0) for _ in range(rounds)]
    for name, times in presses.items():
        for phase, key, per_round in (("prefill", "prefill", prompts), ("decode", "step", prompts * steps)):
            if len(times[key]) != rounds * per_round:
                raise ValueError(f"{name}: {len(times[key])} times of {key}, wanted {rounds * per_round}")
            for number, of_round in enumerate(found):
                of_round[phase] += sum(times[key][number * per_round : (number + 1) * per_round]) / prompts
    return found


def compared(theirs: Sequence[Phases], ours: Sequence[Phases]) -> dict[str, dict[str, float]]:
    """By phase, and in total: medians of both sides' rounds, and the median of how many times as fast ours is. What ours spends
    on compression alone is there too, with nothing beside it."""
    found = {}
    for phase, parts in {**PHASES, TOTAL: PARTS}.items():
        both = [
            tuple(sum(of_round.get(part, 0.0) for part in parts) for of_round in pair)
            for pair in zip(theirs, ours, strict=True)
        ]
        found[phase] = {
            "kvpress": statistics.median(their for their, _ in both),
            "ours": statistics.median(our for _, our in both),
            "ratio": statistics.median(their / our for their, our in both),
        }
    found["compression"] = {"ours": statistics.median(our["compress"] for our in ours)}
    return found


def press_costs(seconds: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]], name: str, steps: int) -> dict[str, Any]:
    """Of one press, by clock: median seconds of a prompt's prefill, and of all steps after it."""
    return {
        clock: {
            "prefill": statistics.median(presses[name]["prefill"]),
            "decode": statistics.median(presses[name]["step"]) * steps,
        }
        for clock, presses in seconds.items()
    }


@dataclass
class Ours:
    """Our side: a model, loaded once, and panels that it answers."""

    engine: Any
    tokenizer: Any
    workspace: Any
    _keys: dict[int, Tensor] = field(default_factory=dict)

    @classmethod
    def loaded(cls, spec: Any, threads: int) -> Ours:
        import torch

        from mikv.cache.compressed import Workspace
        from mikv.engine import Engine
        from mikv.models.load import load

        torch.set_num_threads(threads)
        loaded = load(spec)
        # no end tokens: every answer is as long as kvpress's
        return cls(Engine(loaded.model, frozenset(), loaded.tokenizer.pad_token_id or 0), loaded.tokenizer, Workspace())

    def folder(self, spec: Any, scratch: Path) -> Path:
        """Where the other side finds the same weights; merged ones are written there first."""
        if spec.adapter is None:
            return Path(spec.folder or spec.commit.snapshot)
        self.engine.model.save_pretrained(scratch)
        return scratch

    @property
    def last_keys(self) -> Tensor:
        """The last token's keys in the last layer, [prompts, H, D]."""
        import torch

        return torch.cat([self._keys[first] for first in sorted(self._keys)])

    def per_prompt(
        self, text: Sequence[Sequence[int]], panel: Sequence[Policy], batch: int, steps: int
    ) -> dict[str, dict[str, float]]:
        """Seconds by clock and phase, per prompt. text: the prompts, each with the token that follows."""
        spent = {clock: dict.fromkeys(PARTS, 0.0) for clock in CLOCKS}
        for first in range(0, len(text), batch):
            self._run(text, range(first, min(first + batch, len(text))), panel, steps, spent)
        return {clock: {phase: of / len(text) for phase, of in phases.items()} for clock, phases in spent.items()}

    def _run(
        self,
        text: Sequence[Sequence[int]],
        rows: range,
        panel: Sequence[Policy],
        steps: int,
        spent: dict[str, dict[str, float]],
    ) -> None:
        """As Engine.generate does it."""
        import torch

        from mikv.engine.generate import decode_answers
        from mikv.engine.requests import Decoding, Prompt

        prompts = [Prompt(text[row][:-1], text[row][-1:]) for row in rows]
        contexts = [prompt.context for prompt in prompts]
        with torch.inference_mode():
            with watched(spent, "prefill"):
                state = self.engine.prefill(contexts, set().union(*(policy.observers for policy in panel)))
            self._keys[rows.start] = state.banks[-1].keys[-1, :, :, -1].clone()
            with watched(spent, "compress"):
                lengths = torch.tensor([len(context) for context in contexts])  # as kvpress counts a prompt
                cache = self.engine.compress(state, panel, lengths, self.workspace)
            del state
            with watched(spent, "decode"):
                decode_answers(self.engine, cache, prompts, len(panel), Decoding(steps), (), lambda _: None)


@contextmanager
def watched(spent: dict[str, dict[str, float]], phase: str) -> Iterator[None]:
    """Add what a phase takes to what was spent, by both clocks."""
    processor, wall = time.process_time(), time.perf_counter()
    yield
    spent["processor"][phase] += time.process_time() - processor
    spent["wall"][phase] += time.perf_counter() - wall


def print_report(
    options: argparse.Namespace,
    points: Sequence[Point],
    found: Mapping[str, Mapping[str, Mapping[str, float]]],
    loading: Mapping[str, float],
    busy: Sequence[float],
) -> None:
    from rich.table import Table

    from mikv.columns import console

    title = (
        f"{options.model}, a curve of {len(points)} points, {options.prompts} prompts of {options.tokens} tokens "
        f"({options.batch} at a time), {options.steps} tokens decoded, threads: {options.threads}, rounds: {options.rounds}"
    )
    table = Table("seconds per prompt", title=title)
    for name in ("clock", "kvpress", "ours", "times as fast"):
        table.add_column(name, justify="right")
    for phase in (*PHASES, TOTAL):
        for clock in CLOCKS:
            of = found[clock][phase]
            table.add_row(phase, clock, f"{of['kvpress']:.2f}", f"{of['ours']:.2f}", f"{of['ratio']:.1f}")
    console().print(table)
    of_it = ", ".join(f"{found[clock]['compression']['ours']:.2f} s ({clock})" for clock in CLOCKS)
    print(f"of ours, compression alone: {of_it}")
    print(f"loading, once, apart from all this: kvpress {loading['kvpress']:.1f} s, ours {loading['ours']:.1f} s (wall)")
    print(f"load average of the machine: {busy[0]:.1f} before, {busy[-1]:.1f} after")
    print(verdict(found["processor"][TOTAL]["ratio"]))


def verdict(ratio: float) -> str:
    reached = "reached" if ratio >= AIM else "not reached"
    return f"{ratio:.1f} times as fast in processor time; the aim of {AIM} is {reached}"


def print_apart(apart: Mapping[str, Phases]) -> None:
    from rich.table import Table

    from mikv.columns import console

    table = Table("each of our policies alone", title="processor seconds per prompt")
    for part in PARTS:
        table.add_column(part, justify="right")
    for name, of in sorted(apart.items(), key=lambda item: -sum(item[1].values())):
        table.add_row(name, *(f"{of[part]:.2f}" for part in PARTS))
    console().print(table)


if __name__ == "__main__":
    main()
