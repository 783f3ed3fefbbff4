"""One policy's packed cache of a batch: the tiers, the tokens that they hold, and how tokens move down.

Built once from an exact prefill (every prompt token is quantized from its exact value, once), then stepped: a new token
enters the first tier, scores grow, and where a budget is exceeded the least important tokens go one tier down, for good.
A token that leaves a 16-bit tier is quantized here for the first and only time; one that leaves a quantized tier (INT8 to
INT2) is quantized from what that tier still knows of it, at most once per tier.

How many tokens move is known from lengths and the prompt's quotas, on the CPU; which ones is decided on the device.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from mikv.assignment import assign, lowest, passes, priority, protected
from mikv.cache.prefill import PrefillBank, PrefillState
from mikv.cache.sides import Fits, Sides
from mikv.cache.tier_store import Pairs, TierStore
from mikv.importance.base import Context
from mikv.policy import Policy
from mikv.tensors import layer_chunks, taken

_POSITION_BYTES, _SCORE_BYTES = 4, 4
_NO_POSITION = 2**40


class Change(NamedTuple):
    """Tokens whose stored value changed: positions int64 [L, B, H, n]; where bool [L, B, H, n]: whether it happened at all;
    keys, values float32 [L, B, H, n, D], and slots int64 [L, B, H, n] of their tier, or None where they were evicted.
    compacted: other tokens of the tier have changed their slots."""

    positions: Tensor
    where: Tensor
    keys: Tensor | None = None
    values: Tensor | None = None
    slots: Tensor | None = None
    compacted: bool = False


class Received(NamedTuple):
    """The attention that tokens received in a step, float32, for a policy that cares: of each tier's slots [L, B, H, S] (None
    where no scores are stored; of unused slots anything), and of the newest token [L, B, H]."""

    tiers: Sequence[Tensor | None] = ()
    newest: Tensor | None = None


class PolicyStore:
    """Compress the layers of one bank by one policy.

    Args:
        policy: tiers, budgets, importance.
        state: the prefill; not changed.
        bank: which of its banks.
        prompt_lengths: int64 [B], the length that budgets of the prompt are shares of.
        fits: what transforms are fitted to, shared by the policies of a panel.
        packing: which code quantizes and packs, see mikv.kernels.pick.
        track: keep the positions of all tokens, also where the policy does not need them (a dense copy does, and figures of
            inside).
    """

    def __init__(
        self,
        policy: Policy,
        state: PrefillState,
        bank: PrefillBank,
        prompt_lengths: Tensor,
        fits: Fits | None = None,
        packing: str = "reference",
        track: bool = False,
    ) -> None:
        self.policy = policy
        self._packing, self._track = packing, track
        self._layers, self._prompts = bank.layers, state.prompts.to(bank.layers.device)
        self._geometry, self._dtype = state.geometry, state.dtype
        self._prompt_lengths = prompt_lengths
        self.seen = state.lengths.tokens.clone()
        self._steps = torch.zeros_like(self.seen)  # tokens taken in since the prompt
        self._rope, self._output_projection = state.rope, state.output_projection
        for tier in policy.tiers:
            tier.check(state.geometry.head_dim)
        if fits is None:  # a bank of the state, or one that was made of it
            fits = next((one for one in Fits.of(state) if one.bank is bank), Fits(state, bank))
        stored = [tier for tier in policy.tiers if not tier.evicted]
        chains = {"keys": [tier.key for tier in stored], "values": [tier.value for tier in stored]}
        self.sides: Sides = fits.sides(chains, policy.sinks)

        positions = state.lengths.positions(bank.keys.device)[None, :, None, :].expand(bank.keys.shape[:4])
        self._costs = tuple(map(self._token_bytes, range(len(policy.tiers)))), self._side_bytes() / self._per_row
        context = self._context(positions, bank.keys, bank.values)
        scores = self.score_prompt(state, bank, fits.memo)
        self._settled = None
        if not policy.budget.grows:
            everywhere = partial(self._of_all_banks, state, fits)
            self._settled = policy.budget.quotas(scores, replace(context, everywhere=everywhere))
        device = bank.keys.device
        quotas = self._quotas(context).to(device)
        assigned = assign(policy, scores, positions, self.seen.to(device), quotas)
        self.tiers: list[TierStore] = []
        for index, tier in enumerate(policy.tiers):
            if not tier.evicted:
                self.tiers.append(self._build(index, bank, assigned == index, positions, scores))

    def score_prompt(self, state: PrefillState, bank: PrefillBank, memo: dict[str, Tensor] | None = None) -> Tensor | None:
        """Importance of the prompt's tokens, float32 [L, B, H, T], before any step; None for a policy without. memo: see
        mikv.importance.base.Context."""
        importance = self.policy.importance
        if importance is None:
            return None
        positions = state.lengths.positions(bank.keys.device)[None, :, None, :].expand(bank.keys.shape[:4])
        observed = None if importance.observer is None else bank.observed[importance.observer]
        context = replace(self._context(positions, bank.keys, bank.values), observed=observed)
        return importance.score(context if memo is None else replace(context, memo=memo))

    def _of_all_banks(self, state: PrefillState, fits: Fits) -> list[Context]:
        """Of the prompt, as a budget sees it that spans the layers of several devices."""
        watched, found = self.policy.budget.observer, []
        for other in fits.all:
            bank = other.bank
            positions = state.lengths.positions(bank.keys.device)[None, :, None, :].expand(bank.keys.shape[:4])
            found.append(
                replace(
                    self._context(positions, bank.keys, bank.values),
                    layers=bank.layers,
                    observed=None if watched is None else bank.observed[watched],
                    key_noise=partial(other.key_noise, self.policy.tiers[-1].key, self.policy.sinks),
                )
            )
        return found

    def _context(self, positions: Tensor, keys: Tensor, values: Tensor) -> Context:
        seen = self.seen.to(positions.device)[None, :, None, None]
        return Context(
            layers=self._layers,
            total_layers=self._geometry.layers,
            prompts=self._prompts,
            positions=positions,
            seen=self.seen,
            prompt_lengths=self._prompt_lengths,
            protected=protected(self.policy, positions, seen),
            keys=keys,
            values=values,
            output_projection=self._output_projection,
            rope=self._rope,
            token_bytes=self._costs[0],
            side_bytes=self._costs[1],
        )

    @property
    def _per_row(self) -> int:
        """Layers times heads."""
        return len(self._layers) * self._geometry.kv_heads

    def _token_bytes(self, index: int) -> float:
        """What a token takes in a tier, per layer and head."""
        tier, dim = self.policy.tiers[index], self._geometry.head_dim
        if tier.evicted:
            return 0.0
        assert tier.key.code is not None
        assert tier.value.code is not None
        size = (tier.key.code.size(dim) + tier.value.code.size(dim)) * dim / 8
        size += _POSITION_BYTES if self._positions_of(index) == "stored" else 0
        return size + (_SCORE_BYTES if self._ranked_by_score(index) else 0)

    def _ranked_by_score(self, index: int) -> bool:
        return self.policy.scored and self.policy.leaves(index)

    def _build(self, index: int, bank: PrefillBank, members: Tensor, positions: Tensor, scores: Tensor | None) -> TierStore:
        count = members.sum(dim=-1).cpu()
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

        return TierStore(
            self.policy.tiers[index],
            self.sides,
            chunks(),
            count,
            self._dtype,
            positions=self._positions_of(index),
            with_scores=self._ranked_by_score(index),
            first=self.policy.in_order(index) or 0,
            kept=self._kept() if self.policy.importance is not None and self._in_slots(index) else None,
            rope=self._rope,
            packing=self._packing,
        )

    def _kept(self) -> Tensor:
        """Positions of the tokens that importance keeps, for good, in the tiers above the window's: int64 [L, B, H, n], rising,
        behind them what is larger than any position."""
        found = []
        for tier in self.tiers[: self.policy.window_tier]:
            positions = tier.positions()
            held = (positions >= self.policy.sinks) & tier.used().to(positions.device)
            found.append(positions.masked_fill(~held, _NO_POSITION))
        return torch.cat(found, dim=-1).sort(dim=-1).values

    def _in_slots(self, index: int) -> bool:
        return self.policy.in_order(index) is not None and self.policy.positions == "original"

    def _positions_of(self, index: int) -> str:
        """What a tier must know of its tokens' positions, see TierStore: they rank the tokens that may leave it, re-indexing
        wants those of all, and so do transforms that turn with the position."""
        policy, tier = self.policy, self.policy.tiers[index]
        if self._in_slots(index):
            return "slots"
        keeps = policy.importance is not None and policy.settled and index < policy.window_tier  # others' follow from these
        if keeps or policy.leaves(index) or policy.positions == "contiguous" or tier.key.needs_positions:
            return "stored"
        # which tokens were evicted is reported, if by nothing else than the positions of those that were not
        return "tracked" if self._track or policy.evicts else "unknown"

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
        positions = self.seen.to(device)[None, :, None, None].expand(*keys.shape[:3], 1)
        self.seen = self.seen + active  # never in place: what was handed out keeps its value
        self._steps = self._steps + active
        context = self._context(positions, keys.unsqueeze(3), values.unsqueeze(3))
        scores = self._scored(context, received) if self._ranked_by_score(0) else None
        incoming = Pairs(context.keys, context.values, positions, scores)
        running = active[None, :, None].expand(keys.shape[:3])
        arriving = running.long()
        due = running & (self._steps % policy.every == 0)[None, :, None] if policy.every else torch.zeros_like(running)
        quotas = self._quotas(context) if len(policy.tiers) > 1 else None
        changes = []
        by = policy.window_tier if policy.settled and bool((self.seen > policy.sinks).all()) else 0  # the token passes these by
        for index, tier in enumerate(self.tiers):
            if index < by:
                continue
            leaving = torch.zeros_like(arriving)
            if quotas is not None and index < len(quotas):
                leaving = self._leaving(index, incoming, arriving, quotas[index], due)
            if arriving.any() or leaving.any():
                change, incoming = self._settle(index, tier, incoming, arriving, leaving, quotas)
                changes.append(change)
            arriving = leaving
        if policy.evicts and arriving.any():
            gone = torch.arange(incoming.positions.shape[3], device=device) < arriving.to(device)[..., None]
            changes.append(Change(incoming.positions, gone))
        return changes

    def _scored(self, context: Context, received: Received) -> Tensor:
        """Scores grow by what a step gave; those of its token, [L, B, H, 1]."""
        importance = self.policy.importance
        assert importance is not None
        assert received.newest is not None
        seen = context.seen.to(context.positions.device)[None, :, None, None]
        for tier, mass in zip(self.tiers, received.tiers, strict=True):
            scores = tier.scores()
            if scores is not None:
                assert mass is not None
                # of an unused slot whatever position lies there
                tier.set_scores(importance.update(scores, mass, (seen - tier.positions()).clamp(min=1)))
        mass = received.newest[..., None]
        return importance.update(importance.score(replace(context, mass=mass)), mass, seen - context.positions)

    def _leaving(self, index: int, incoming: Pairs, arriving: Tensor, quota: Tensor, due: Tensor) -> Tensor:
        """How many tokens leave a tier, int64 [L, B, H]: those above its quota, in whole blocks of the tier below."""
        held = torch.stack([tier.count for tier in self.tiers[: index + 1]]).sum(dim=0) + arriving
        over = torch.where(due, (held - quota).clamp(min=0), 0)
        policy = self.policy
        if policy.window_tier > index or policy.sinks_tier > index:
            seen = self.seen.to(incoming.positions.device)[None, :, None, None]
            there = torch.arange(incoming.positions.shape[3], device=seen.device) < arriving.to(seen.device)[..., None]
            on = (passes(policy, index, incoming.positions, seen) & there).sum(dim=-1).cpu()
            over = over.maximum(on)
        over = over.minimum(self.tiers[index].count + arriving)
        below = policy.tiers[index + 1].block
        return over // below * below

    def _settle(
        self, index: int, tier: TierStore, incoming: Pairs, arriving: Tensor, leaving: Tensor, quotas: Tensor | None
    ) -> tuple[Change, Pairs]:
        """Let tokens into a tier and the least important ones out of it, whichever they are.

        incoming [L, B, H, A, ...], of which the first `arriving` (int64 [L, B, H], CPU) count; `leaving` go. A token that
        leaves at once is never stored here: it goes on as exact as it came. Returns what was stored, and the tokens that
        leave."""
        device = self._layers.device
        chosen = None
        tier.reserve(incoming.positions.shape[3])
        if leaving.any():
            assert quotas is not None
            seen = self.seen.to(device)[None, :, None, None]
            first_quota = quotas[0].to(device)[..., None]
            positions, scores = tier.positions(), tier.scores()
            there = torch.arange(incoming.positions.shape[3], device=device) < arriving.to(device)[..., None]
            both = torch.cat((positions, incoming.positions), dim=3)
            of_both = None
            if scores is not None:
                assert incoming.scores is not None
                of_both = torch.cat((scores, incoming.scores), dim=3)
            value = priority(self.policy, index, of_both, both, seen, first_quota)
            used = tier.used().to(device).expand(positions.shape)
            value = value.masked_fill(~torch.cat((used, there), dim=3), torch.inf)
            chosen = lowest(value, both, int(leaving.max()))
            if chosen.shape[3] > 1:
                chosen = self._in_order(chosen, both, leaving)
        exchanged = tier.exchange(incoming, arriving, leaving, chosen)
        stored = Change(incoming.positions, *exchanged[:4], exchanged.compacted)
        return stored, exchanged.taken

    @staticmethod
    def _in_order(chosen: Tensor, positions: Tensor, leaving: Tensor) -> Tensor:
        """The same, the first `leaving` in the order of positions: neighbours in time share a block."""
        counts = torch.arange(chosen.shape[3], device=chosen.device) < leaving.to(chosen.device)[..., None]
        place = positions.gather(-1, chosen).masked_fill(~counts, torch.iinfo(torch.int64).max)
        return chosen.gather(-1, place.argsort(dim=-1, stable=True))

    def _quotas(self, context: Context) -> Tensor:
        """Cumulative, int64 [tiers - 1, L, B, H] on the CPU."""
        found = self.policy.budget.quotas(None, context) if self._settled is None else self._settled
        per_head = (len(self._layers), len(self.seen), self._geometry.kv_heads)
        return found.expand(len(self.policy.tiers) - 1, *per_head)

    def fork(self, rows: Tensor) -> PolicyStore:
        """A store of its own with some of the rows (int64, CPU; one may come several times)."""
        forked = copy.copy(self)
        forked._take(rows)
        forked.tiers = [tier.fork(rows, forked.sides) for tier in self.tiers]
        return forked

    def select(self, rows: Tensor) -> None:
        """Go on with some of the rows, tier by tier, so that what is left is not held twice."""
        self._take(rows)
        for tier in self.tiers:
            tier.select(rows, self.sides)

    def _take(self, rows: Tensor) -> None:
        there = rows.to(self._layers.device)
        self.seen, self._steps, self._prompt_lengths = self.seen[rows], self._steps[rows], self._prompt_lengths[rows]
        self._prompts = self._prompts[there]
        if self._settled is not None:
            self._settled = self._settled[:, :, rows]
        self.sides = {steps: {name: tensor[:, there] for name, tensor in side.items()} for steps, side in self.sides.items()}

    def read(self, layers: slice = slice(None)) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Everything stored of some layers, per tier: positions int64 [l, B, H, S], used bool [l, B, H, S] (on the CPU), keys
        and values float32 [l, B, H, S, D]."""
        found = []
        for tier in self.tiers:
            positions = tier.positions(layers)
            used = tier.used()
            used = (used if len(used) == 1 else used[layers]).expand(positions.shape)
            found.append((positions, used, *tier.read(layers)))
        return found

    def nbytes(self) -> dict[str, Tensor]:
        """Bytes by part, int64 [B]: raw (16-bit values), codes, scale, zero, norm, positions, scores, balancer, mean."""
        total: dict[str, Tensor] = {}
        for tier in self.tiers:
            for kind, size in tier.nbytes().items():
                total[kind] = total.get(kind, 0) + size
        for side in self.sides.values():
            for name, tensor in side.items():
                size = torch.full_like(self.seen, tensor[:, 0].numel() * tensor.element_size())
                total[name] = total.get(name, 0) + size
        return total

    def allocated(self) -> int:
        """Bytes that one row's tensors take of the memory, slots that are not used included."""
        return sum(tier.allocated() for tier in self.tiers) + self._side_bytes()

    def _side_bytes(self) -> int:
        """Bytes of what transforms were fitted to, of one row."""
        tensors = [tensor for side in self.sides.values() for tensor in side.values()]
        return sum(tensor[:, :1].numel() * tensor.element_size() for tensor in tensors)

    def compressed_tokens(self) -> Tensor:
        """Tokens that are not held at 16 bits (evicted ones included), summed over layers and heads, int64 [B]."""
        exact = [tier.count.sum(dim=(0, 2)) for tier in self.tiers if tier.tier.exact]
        return self.seen * self._per_row - (torch.stack(exact).sum(dim=0) if exact else 0)

    def held(self, begin: Tensor, end: Tensor) -> dict[str, Tensor]:
        """How many of the tokens at positions begin <= p < end (int64 [B]) each tier stores, summed over layers and heads:
        float64 [B] by the tier's bits."""
        counts: dict[str, Tensor] = {}
        rest = (end - begin).clamp(min=0).double() * self._per_row
        for tier in self.tiers:
            if not tier.knows_positions:  # the last one, of a policy that keeps every token: it has what the others have not
                counts[str(tier.tier)] = counts.get(str(tier.tier), 0) + rest
                continue
            positions = tier.positions()
            first, last = (x.to(positions.device)[None, :, None, None] for x in (begin, end))
            here = (positions >= first) & (positions < last) & tier.used().to(positions.device)
            count = here.sum(dim=(0, 2, 3)).double().cpu()
            counts[str(tier.tier)] = counts.get(str(tier.tier), 0) + count
            rest = rest - count
        return counts

    def kept_tokens(self) -> Tensor:
        """Tokens that are stored in some tier, summed over layers and heads, int64 [B]."""
        return torch.stack([tier.count.sum(dim=(0, 2)) for tier in self.tiers]).sum(dim=0)
