"""Do our policies keep the tokens that the presses of kvpress keep? The same model, prompts and budget, layer by layer.

    python scripts/compare_kvpress.py
    python scripts/compare_kvpress.py --keep 0.25 --tokens 1000 --only snapkv adakv --json overlap.json

A whole prompt goes through the model, then each side compresses its cache. overlap: tokens that both keep over those that one
keeps (the larger number, should they differ), summed over a layer's KV heads, mean over layers and prompts; worst: the lowest
mean of a layer. Two that choose at random would overlap by `keep`. Where it is not 1, the table says how many tokens differ,
and why, if a reason is known.

kvpress (0.5.5) wants an older transformers than this project: it gets an environment of its own, made on first use, and
scripts/kvpress_side.py runs in it. float32 on the CPU.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # run from anywhere in a checkout

if TYPE_CHECKING:  # --help and a slip are answered at once
    from torch import Tensor

    from mikv.policy import Policy

KVPRESS = "kvpress==0.5.5"
MODEL = "smollm2-135m"
SIDE = Path(__file__).with_name("kvpress_side.py")
# What the two sides' keys of the last layer may differ by: float32, and 30 layers of two ways to the same attention.
SAME_KEYS = 1e-3

Press = dict[str, Any]


@dataclass(frozen=True)
class Pair:
    """One of our policies and the press that means the same.

    Args:
        policy, options: a name of conf/policy, and what is set beside `keep`.
        press: its class and parameters as kvpress_side.py wants them, without the compression ratio.
        why: two sides that are right may keep different tokens; '' = they may not.
        attention: eager where a press wants to see all of it.
    """

    policy: str
    options: dict[str, Any]
    press: Press
    why: str = ""
    attention: str = "sdpa"

    @property
    def press_name(self) -> str:
        """CriticalKVPress(SnapKVPress)."""
        inner = self.press.get("press")
        return self.press["class"] + (f"({inner['class']})" if inner else "")


WINDOW = {"window": 32, "kernel": 5}
SNAPKV = {"class": "SnapKVPress", "window_size": 32, "kernel_size": 5}
PAIRS = (
    Pair("streaming_llm", {"budget": "fixed", "sinks": 4}, {"class": "StreamingLLMPress", "n_sink": 4}),
    Pair(
        "h2o",
        {"budget": "fixed"},
        {"class": "ObservedAttentionPress"},
        why="the paper's H2O keeps half of the budget for the most recent tokens and sums attention; the press has no recent "
        "tokens and takes the mean over the queries that could see a token",
        attention="eager",
    ),
    Pair(
        "knorm",
        {},
        {"class": "KnormPress"},
        why="in the first layer a word's keys are equally long wherever it stands, and rounding decides which of them stays",
    ),
    Pair("keydiff", {}, {"class": "KeyDiffPress"}),
    Pair("tova", {}, {"class": "TOVAPress"}),
    Pair("snapkv", WINDOW, SNAPKV),
    Pair("adakv", {**WINDOW, "least": 0.2}, {"class": "AdaKVPress", "alpha_safeguard": 0.2, "press": SNAPKV}),
    Pair("pyramidkv", {**WINDOW, "beta": 20}, {**SNAPKV, "class": "PyramidKVPress", "beta": 20}),
    Pair("expected_attention", {}, {"class": "ExpectedAttentionPress"}),
    Pair("criticalkv", WINDOW, {"class": "CriticalKVPress", "press": SNAPKV}),
)


@dataclass(frozen=True)
class Agreement:
    """Of the tokens that two sides keep.

    layers: the overlap of each, mean over prompts; kept: tokens that each side keeps, of all layers, heads and prompts;
    differing: how many tokens only one side keeps, the larger of the two numbers.
    """

    layers: tuple[float, ...] = field(repr=False)
    kept: tuple[int, int]
    differing: int

    @property
    def mean(self) -> float:
        return sum(self.layers) / len(self.layers)

    @property
    def worst(self) -> int:
        return min(range(len(self.layers)), key=self.layers.__getitem__)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=float, default=0.5, help="share of the prompt's tokens that stay, in 0..1")
    parser.add_argument("--tokens", type=int, default=400, help="of a prompt")
    parser.add_argument("--prompts", type=int, default=3, help="how many, one after the other in a text")
    parser.add_argument(
        "--only", nargs="+", metavar="POLICY", choices=[pair.policy for pair in PAIRS], help="some of the pairs"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was found, layer by layer, to a file")
    parser.add_argument(
        "--environment", type=Path, metavar="FOLDER", help="of kvpress; default: in the user's cache folder, made on first use"
    )
    options = parser.parse_args(arguments)

    from mikv.config import ConfigError, policy
    from mikv.digests import cache_dir

    if options.prompts < 1:
        parser.error(f"--prompts {options.prompts}: at least 1")
    try:
        kept, ratio = budget(options.tokens, options.keep)
        pairs, unknown = chosen(PAIRS, known_policies(), options.only)
        panel = [policy(pair.policy, {**pair.options, "keep": options.keep}) for pair in pairs]
    except (ConfigError, ValueError) as error:
        parser.error(str(error))
    for pair in unknown:
        print(f"left out: {pair.policy}, beside {pair.press_name}: this checkout has no such policy in conf/policy")
    if not pairs:
        parser.error("no pair is left to compare")
    python = environment(options.environment or cache_dir() / KVPRESS.replace("==", "-"))
    folder, prompts = model_and_prompts(options.prompts, options.tokens)
    theirs = ask(python, request(folder, prompts, pairs, ratio), len(pairs), "kvpress")
    ours, last_keys = our_choice(prompts, panel)
    check_same_model(last_keys, theirs["last_keys"])
    found = [agreement(mine, mask(theirs["kept"][pair.policy], options.tokens)) for pair, mine in zip(pairs, ours, strict=True)]
    title = f"{MODEL}, {options.prompts} prompts of {options.tokens} tokens, {kept} kept per layer and head on average"
    print_table(title, pairs, found)
    if options.json is not None:
        described = {"model": MODEL, "tokens": options.tokens, "prompts": options.prompts, "keep": options.keep, "kept": kept}
        report = {
            **described,
            "compression_ratio": ratio,
            "versions": theirs["versions"],
            "pairs": [row(*both) for both in zip(pairs, found, strict=True)],
            "unknown": [pair.policy for pair in unknown],
        }
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def budget(tokens: int, keep: float) -> tuple[int, float]:
    """How many tokens of a prompt stay, and the compression ratio that lets kvpress keep as many.

    kvpress rounds down in floating point: of 400 tokens its ratio 0.8 keeps 79. Then it gets the next lower number.
    """
    from mikv.budget import check_ratio, exact

    check_ratio("--keep", keep)
    kept = math.floor(exact(keep) * tokens)
    if not 0 < kept < tokens:
        raise ValueError(f"--keep {keep} --tokens {tokens}: {kept} tokens stay; nothing is to be chosen")
    ratio = (tokens - kept) / tokens
    while int(tokens * (1 - ratio)) < kept:
        ratio = math.nextafter(ratio, 0)
    return kept, ratio


def known_policies() -> set[str]:
    from mikv.config import CONF

    return {file.stem for file in (CONF / "policy").glob("[!_]*.yaml")}


def chosen(pairs: Iterable[Pair], known: Collection[str], only: Collection[str] | None) -> tuple[list[Pair], list[Pair]]:
    """The pairs to compare, and those that are asked for and whose policy this checkout has not got."""
    asked = [pair for pair in pairs if only is None or pair.policy in only]
    return [pair for pair in asked if pair.policy in known], [pair for pair in asked if pair.policy not in known]


def request(folder: Path, prompts: Sequence[Sequence[int]], pairs: Iterable[Pair], ratio: float) -> dict[str, Any]:
    """What kvpress_side.py is asked: which tokens stay."""
    presses = {pair.policy: {"press": with_ratio(pair.press, ratio), "attention": pair.attention} for pair in pairs}
    return {"model": str(folder), "prompts": [list(prompt) for prompt in prompts], "presses": presses, "timed": None}


def with_ratio(press: Press, ratio: float) -> Press:
    """A press with its compression ratio, which is a parameter of the innermost one."""
    if "press" in press:
        return {**press, "press": with_ratio(press["press"], ratio)}
    return {**press, "compression_ratio": ratio}


def environment(folder: Path) -> Path:
    """The Python of the environment that has kvpress, which is made where there is none."""
    folder = folder.expanduser().resolve()
    python, made = folder / "bin" / "python", folder / f"has-{KVPRESS}"
    if made.is_file():
        return python
    from tqdm import tqdm

    print(f"making an environment for {KVPRESS} in {folder}, once (a minute or more, about 1.5 GB) ...", flush=True)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "-q"]
    # Torch as it is here, first: the same arithmetic on both sides, and no CUDA that a CPU has no use for. The build is not on
    # every index; then its version alone.
    ours = importlib.metadata.version("torch")
    with tqdm(total=3, desc="environment", unit="part") as bar:
        install("a virtual environment", [sys.executable, "-m", "venv", str(folder)])
        bar.update()
        install(f"torch {ours}", [*pip, f"torch=={ours}"], [*pip, f"torch=={ours.partition('+')[0]}"])
        bar.update()
        install(KVPRESS, [*pip, KVPRESS])
        bar.update()
    made.touch()  # last: an environment that was left half-made is gone on with
    return python


def install(what: str, *commands: Sequence[str]) -> None:
    """Run the first of some commands that works.

    Raises:
        SystemExit: none does; with what the last one said.
    """
    said = ""
    for command in commands:
        ran = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if not ran.returncode:
            return
        said = ran.stdout
    raise SystemExit(f"{what} could not be installed for the comparison:\n{said[-3000:]}")


def ask(python: Path, asked: dict[str, Any], pieces: int, name: str, turn: Callable[[], None] | None = None) -> dict[str, Any]:
    """The answer of kvpress_side.py, and a progress bar of so many pieces of work until then.

    turn: what is done whenever the other side lets this one have its turn; it waits meanwhile.

    Raises:
        SystemExit: it failed; with what it said.
    """
    from tqdm import tqdm

    with tempfile.TemporaryDirectory() as scratch, tqdm(total=pieces, desc=name, unit="press") as bar:
        asked_in, answered_in = Path(scratch) / "request.json", Path(scratch) / "response.json"
        asked_in.write_text(json.dumps(asked), encoding="utf-8")
        command = [str(python), "-I", str(SIDE), str(asked_in), str(answered_in)]  # -I: no PYTHONPATH of this project
        offline = {**os.environ, "HF_HUB_OFFLINE": "1"}  # all that it needs is in a folder
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=offline
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            said = []
            for line in process.stdout:
                if line.strip() == "done":
                    bar.update()
                elif line.strip() == "turn" and turn is not None:
                    turn()
                    process.stdin.write("\n")
                    process.stdin.flush()
                else:
                    said.append(line)
        if process.returncode:
            raise SystemExit(f"kvpress failed:\n{''.join(said)[-3000:]}")
        answer: dict[str, Any] = json.loads(answered_in.read_text(encoding="utf-8"))
    return answer


def model_and_prompts(rows: int, length: int) -> tuple[Path, list[list[int]]]:
    """The folder that both sides load the model from, and windows of a text."""
    from mikv.models.load import load_tokenizer

    spec = our_model()
    folder = spec.folder or spec.commit.snapshot
    return folder, windows(load_tokenizer(spec), rows, length)


def windows(tokenizer: Any, rows: int, length: int) -> list[list[int]]:
    """So many prompts of so many tokens, one after the other in a text."""
    from mikv.work.fidelity import TEXTS

    text = tokenizer(TEXTS["prose"].read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)["input_ids"]
    if len(text) < rows * length:
        raise SystemExit(f"the text has {len(text)} tokens, too few for {rows} prompts of {length}")
    return [text[row * length : (row + 1) * length] for row in range(rows)]


def our_model(name: str = MODEL) -> Any:
    from mikv.config import compose

    return compose(f"model={name}", "task=fidelity", "model.dtype=float32", "model.device=cpu").model


def our_choice(prompts: Sequence[Sequence[int]], panel: Sequence[Policy]) -> tuple[list[Tensor], Tensor]:
    """The tokens that each policy keeps, bool [L, B, H, T], and the last token's keys in the last layer, [B, H, D]."""
    import torch
    from tqdm import tqdm

    from mikv.engine import Engine
    from mikv.models.load import load

    loaded = load(our_model())
    engine = Engine(loaded.model, loaded.end_tokens, loaded.max_tokens)
    with torch.inference_mode():  # a policy may multiply by the model's weights
        state = engine.prefill(prompts, set().union(*(policy.observers for policy in panel)))
        found = [held(engine.compress(state, [policy]), len(prompts[0])) for policy in tqdm(panel, desc="ours", unit="policy")]
    return found, state.banks[-1].keys[-1, :, :, -1]


def held(cache: Any, tokens: int) -> Tensor:
    """The tokens that a cache of one policy holds, in whichever tier: bool [L, B, H, T]."""
    import torch

    layers = []
    for bank in cache.banks:
        (store,) = bank.stores
        shape = store.tiers[0].positions().shape[:3]
        here = torch.zeros((*shape, tokens + 1), dtype=torch.bool)
        for tier in store.tiers:
            positions = tier.positions()
            # what lies in a slot that is not used is no position: it goes behind the last token
            here.scatter_(-1, positions.masked_fill(~tier.used().expand(positions.shape), tokens), True)
        layers.append(here[..., :tokens])
    return torch.cat(layers)


def mask(kept: Sequence[Sequence[Sequence[Sequence[int]]]], tokens: int) -> Tensor:
    """Positions per prompt, layer and KV head as bool [L, B, H, T]."""
    import torch

    shape = (len(kept[0]), len(kept), len(kept[0][0]), tokens)
    found = torch.zeros(shape, dtype=torch.bool)
    for prompt, layers in enumerate(kept):
        for layer, heads in enumerate(layers):
            for head, positions in enumerate(heads):
                found[layer, prompt, head, positions] = True
    return found


def check_same_model(ours: Tensor, theirs: Sequence[Sequence[Sequence[float]]]) -> None:
    """What the last layer makes of the last token depends on all weights, and on how positions are turned.

    Raises:
        SystemExit: the two sides differ in it: no comparison of presses would mean anything.
    """
    import torch

    other = torch.tensor(theirs)
    distance = float((ours - other).norm() / other.norm())
    if not distance < SAME_KEYS:
        raise SystemExit(f"the two sides do not run the same model: keys of the last layer are {distance:.2g} apart")


def agreement(ours: Tensor, theirs: Tensor) -> Agreement:
    """Of two choices, bool [L, B, H, T]."""
    both = (ours & theirs).sum(dim=(2, 3))
    larger = ours.sum(dim=(2, 3)).maximum(theirs.sum(dim=(2, 3)))
    return Agreement(
        layers=tuple((both / larger).double().mean(dim=1).tolist()),
        kept=(int(ours.sum()), int(theirs.sum())),
        differing=int((larger - both).sum()),
    )


def reason(pair: Pair, found: Agreement) -> str:
    """Why not all tokens are the same."""
    if not found.differing:
        return ""
    counted = f"{found.differing} of {max(found.kept)} tokens"
    if found.kept[0] != found.kept[1]:
        counted += f"; ours keeps {found.kept[0]}, theirs {found.kept[1]}"
    return f"{counted}: {pair.why}" if pair.why else f"{counted}; no reason is known"


def row(pair: Pair, found: Agreement) -> dict[str, Any]:
    return {
        "policy": pair.policy,
        "options": pair.options,
        "press": pair.press,
        "overlap": found.mean,
        "worst_layer": {"layer": found.worst, "overlap": found.layers[found.worst]},
        "layers": found.layers,
        "kept": dict(zip(("ours", "theirs"), found.kept, strict=True)),
        "differing": found.differing,
        "reason": reason(pair, found),
    }


def print_table(title: str, pairs: Sequence[Pair], found: Sequence[Agreement]) -> None:
    from rich.table import Table

    from mikv.columns import console

    table = Table("policy", "press", title=title)
    for name in ("overlap", "worst", "layer"):
        table.add_column(name, justify="right")
    table.add_column("reason")
    for pair, of in zip(pairs, found, strict=True):
        numbers = (f"{of.mean:.4f}", f"{of.layers[of.worst]:.4f}", str(of.worst) if of.differing else "")
        table.add_row(pair.policy, pair.press_name, *numbers, reason(pair, of))
    console().print(table)


if __name__ == "__main__":
    main()
