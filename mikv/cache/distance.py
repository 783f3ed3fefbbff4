"""How far does what is stored move the attention of a prompt's last queries? The total variation distance, layer by layer.

    d = mean over queries and heads of  1/2 sum_t |p^_t - p_t|      0 = nothing has moved, 1 = everything

p is the softmax over the exact keys, p^ over the keys as they are read back (an evicted one has none). Similar keys don't mean
similar attention: where keys have large constant channels the cosine is near 1 and the attention may be another (Qwen2.5 under
a quantizer with a scale per token). Where a layer is badly off a model fails silently, so every record tells its worst one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mikv.cache.compressed import CompressedCache
from mikv.cache.policy_store import PolicyStore
from mikv.cache.prefill import PrefillBank, PrefillState
from mikv.types import Lengths


def attention_distance(store: PolicyStore, bank: PrefillBank, lengths: Lengths) -> Tensor:
    """float32 [L, B], between 0 and 1, of a store before any step; 0 for a prompt of one token, or none.

    Positions are each token's own, also where a policy re-indexes them.
    """
    queries = bank.last_queries  # [L, B, H, G, W, D]
    width, last, device = lengths.width, queries.shape[4], queries.device
    positions = lengths.positions(device)
    padding = lengths.padding.to(device)[None, :, None, None]
    asking = positions[:, width - last :]  # [B, W]
    visible = (positions[:, None, :] <= asking[..., None]) & (positions >= 0)[:, None]  # [B, W, T]
    hidden = ~visible[:, None, None]
    counted = (asking > 0).float()  # the first token attends to itself, whatever is stored; padding is nobody
    found = []
    for layer in range(len(queries)):
        here = slice(layer, layer + 1)
        query = queries[layer].float() / queries.shape[-1] ** 0.5  # [B, H, G, W, D]
        exact = query @ bank.keys[layer].float().transpose(-1, -2).unsqueeze(2)
        p = torch.softmax(exact.masked_fill(hidden, -torch.inf), dim=-1).nan_to_num()
        logits = torch.full_like(exact, -torch.inf)
        left = (positions >= 0)[:, None].expand(exact.shape[0], exact.shape[1], width)  # columns whose tier is not known yet
        for tier in store.tiers:
            used = tier.used().to(device)
            used = (used if len(used) == 1 else used[here])[0].expand(*left.shape[:2], tier.slots)
            if tier.knows_positions:
                column = tier.positions(here)[0] + padding[0]
            else:  # the last one of a policy that keeps every token, in order: it has what the others have not
                column = (~left).to(torch.uint8).argsort(dim=-1, stable=True)[..., : tier.slots]
            column = torch.where(used, column, width)  # what is unused goes beyond the last column
            mine = query @ tier.read(here)[0][0].transpose(-1, -2).unsqueeze(2)
            logits = _beyond(logits, 0.0).scatter(-1, column[:, :, None, None].expand(mine.shape), mine)[..., :width]
            left = _beyond(left, True).scatter(-1, column, False)[..., :width]
        stored = torch.softmax(logits.masked_fill(hidden, -torch.inf), dim=-1).nan_to_num()
        distance = (stored - p).abs().sum(dim=-1).mean(dim=(1, 2)) / 2  # [B, W]
        found.append((distance * counted).sum(dim=-1) / counted.sum(dim=-1).clamp(min=1))
    return torch.stack(found)


def _beyond(x: Tensor, value: float | bool) -> Tensor:
    """With one more column."""
    return torch.cat((x, x.new_full((*x.shape[:-1], 1), value)), dim=-1)


def worst_layers(cache: CompressedCache, state: PrefillState) -> list[list[tuple[int, float]]]:
    """By policy and prompt: the layer with the largest distance, and that. (0, 0.0) where a policy stores all at 16 bits."""
    found = []
    for stores in zip(*(bank.stores for bank in cache.banks), strict=True):
        if stores[0].policy.lossless:
            found.append([(0, 0.0)] * len(state.lengths.tokens))
            continue
        parts = [attention_distance(store, bank, state.lengths) for store, bank in zip(stores, state.banks, strict=True)]
        distance, place = torch.cat([part.cpu() for part in parts]).max(dim=0)
        found.append(list(zip(place.tolist(), distance.tolist(), strict=True)))
    return found
