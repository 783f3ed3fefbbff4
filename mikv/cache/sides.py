"""What the transforms of a bank's chains are fitted to: fitted once, shared by the tiers and the policies that ask alike."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mikv.cache.prefill import PrefillBank, PrefillState
from mikv.quant.base import Queries, Sample, Side, Transform, Where
from mikv.quant.chain import Chain
from mikv.tensors import layer_chunks

Steps = tuple[str, tuple[Transform, ...]]
"""`keys` or `values`, and the steps up to the one that is meant."""
Sides = dict[Steps, Side]
"""Of a store: what each step of its chains was fitted to."""


class Fits:
    """Fits steps to the prompts of a bank, and remembers them.

    Args:
        state: the prefill.
        bank: one of its banks.
    """

    def __init__(self, state: PrefillState, bank: PrefillBank) -> None:
        self.bank, self._rope = bank, state.rope
        self.all = [self]  # of the state's banks
        self._positions = state.lengths.positions(bank.keys.device)
        self._heads = state.geometry.query_heads // state.geometry.kv_heads
        self._known: dict[tuple[Steps, int], Side] = {}
        self._noise: dict[tuple[tuple[Transform, ...], int], Tensor] = {}
        self.memo: dict[str, Tensor] = {}  # what scores have made of the prompts

    @staticmethod
    def of(state: PrefillState) -> list[Fits]:
        """One for each bank."""
        made = [Fits(state, bank) for bank in state.banks]
        for fits in made:
            fits.all = made
        return made

    def sides(self, chains: dict[str, list[Chain]], skip: int) -> Sides:
        """Of all steps of some chains, `keys` and `values`.

        skip: so many first tokens of each prompt don't count: they are kept exact.
        """
        found: Sides = {}
        for what, some in chains.items():
            for chain in some:
                for length in range(1, len(chain.transforms) + 1):
                    steps = (what, chain.transforms[:length])
                    found[steps] = self._side(steps, skip)
        return found

    def _side(self, steps: Steps, skip: int) -> Side:
        if (steps, skip) not in self._known:
            self._known[steps, skip] = self._fitted(*steps, skip)
        return self._known[steps, skip]

    def key_noise(self, chain: Chain, skip: int) -> Tensor:
        """Variance of a logit's error, over the relative error of the keys' code, float32 [L, B, H]: mean |q|^2 times mean
        |k|^2 over D^2, as the chain's code sees them. The error is taken to be white, as a rotation leaves it."""
        if (chain.transforms, skip) not in self._noise:
            self._noise[chain.transforms, skip] = self._measured(chain, skip)
        return self._noise[chain.transforms, skip]

    def _measured(self, chain: Chain, skip: int) -> Tensor:
        known: tuple[Transform, ...] = ()  # the steps up to which queries are known channel by channel
        for i, step in enumerate(chain.transforms):
            if type(step).after is Transform.after:
                break
            known = chain.transforms[: i + 1]
        found = []
        for sample in self._samples("keys", known, skip):
            assert sample.queries is not None
            real = sample.real[None, :, None, :, None]
            square = sample.x.square().masked_fill(~real, 0).sum(dim=(3, 4)) / real.sum(dim=(3, 4)).clamp(min=1)
            found.append(sample.queries.square.sum(dim=-1) * square / sample.x.shape[-1] ** 2)
        return torch.cat(found)

    def _fitted(self, what: str, transforms: tuple[Transform, ...], skip: int) -> Side:
        *before, step = transforms
        parts = [step.fit(sample) for sample in self._samples(what, tuple(before), skip)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _samples(self, what: str, steps: tuple[Transform, ...], skip: int) -> Iterator[Sample]:
        """The prompts behind some steps, a few layers at a time."""
        sides = [self._side((what, steps[: i + 1]), skip) for i in range(len(steps))]
        exact, positions = self.bank.keys if what == "keys" else self.bank.values, self._positions
        if not exact.shape[3]:  # an empty prompt is one of padding: maxima of nothing are not defined
            exact = exact.new_zeros((*exact.shape[:3], 1, exact.shape[4]))
            positions = positions.new_full((len(positions), 1), -1)
        for layers in layer_chunks(exact.shape):
            x = exact[layers].float()
            where = Where(positions[None, :, None].expand(x.shape[:4]), self._rope)
            queries = self._queries(layers) if what == "keys" else None
            for done, side in zip(steps, sides, strict=True):
                here = {name: tensor[layers] for name, tensor in side.items()}
                x = done.apply(x, here, where)
                queries = None if queries is None else done.after(queries, here)
            yield Sample(x, positions >= skip, positions, queries, self._rope)

    def _queries(self, layers: slice) -> Queries:
        count = (self._positions >= 0).sum(dim=-1).clamp(min=1) * self._heads
        return Queries(self.bank.query_absmax[layers], self.bank.query_squares[layers] / count[None, :, None, None])


def apply(chain: Chain, what: str, x: Tensor, sides: Sides, layers: slice, where: Where) -> Tensor:
    """Vectors [l, B, H, S, D] of some layers, as the chain's code stores them."""
    for i, step in enumerate(chain.transforms):
        x = step.apply(x.float(), _of(sides, chain, what, i, layers), where)
    return x


def undo(chain: Chain, what: str, y: Tensor, sides: Sides, layers: slice, where: Where) -> Tensor:
    """The inverse of `apply`."""
    for i, step in reversed(list(enumerate(chain.transforms))):
        y = step.undo(y, _of(sides, chain, what, i, layers), where)
    return y


def _of(sides: Sides, chain: Chain, what: str, step: int, layers: slice) -> Side:
    return {name: tensor[layers] for name, tensor in sides[what, chain.transforms[: step + 1]].items()}
