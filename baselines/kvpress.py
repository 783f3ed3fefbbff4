"""A press of NVIDIA's kvpress, run here: its score says which of the prompt's tokens stay; what it evicts is really dropped.

    python run.py policy=kvpress policy.press=LagKVPress task=linerecall

Any scorer press (a subclass of `ScorerPress`: it has a `score`), also one of your own that `kvpress` does not know, given as
my.module.MyPress. It sees what it would in kvpress: the attention module, hidden states, keys after RoPE, values; each prompt
by itself, without padding. No attention weights: a press that can't do without them says so. Presses that mask, or compress
in another way, are no scorer presses; ours of the same name are beside this file.

kvpress 0.5.5 pins transformers below 5.3, so it is installed without its dependencies:
pip install --no-deps kvpress==0.5.5 cachetools fire termcolor
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from mikv.budget import kept
from mikv.importance.base import Attended, Context, Observer, ObserverState, OfPrompt
from mikv.policy import Policy, percent
from mikv.quant.tier import Tier
from mikv.types import Geometry, Lengths

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_INSTALL = "pip install --no-deps kvpress==0.5.5 cachetools fire termcolor"


@dataclass(frozen=True)
class PressScore(OfPrompt):
    """
    Args:
        press: name of a class of kvpress, or a dotted name.
        options: of its constructor, by name.
        ratio: part of the prompt that is evicted, which some scores ask.
    """

    press: str
    options: tuple[tuple[str, Any], ...]
    ratio: float

    last = None
    shown = "attended"

    @property
    def observer(self) -> Observer:
        return self

    def start(self, geometry: Geometry, lengths: Lengths, device: torch.device) -> ObserverState:
        return _Scores(made(self), geometry, lengths, device)

    def combine(self, before: Tensor, after: Tensor) -> Tensor:
        raise NotImplementedError("a press sees whole prompts")

    def score(self, context: Context) -> Tensor:
        import torch

        if context.observed is None:
            return torch.zeros(context.positions.shape, dtype=torch.float32, device=context.positions.device)
        return context.observed


class _Scores(ObserverState):
    def __init__(self, press: Any, geometry: Geometry, lengths: Lengths, device: torch.device) -> None:
        import torch

        shape = (geometry.layers, len(lengths.tokens), geometry.kv_heads, lengths.width)
        self._scores = torch.zeros(shape, dtype=torch.float32, device=device)
        self._press, self._asked = press, False

    def attended(self, layer: int, shown: Attended) -> None:
        module, model = shown.module, shown.model
        if not self._asked:
            self._press.post_init_from_model(model)
            self._asked = True
        rotary = model.get_decoder().rotary_emb  # kvpress puts it there, and some presses ask for it
        vars(module)["rotary_emb"] = rotary
        try:
            for row, real in enumerate(shown.real.sum(dim=-1).tolist()):
                if not real:
                    continue
                mine = slice(shown.real.shape[1] - real, None)
                cosines = tuple(x.expand(len(shown.real), -1, -1)[row : row + 1, mine] for x in shown.cosines)
                of_row = (shown.keys[row : row + 1, :, mine], shown.values[row : row + 1, :, mine])
                given = {"position_embeddings": cosines}
                found = self._press.score(module, shown.hidden[row : row + 1, mine], *of_row, None, given)
                self._scores[layer, row, :, mine] = found[0].float()
        except AssertionError as error:
            raise ValueError(f"{type(self._press).__name__} can't score this prompt: {error}") from error
        finally:
            del vars(module)["rotary_emb"]

    def result(self) -> Tensor:
        return self._scores


def made(score: PressScore) -> Any:
    """The press.

    Raises:
        ValueError: there is no such scorer press, or it can't be had.
    """
    kind = _class(score.press)
    try:
        press = kind(**dict(score.options))
    except (TypeError, AssertionError) as error:
        raise ValueError(f"kvpress: press={score.press}: {error}") from error
    press.compression_ratio = score.ratio
    return press


@cache
def _class(name: str) -> Any:
    if find_spec("kvpress") is None:
        raise ValueError(f"policy=kvpress: kvpress is not installed; {_INSTALL}")
    try:
        library = import_module("kvpress")
    except ImportError as error:  # without its dependencies it lacks some
        raise ValueError(f"policy=kvpress: {error}; {_INSTALL}") from error
    module, _, short = name.rpartition(".")
    try:
        kind = getattr(import_module(module) if module else library, short)
    except (ImportError, AttributeError) as error:
        scorers = sorted(known for known, one in vars(library).items() if _is_scorer(one, library))
        raise ValueError(f"kvpress: press={name}: {error}; scorer presses: {', '.join(scorers)}") from error
    if not _is_scorer(kind, library):
        raise ValueError(
            f"kvpress: press={name} is no scorer press: it does not say which tokens are important, and what else it does "
            "can't be done here; policies of this project are beside baselines/kvpress.py"
        )
    return kind


def _is_scorer(kind: Any, library: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, library.ScorerPress) and kind is not library.ScorerPress


def kvpress(press: str = "SnapKVPress", keep: float = 0.2, options: Mapping[str, Any] | None = None) -> Policy:
    """
    Args:
        press: name of a scorer press of kvpress, or the dotted name of one of your own.
        keep: share of the prompt's tokens that stay. What comes later stays.
        options: of the press, as its constructor takes them, but for the compression ratio.
    """
    given = dict(options or {})
    score = PressScore(press, tuple(sorted(given.items())), 1 - keep)
    made(score)  # refuses before anything is loaded
    suffix = "".join(f" {name}={value}" for name, value in score.options)
    return Policy(
        name="kvpress",
        label=f"{press.rpartition('.')[2]} {percent(keep)}{suffix}",
        tiers=(Tier(16), Tier(0)),
        budget=kept("kvpress", keep, "fixed"),
        importance=score,
        every=0,
    )
