"""Whiten: keys and values are made to look like white noise, and coded as such. Ours; the method in one sitting.

At 2 bits the scales and minima of a per-token quantizer are half of the cache. One norm per vector and fixed levels are
enough if a vector's coordinates look like independent Gaussians, which they do after three linear steps. Per layer and KV
head, from the prompt without its first `sinks` tokens, frozen while decoding (R_i = RoPE at position i):

    centre     mu  = mean_i R_-i k_i            u = k_i - R_i mu      FP16, D numbers per layer and head
    balance    b_c = (mean q_c^2 / mean u_c^2)^(1/4)                  FP16, D numbers per layer and head
    rotate     y = H (b * u) / sqrt(D)                                H: Hadamard; nothing is stored
    code       n = |y|,  c = the levels nearest to sqrt(D) y / n      bits per number, and one FP16 per vector

    a key is read as      y^ = n c / |c|,   k^ = (H y^ / sqrt(D)) / b + R_i mu
    its logit is          n (q' . c) / |c| + (R_-i q) . mu    with    q' = H (q / b) / sqrt(D), once per query

Values are rotated and coded alike, without mean and balancer; the weighted sum is rotated back once. The levels are a
trellis's (mikv/quant/codes/trellis.py): neighbouring channels choose theirs together, for a quarter less error than with each
by itself in the same bits.

Few tokens are held better, in the same code at more bits, each kind for a reason:

* the first `sinks` at 16 bits: the attention is anchored to them, and their keys are unlike all others, so that centring alone
  would push them out;
* the last `window` ones (`newest`): what was said last is attended most. A new token waits there, then goes down;
* the `keep` of the prompt that its last queries attended most (`high`): in every layer and head some dozen tokens receive
  much of the attention, and their noise is all that is left of it. They are chosen once, so that no score is stored, and all
  positions but theirs follow from the order of the slots.

Sources. Hadamard and codebook with one norm: TurboQuant (arXiv 2504.19874), NSNQuant (arXiv 2505.18231). Centring of keys:
KVQuant's keys before RoPE (arXiv 2401.18079), NSNQuant. Keys above values: KIVI (arXiv 2402.02750), KVTuner (arXiv 2502.04420).
Balancer and important tokens: MiKV (arXiv 2402.18096), the balancer in the form that is optimal under a rotation
(mikv/quant/transforms/balance.py says why). Attention of the last queries: SnapKV (arXiv 2404.14469).
Ours: the combination, the mean taken before RoPE (after it, it ages: the middle frequencies turn within a few thousand
positions), the root-mean-square balancer, the trellis, and tiers of one code with different bits.
"""

from __future__ import annotations

from mikv.budget import Amounts, Budget
from mikv.head_bits import HeadBits
from mikv.importance.base import Importance
from mikv.importance.scores import Accumulated, Late, Noise, PerQuery
from mikv.options import check_choice
from mikv.policy import Policy, describe_options, percent
from mikv.quant.codes.affine import Affine
from mikv.quant.tier import Tier, recoded, tier_of

_BOOK = 5  # bits up to which there is a codebook; above, a scale and a minimum per vector are small change
_IMPORTANCE: dict[str, Importance | None] = {
    "accumulated": Accumulated(),
    "per_query": PerQuery(),
    "late": Late(),
    "recency": None,
    "random": Noise(),
}


def whiten(
    low: Tier | str | int = 2,
    extra: float = 0.0,
    sinks: int = 4,
    window: int = 32,
    newest: Tier | str | int = 5,
    keep: float = 0.02,
    high: Tier | str | int = 8,
    importance: str = "late",
    centre: str = "before",
    balance: str = "rms",
    rotate: bool = True,
    code: str = "trellis",
) -> Policy:
    """
    Args:
        low: all tokens that are in no better tier: k3v2 = keys at 3 bits, values at 2; 1 to 5 by `code`, 8 by a scale and a
            minimum, 16. A chain that is given in full is taken as it is, see mikv/quant/tier.py.
        extra: bits of a key above those of `low`, mean over layers and heads, 0 to 2 (1 where `low` has 4): given to the heads
            in which the code's noise would disturb the attention most (mikv/head_bits.py).
        sinks: first tokens that stay at 16 bits.
        window: last tokens that are held in `newest` until they leave it.
        newest: the tier of the last tokens, as `low`.
        keep: share of the prompt's tokens that are important and held in `high`, for good.
        high: the tier of important tokens, as `low`; no worse than `newest`.
        importance: what is important: attention of late (of the last 32 queries), accumulated (H2O's score), or per_query that
            could see a token; recency; or random.
        centre, balance, rotate: the steps, to leave one out: before, after (RoPE) or none; rms, max or none; true or false.
        code: trellis, or codebook: each channel by itself.
    """
    check_choice("importance", importance, tuple(_IMPORTANCE))
    check_choice("centre", centre, ("before", "after", "none"))
    check_choice("balance", balance, ("rms", "max", "none"))
    check_choice("code", code, ("trellis", "codebook"))
    steps = [] if centre == "none" else [f"centre/{centre}"]
    steps += [] if balance == "none" else [f"balance/{balance}"]
    steps += ["rotate"] if rotate else []
    label = f"whiten {tier_of(low)}" + (f"+{extra:g}" if extra else "")
    if (window, str(tier_of(newest))) != (32, "5"):
        label += f" last {window} {tier_of(newest)}" if window else " no window"
    if (keep, str(tier_of(high)), importance) != (0.02, "8", "late"):
        label += f" {percent(keep)} {importance} {tier_of(high)}" if keep else " none important"
    label += describe_options(sinks=(sinks, 4), centre=(centre, "before"), balance=(balance, "rms"), rotate=(rotate, True))
    label += describe_options(code=(code, "trellis"))
    # each tier above the last: how it stores, a share of the prompt, a number of tokens
    upper = [(Tier(16), 0.0, sinks)]
    if keep:
        upper.append((_coded(high, steps, code), keep, 0))
    if window and tier_of(newest).exact:
        upper[0] = (Tier(16), 0.0, sinks + window)
    elif window:
        upper.append((_coded(newest, steps, code), 0.0, window))
    last = len(upper) - 1 if window and not tier_of(newest).exact else 0
    tiers, shares, tokens = zip(*upper, strict=True)
    above = Amounts(shares, tokens, "prompt")
    budget: Budget = above
    lowest = [tier_of(low)]
    if extra:
        least = lowest[0].k
        if least >= _BOOK or lowest[0].key.transforms or not isinstance(lowest[0].key.code, Affine):
            raise ValueError(f"extra={extra}: wanted a `low` whose keys are given by their bits, 1 to {_BOOK - 1}; it is {low}")
        keys = range(min(least + 2, _BOOK), least - 1, -1)
        lowest = [Tier(key_bits=bits, value_bits=lowest[0].v) for bits in keys]
        budget = HeadBits(above, tuple(keys), extra)
    return Policy(
        name="whiten",
        label=label,
        tiers=(*tiers, *(_coded(tier, steps, code) for tier in lowest)),
        budget=budget,
        importance=_IMPORTANCE[importance] if keep else None,
        sinks=sinks,
        window=window,
        window_tier=last,
    )


def _coded(written: Tier | str | int, steps: list[str], code: str) -> Tier:
    """A tier with the steps and the code, where keys or values are given by their bits alone."""
    of_values = [step for step in steps if step == "rotate"]

    def chain(before: list[str], bits: int) -> list[str | int]:
        return [*before, f"{code}{bits}" if bits <= _BOOK else bits]

    return recoded(written, lambda bits: chain(steps, bits), lambda bits: chain(of_values, bits))
