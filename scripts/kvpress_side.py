"""The other side of scripts/compare_kvpress.py and bench_kvpress.py: what the presses of kvpress do, in an environment of its
own, where this project can't be imported (kvpress wants an older transformers).

    python scripts/kvpress_side.py REQUEST.json RESPONSE.json

Request:
    model: a folder with config.json and safetensors; it runs in float32 on the CPU.
    prompts: lists of token ids.
    presses: {name: {"press": {"class": a class of kvpress, parameter: value, ...}, "attention": "sdpa" or "eager"}}; a
        parameter that is an object with a class is a press in turn; a press of null is the full cache.
    timed: null, or {"rounds": R, "steps": S, "threads": T}: times instead of tokens. With "turns": true a line `turn` is
        printed before each round, which begins when a line has come on standard input.

Response:
    versions: of kvpress, transformers and torch.
    last_keys: per prompt and KV head, the last token's key in the last layer of the full cache: whether the model is the same.
    kept: {name: per prompt, layer and KV head, the positions of the tokens that the press keeps, rising}; without `timed`.
    seconds: {clock: {name: {"prefill": [R x prompts], "step": [R x prompts x S]}}}, by the clocks `processor` and `wall`, of a
        whole prompt with its compression, and of each token after it; with `timed`.
    loaded: when the model was there, in seconds of Python's time.time.

A line `done` is printed for each press; with `timed` for each press in each of 1 + R rounds.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import time
from pathlib import Path
from typing import Any

import kvpress
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

Tokens = list[int]
Request = dict[str, Any]
CLOCKS = ("processor", "wall")
Times = tuple[float, float]  # by each of the clocks


def main() -> None:
    request_file, response_file = map(Path, sys.argv[1:])
    request = json.loads(request_file.read_text(encoding="utf-8"))
    torch.set_grad_enabled(False)
    if request["timed"] is not None:
        torch.set_num_threads(request["timed"]["threads"])
    model = AutoModelForCausalLM.from_pretrained(request["model"], dtype=torch.float32, attn_implementation="sdpa").eval()
    response: dict[str, Any] = {
        "loaded": time.time(),
        "versions": {name: importlib.metadata.version(name) for name in ("kvpress", "transformers", "torch")},
        "last_keys": [prefilled(model, prompt).layers[-1].keys[0, :, -1].tolist() for prompt in request["prompts"]],
    }
    if request["timed"] is None:
        response["kept"] = all_kept(model, request)
    else:
        response["seconds"] = all_timed(model, request)
    response_file.write_text(json.dumps(response), encoding="utf-8")


def all_kept(model: Any, request: Request) -> dict[str, list[list[list[Tokens]]]]:
    found = {}
    for name, asked in request["presses"].items():
        model.set_attn_implementation(asked["attention"])
        found[name] = [kept(model, built(asked["press"]), prompt) for prompt in request["prompts"]]
        print("done", flush=True)
    return found


def all_timed(model: Any, request: Request) -> dict[str, dict[str, dict[str, list[float]]]]:
    """The presses take turns, so that a machine that slows down slows down all of them; one round more, the first, with one
    prompt, fills caches and doesn't count."""
    asked = request["timed"]
    found: dict[str, dict[str, dict[str, list[float]]]] = {
        clock: {name: {"prefill": [], "step": []} for name in request["presses"]} for clock in CLOCKS
    }
    for turn in range(1 + asked["rounds"]):
        if asked.get("turns"):
            wait_for_turn()
        for name, wanted in request["presses"].items():
            model.set_attn_implementation(wanted["attention"])
            for prompt in request["prompts"] if turn else request["prompts"][:1]:
                prefill, steps = timed(model, built(wanted["press"]), prompt, asked["steps"])
                for place, clock in enumerate(CLOCKS if turn else ()):
                    found[clock][name]["prefill"].append(prefill[place])
                    found[clock][name]["step"] += [step[place] for step in steps]
            print("done", flush=True)
    return found


def wait_for_turn() -> None:
    print("turn", flush=True)
    if not sys.stdin.readline():
        raise SystemExit("nobody is there to say whose turn it is")


def built(press: dict[str, Any] | None) -> Any:
    if press is None:
        return None
    parameters = {name: built(value) if isinstance(value, dict) else value for name, value in press.items() if name != "class"}
    return getattr(kvpress, press["class"])(**parameters)


def prefilled(model: Any, prompt: Tokens, press: Any = None) -> Any:
    """The cache of a prompt."""
    for layer in model.model.layers:
        layer.self_attn.masked_key_indices = None  # of the press before; kvpress itself forgets it with sdpa only
    cache = DynamicCache(config=model.config)
    ids = torch.tensor([prompt])
    if press is None:
        model(input_ids=ids, past_key_values=cache, logits_to_keep=1)
    else:
        with press(model):
            model(input_ids=ids, past_key_values=cache, logits_to_keep=1)
    return cache


def kept(model: Any, press: Any, prompt: Tokens) -> list[list[Tokens]]:
    """Per layer and KV head, read from what `compress` returns: whatever a press does to choose, this is what it chose."""
    found: dict[int, list[Tokens]] = {}
    compress = press.compress

    def watched(
        module: Any, hidden_states: Tensor, keys: Tensor, values: Tensor, attentions: Tensor | None, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        stays = compress(module, hidden_states, keys, values, attentions, kwargs)
        found[module.layer_idx] = positions(keys[0], stays[0][0], module.masked_key_indices)
        return stays

    press.compress = watched
    prefilled(model, prompt, press)
    return [found[layer] for layer in range(model.config.num_hidden_layers)]


def positions(keys: Tensor, stays: Tensor, masked: tuple[Tensor, Tensor, Tensor] | None) -> list[Tokens]:
    """Where keys that stay [H, n, D] stood among all keys [H, T, D]; of a press that only masks some, the others.

    Keys are looked for bit by bit: RoPE gives no two positions of a head the same one."""
    held = torch.ones(keys.shape[:2], dtype=torch.bool)
    if masked is not None:
        _, heads, tokens = masked
        held[heads, tokens] = False
    else:
        for head, (all_of_it, some) in enumerate(zip(keys, stays, strict=True)):
            same = (some[:, None] == all_of_it).all(dim=-1)
            if not (same.sum(dim=-1) == 1).all():
                raise ValueError("the press returns keys that are not among those it was given, or there are equal ones")
            held[head] = same.any(dim=0)
    return [row.nonzero().flatten().tolist() for row in held]


def timed(model: Any, press: Any, prompt: Tokens, steps: int) -> tuple[Times, list[Times]]:
    """Seconds by each of the clocks. In processor time other work on the machine counts less."""
    begun = now()
    cache = prefilled(model, prompt, press)
    prefill, found = since(begun), []
    for step in range(steps):
        begun = now()
        place = torch.tensor([[len(prompt) + step]])  # the cache's length says less, where tokens are gone
        model(input_ids=torch.tensor([[prompt[step % len(prompt)]]]), position_ids=place, past_key_values=cache)
        found.append(since(begun))
    return prefill, found


def now() -> Times:
    return time.process_time(), time.perf_counter()


def since(begun: Times) -> Times:
    processor, wall = now()
    return processor - begun[0], wall - begun[1]


if __name__ == "__main__":
    main()
