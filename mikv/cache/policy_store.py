"""One policy's packed cache of a batch: the tiers, who is in them, and how tokens move down.

Built once from an exact prefill (every prompt token is quantized from its exact value, once), then stepped: a new token
enters the first tier, scores grow, and where a budget is exceeded the least important token goes one tier down, for good.
A token that leaves a 16-bit tier is quantized here for the first and only time; one that leaves a quantized tier (INT8 to
INT2) is quantized from what that tier still knows of it, at most once per tier.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mikv.assignment import assign, priority
from mikv.cache.prefill import PrefillBank, PrefillState
from mikv.cache.tier_store import Pairs, TierStore
from mikv.policy import Policy
from mikv.quant.balance import balancer
from mikv.tensors import layer_chunks, taken


class Change(NamedTuple):
    """A token whose stored value changed: positions int64 [L, B, H]; where bool [L, B, H]: whether it happened at all; keys,
    values float32 [L, B, H, D], and slots int64 [L, B, H] of its tier, or None where it was evicted."""

    positions: Tensor
    where: Tensor
    keys: Tensor | None = None
    values: Tensor | None = None
    slots: Tensor | None = None


class Received(NamedTuple):
    """The attention that tokens received in a step, float32, for a policy that cares: of each tier's slots [L, B, H, S] (None
    where no scores are stored; of unused slots anything), and of the newest token [L, B, H]."""

    tiers: Sequence[Tensor | None] = ()
    newest: Tensor | None = None


def _lowest(value: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The slot with the lowest value [L, B, H, S], its value and its position, each [L, B, H]; ties: the earliest token."""
    if not value.shape[-1]:
        none = positions.new_zeros(positions.shape[:3])
        return none, torch.full_like(none, torch.inf, dtype=value.dtype), none
    least = value.amin(dim=-1, keepdim=True)
    slot = torch.where(value == least, positions, torch.iinfo(torch.int64).max).argmin(dim=-1, keepdim=True)
    return slot.squeeze(-1), least.squeeze(-1), positions.gather(-1, slot).squeeze(-1)


def _per_row(x: Tensor, positions: Tensor) -> Tensor:
    return x.to(positions.device)[None, :, None, None]


class PolicyStore:
    """Compress the layers of one bank by one policy.

    Args:
        policy: tiers, budgets, importance.
        state: the prefill; not changed.
        bank: which of its banks.
        prompt_lengths: int64 [B], the length that budgets of kind `fixed` are shares of.
        packing: who quantizes and packs, see mikv.kernels.pick.
        track: keep the positions of all tokens, also where the policy does not need them (a dense copy does, and who looks
            inside).
    """

    def __init__(
        self,
        policy: Policy,
        state: PrefillState,
        bank: PrefillBank,
        prompt_lengths: Tensor,
        packing: str = "reference",
        track: bool = False,
    ) -> None:
        self.policy = policy
        self._packing, self._track = packing, track
        self._layers, self._rows = bank.layers, state.rows.to(bank.layers.device)
        self._heads = state.geometry.kv_heads
        self._prompt_lengths = prompt_lengths
        self.seen = state.lengths.tokens.clone()
        quantized = any(0 < tier.k < 16 for tier in policy.tiers)
        self.balancer = balancer(bank.query_absmax, bank.key_absmax) if policy.balance and quantized else None

        positions = state.lengths.positions(bank.keys.device)
        scores = None
        if policy.importance is not None:
            watched = None if policy.importance.observer is None else bank.observed[policy.importance.observer]
            scores = policy.importance.prefill(watched, bank.layers, self._rows, positions, self._heads)
        positions = positions[None, :, None, :].expand(bank.keys.shape[:4])
        device = bank.keys.device
        assigned = assign(policy, scores, positions, self.seen.to(device), self._budget_lengths().to(device))
        self.tiers = [
            self._build(index, bank, assigned == index, positions, scores, state.dtype)
            for index, tier in enumerate(policy.tiers)
            if not tier.evicted
        ]

    def _build(
        self,
        index: int,
        bank: PrefillBank,
        members: Tensor,
        positions: Tensor,
        scores: Tensor | None,
        dtype: torch.dtype,
    ) -> TierStore:
        count = members[0, :, 0].sum(dim=-1).cpu()  # the same for all layers and heads: budgets are numbers of tokens
        columns = (~members).to(torch.uint8).argsort(dim=-1, stable=True)  # members first, in order
        columns = columns[..., : int(count.max())]

        def chunks() -> Iterator[Pairs]:
            for layers in layer_chunks(bank.keys.shape):
                where = columns[layers]
                yield Pairs(
                    taken(bank.keys[layers], where),
                    taken(bank.values[layers], where),
                    positions[layers].gather(3, where),
                    None if scores is None else scores[layers].gather(3, where),
                )

        last = index == len(self.policy.tiers) - 1
        return TierStore(
            self.policy.tiers[index],
            chunks(),
            count,
            bank.keys.shape[-1],
            None if self.balancer is None else self.balancer.unsqueeze(3),
            dtype,
            positions=self._positions_of(index),
            with_scores=scores is not None and not last,
            packing=self._packing,
        )

    def _positions_of(self, tier: int) -> str:
        """What a tier must know of its tokens' positions, see TierStore: they rank the tokens that may leave it, and
        re-indexing wants those of all."""
        if len(self.policy.tiers) == 1:
            return "slots"
        if tier < len(self.policy.tiers) - 1 or self.policy.positions == "contiguous":
            return "stored"
        return "tracked" if self._track else "unknown"

    def step(self, keys: Tensor, values: Tensor, received: Received, active: Tensor) -> list[Change]:
        """Take in the token of a decode step, after its attention.

        Args:
            keys, values: exact [L, B, H, D] of the new token.
            received: in this step; may be empty without importance.
            active: bool [B] on the CPU; other rows have ended and stay as they are.

        Returns:
            What changed, in order.
        """
        policy, device = self.policy, keys.device
        positions = self.seen.to(device)
        entry = None
        if policy.importance is not None:
            assert received.newest is not None
            for tier, mass in zip(self.tiers, received.tiers, strict=True):
                scores = tier.scores()
                if scores is not None:
                    assert mass is not None
                    tier.set_scores(policy.importance.decode(scores, mass))
            entry = policy.importance.entry(self._layers, self._rows, positions, self._heads)
            entry = policy.importance.decode(entry, received.newest)
        incoming = Pairs(keys, values, positions[None, :, None].expand(keys.shape[:3]), entry)
        arriving = active
        self.seen = self.seen + active  # never in place: what was handed out keeps its value
        quotas = policy.quotas(self._budget_lengths())
        changes = []
        for index, tier in enumerate(self.tiers):
            held = torch.stack([t.count for t in self.tiers[: index + 1]]).sum(dim=0) + arriving
            leaving = (held > quotas[index]) & active if index < len(quotas) else torch.zeros_like(active)
            if arriving.any() or leaving.any():
                change, incoming = self._settle(tier, incoming, arriving, leaving)
                changes.append(change)
            arriving = leaving
        if policy.evicts and arriving.any():
            gone = arriving.to(device)[None, :, None].expand(keys.shape[:3])
            changes.append(Change(incoming.positions, gone))
        return changes

    def _settle(self, tier: TierStore, incoming: Pairs, arriving: Tensor, leaving: Tensor) -> tuple[Change, Pairs]:
        """Let a token into a tier and the least important one out of it, whichever it is.

        incoming [L, B, H, ...] counts in the rows where `arriving` is True (bool [B], CPU); one token leaves the rows where
        `leaving` is. A token that leaves at once is never stored here: it goes on as exact as it came.
        Returns what was stored, and the tokens that leave.
        """
        device = self._layers.device
        seen = self.seen.to(device)[None, :, None]
        rejected = torch.zeros_like(incoming.positions, dtype=torch.bool)
        slot = torch.zeros_like(incoming.positions)
        if leaving.any():
            first_quota = self.policy.quotas(self._budget_lengths())[0].to(device)[None, :, None]
            positions = tier.positions()
            value = priority(self.policy, tier.scores(), positions, seen[..., None], first_quota[..., None])
            unused = ~tier.used().to(device)[None, :, None, :]
            slot, least, at_position = _lowest(value.masked_fill(unused, torch.inf), positions)
            mine = priority(self.policy, incoming.scores, incoming.positions, seen, first_quota)
            lower = (mine < least) | ((mine == least) & (incoming.positions < at_position))
            rejected = lower & (arriving & leaving).to(device)[None, :, None]
        stored, slots, taken = tier.exchange(incoming, slot, arriving, leaving, rejected)
        outgoing = Pairs(
            torch.where(rejected[..., None], incoming.keys.float(), taken.keys),
            torch.where(rejected[..., None], incoming.values.float(), taken.values),
            torch.where(rejected, incoming.positions, taken.positions),
            None if taken.scores is None or incoming.scores is None else torch.where(rejected, incoming.scores, taken.scores),
        )
        here = arriving.to(device)[None, :, None] & ~rejected
        return Change(incoming.positions, here, *stored, slots), outgoing

    def _budget_lengths(self) -> Tensor:
        return self.seen if self.policy.budget == "ratio" else self._prompt_lengths

    def fork(self, rows: Tensor) -> PolicyStore:
        """A store of its own with some of the rows (int64, CPU; one may come several times)."""
        forked = copy.copy(self)
        forked.tiers = [tier.fork(rows) for tier in self.tiers]
        forked._take(rows)
        return forked

    def select(self, rows: Tensor) -> None:
        """Go on with some of the rows, tier by tier, so that what is left is not held twice."""
        for tier in self.tiers:
            tier.select(rows)
        self._take(rows)

    def _take(self, rows: Tensor) -> None:
        there = rows.to(self._layers.device)
        self.seen, self._prompt_lengths, self._rows = self.seen[rows], self._prompt_lengths[rows], self._rows[there]
        if self.balancer is not None:
            self.balancer = self.balancer[:, there]

    def read(self, layers: slice = slice(None)) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Everything stored of some layers, per tier: positions int64 [l, B, H, S], used bool [B, S], keys and values
        float32 [l, B, H, S, D]."""
        return [(tier.positions(layers), tier.used(), *tier.read(layers)) for tier in self.tiers]

    def nbytes(self) -> dict[str, Tensor]:
        """Bytes by part, int64 [B]: raw (16-bit values), codes, scale, zero, positions, scores, balancer."""
        total: dict[str, Tensor] = {}
        for tier in self.tiers:
            for kind, size in tier.nbytes().items():
                total[kind] = total.get(kind, 0) + size
        if self.balancer is not None:
            total["balancer"] = torch.full_like(self.seen, self._balancer_bytes())
        return total

    def allocated(self) -> int:
        """Bytes that one row's tensors take of the memory, slots that are not used included."""
        return sum(tier.allocated() for tier in self.tiers) + self._balancer_bytes()

    def _balancer_bytes(self) -> int:
        return 0 if self.balancer is None else self.balancer[:, 0].numel() * self.balancer.element_size()

    def compressed_tokens(self) -> Tensor:
        """Tokens per layer and head that are not held at 16 bits (evicted ones included), int64 [B]."""
        exact = [tier.count for tier in self.tiers if tier.tier.k == tier.tier.v == 16]
        return self.seen - (torch.stack(exact).sum(dim=0) if exact else 0)

    def held(self, begin: Tensor, end: Tensor) -> dict[str, Tensor]:
        """How many of the tokens at positions begin <= p < end (int64 [B]) each tier stores, summed over layers and heads:
        float64 [B] by the tier's bits."""
        counts: dict[str, Tensor] = {}
        rest = (end - begin).clamp(min=0).double() * len(self._layers) * self._heads
        for tier in self.tiers:
            if not tier.knows_positions:  # the last one, of a policy that keeps every token: it has what the others have not
                counts[str(tier.tier)] = counts.get(str(tier.tier), 0) + rest
                continue
            positions = tier.positions()
            here = (positions >= _per_row(begin, positions)) & (positions < _per_row(end, positions))
            here &= tier.used().to(positions.device)[None, :, None, :]
            count = here.sum(dim=(0, 2, 3)).double().cpu()
            counts[str(tier.tier)] = counts.get(str(tier.tier), 0) + count
            rest = rest - count
        return counts

    def kept_tokens(self) -> Tensor:
        """Tokens per layer and head that are stored in some tier, int64 [B]."""
        return torch.stack([tier.count for tier in self.tiers]).sum(dim=0)
