"""What a compressed cache looks like: one prompt, one policy, read from the packed store. For figures and curiosity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from mikv.cache.policy_store import PolicyStore
from mikv.cache.prefill import PrefillBank, PrefillState
from mikv.engine import Engine
from mikv.engine.requests import Request
from mikv.models.load import Loaded
from mikv.policy import Policy
from mikv.quant.tier import Tier


@dataclass(frozen=True)
class Inside:
    """A prompt's cache under a policy.

    tokens: texts of the prompt's tokens [T]; importance float32 [L, H, T], None for a policy without; bits float32 [L, H, T]
    of each key (0 = evicted); query_absmax, key_absmax, balancer float32 [L, H, D] (balancer 1 where there is none);
    key_error, value_error float32 [L, H, D]: root mean square, over the tokens of the last stored tier, of what was stored
    less what was exact.
    """

    label: str
    tokens: Sequence[str]
    importance: np.ndarray | None
    bits: np.ndarray
    query_absmax: np.ndarray
    key_absmax: np.ndarray
    balancer: np.ndarray
    key_error: np.ndarray
    value_error: np.ndarray


def look_inside(loaded: Loaded, request: Request, policies: Sequence[Policy]) -> list[Inside]:
    """The prompt of one request, prefilled once, under each policy."""
    engine = Engine(loaded.model, loaded.end_tokens, loaded.tokenizer.pad_token_id or 0)
    context = list(request.prompt.context)
    state = engine.prefill([context], set().union(*(policy.observers for policy in policies)))
    texts = [loaded.tokenizer.decode([token]) for token in context]
    return [_inside(policy, state, texts) for policy in policies]


def unbalanced(policy: Policy) -> Policy:
    """The policy without its balancer."""
    tiers = tuple(Tier(key=replace(tier.key, transforms=()), value=tier.value) for tier in policy.tiers)
    return replace(policy, tiers=tiers, label=f"{policy.label} no balancer")


def _inside(policy: Policy, state: PrefillState, texts: Sequence[str]) -> Inside:
    parts = [_of_bank(policy, state, bank) for bank in state.banks]
    joined = {name: torch.cat([part[name] for part in parts]).numpy() for name in parts[0]}
    return Inside(policy.label, texts, joined.pop("importance", None), **joined)


@torch.inference_mode()
def _of_bank(policy: Policy, state: PrefillState, bank: PrefillBank) -> dict[str, torch.Tensor]:
    store = PolicyStore(policy, state, bank, state.lengths.tokens, track=True)
    exact_keys, exact_values = bank.keys[:, 0].float(), bank.values[:, 0].float()  # [L, H, T, D]
    bits = torch.zeros(exact_keys.shape[:3])
    key_absmax = exact_keys.abs().amax(dim=2)
    key_error = value_error = torch.zeros_like(key_absmax)
    for tier, (positions, _, keys, values) in zip(store.tiers, store.read(), strict=True):
        here = positions[:, 0]  # one prompt: every slot is used, and a position is a column
        bits.scatter_(2, here.cpu(), float(tier.tier.k))
        where = here[..., None].expand_as(keys[:, 0])
        key_error = _rms(keys[:, 0] - exact_keys.gather(2, where))
        value_error = _rms(values[:, 0] - exact_values.gather(2, where))
    balancer = next((side["balancer"] for side in store.sides.values() if "balancer" in side), None)
    found = {
        "bits": bits,
        "query_absmax": bank.query_absmax[:, 0],
        "key_absmax": key_absmax,
        "balancer": torch.ones_like(key_absmax) if balancer is None else balancer[:, 0].float(),
        "key_error": key_error,
        "value_error": value_error,
    }
    scores = store.score_prompt(state, bank)
    if scores is not None:
        found["importance"] = scores[:, 0]
    return {name: tensor.cpu() for name, tensor in found.items()}


def _rms(error: torch.Tensor) -> torch.Tensor:
    """Over tokens: [L, H, S, D] -> [L, H, D]."""
    return error.square().mean(dim=2).sqrt()
