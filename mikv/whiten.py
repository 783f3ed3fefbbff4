"""Whiten: keys and values are made to look like white noise, and coded as such. Ours; the method in one sitting.

At 2 bits the scales and minima of a per-token quantizer are half of the cache. One norm per vector and a fixed codebook are
enough if a vector's coordinates look like independent Gaussians, which they do after three linear steps. Per layer and KV
head, from the prompt without its first `sinks` tokens, frozen while decoding (R_i = RoPE at position i):

    centre     mu  = mean_i R_-i k_i            u = k_i - R_i mu      FP16, D numbers per layer and head
    balance    b_c = (mean q_c^2 / mean u_c^2)^(1/4)                  FP16, D numbers per layer and head
    rotate     y = H (b * u) / sqrt(D)                                H: Hadamard; nothing is stored
    code       n = |y|,  c_j = the centroid nearest to sqrt(D) y_j / n     bits per number, and one FP16 per vector

    a key is read as      y^ = n c / |c|,   k^ = (H y^ / sqrt(D)) / b + R_i mu
    its logit is          n (q' . c) / |c| + (R_-i q) . mu    with    q' = H (q / b) / sqrt(D), once per query

Values are rotated and coded alike, without mean and balancer; the weighted sum is rotated back once. Centroids are Lloyd's and
Max's for N(0, 1), 1 to 5 bits. The first tokens stay exact: the attention is anchored to them, and their keys are unlike all
others, so that centring alone would push them out. A new token is coded at once, or waits among the last `window` ones in the
same code at more bits (`newest`), which costs little and pays most: what was said last is attended most. `keep` adds a tier of
important tokens: MiKV's question, with a good quantizer below it.

Sources. Hadamard and codebook with one norm: TurboQuant (arXiv 2504.19874), NSNQuant (arXiv 2505.18231). Centring of keys:
KVQuant's keys before RoPE (arXiv 2401.18079), NSNQuant. Keys above values: KIVI (arXiv 2402.02750), KVTuner (arXiv 2502.04420).
Balancer: MiKV (arXiv 2402.18096), in the form that is optimal under a rotation (mikv/quant/transforms/balance.py says why).
Ours: the combination, the mean taken before RoPE (after it, it ages: the middle frequencies turn within a few thousand
positions), the root-mean-square balancer, and a window in the same code at more bits.
"""

from __future__ import annotations

from mikv.budget import Amounts, Budget
from mikv.head_bits import HeadBits
from mikv.importance.base import Importance
from mikv.importance.scores import Accumulated, Noise
from mikv.options import check_choice
from mikv.policy import Policy, describe_options, percent
from mikv.quant.chain import Chain, chain_of
from mikv.quant.codes.affine import Affine
from mikv.quant.tier import Tier, tier_of

_BOOK = 5  # bits up to which there is a codebook; above, a scale and a minimum per vector are small change
_IMPORTANCE: dict[str, Importance | None] = {"accumulated": Accumulated(), "random": Noise(), "recency": None}


def whiten(
    low: Tier | str | int = 2,
    extra: float = 0.0,
    sinks: int = 4,
    window: int = 32,
    newest: Tier | str | int = 5,
    keep: float = 0.0,
    high: Tier | str | int = 4,
    importance: str = "accumulated",
    centre: str = "before",
    balance: str = "rms",
    rotate: bool = True,
) -> Policy:
    """
    Args:
        low: all tokens that are in no better tier: k3v2 = keys at 3 bits, values at 2; 1 to 5 by codebook, 8 by a scale and a
            minimum, 16. A chain that is given in full is taken as it is, see mikv/quant/tier.py.
        extra: bits of a key above those of `low`, mean over layers and heads, 0 to 2 (1 where `low` has 4): given to the heads
            in which the code's noise would disturb the attention most (mikv/head_bits.py).
        sinks: first tokens that stay at 16 bits.
        window: last tokens that are held in `newest` until they leave it.
        newest: the tier of the last tokens, as `low`.
        keep: share of the tokens seen that are important and held in `high`.
        high: the tier of important tokens, as `low`.
        importance: what is important: accumulated (H2O's score), recency, or random.
        centre, balance, rotate: the steps, to leave one out: before, after (RoPE) or none; rms, max or none; true or false.
    """
    check_choice("importance", importance, tuple(_IMPORTANCE))
    check_choice("centre", centre, ("before", "after", "none"))
    check_choice("balance", balance, ("rms", "max", "none"))
    steps = [] if centre == "none" else [f"centre/{centre}"]
    steps += [] if balance == "none" else [f"balance/{balance}"]
    steps += ["rotate"] if rotate else []
    label = (
        f"whiten {tier_of(low)}"
        + (f" + {extra:g} extra" if extra else "")
        + (f" + last {window} {tier_of(newest)}" if window else "")
    )
    label += f" + {percent(keep)} {importance} {tier_of(high)}" if keep else ""
    label += describe_options(sinks=(sinks, 4), centre=(centre, "before"), balance=(balance, "rms"), rotate=(rotate, True))
    # each tier above the last: how it stores, a share of the tokens, a number of tokens
    upper = [(Tier(16), 0.0, sinks)]
    if window and tier_of(newest).exact:
        upper = [(Tier(16), 0.0, sinks + window)]
    elif window:
        upper.append((_coded(newest, steps), 0.0, window))
    last = upper[-1]
    if keep:
        upper.append((_coded(high, steps), keep, 0))
        upper.sort(key=lambda tier: -(tier[0].k + tier[0].v))
    tiers, shares, tokens = zip(*upper, strict=True)
    above = Amounts(shares, tokens, "prompt" if extra else "seen")
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
        tiers=(*tiers, *(_coded(tier, steps) for tier in lowest)),
        budget=budget,
        importance=_IMPORTANCE[importance] if keep else None,
        sinks=sinks,
        window=window,
        window_tier=upper.index(last),
    )


def _coded(written: Tier | str | int, steps: list[str]) -> Tier:
    """A tier with the steps and a codebook, where keys or values are given by their bits alone."""
    tier = tier_of(written)
    of_values = [step for step in steps if step == "rotate"]
    return Tier(key=_chain(tier.key, steps), value=_chain(tier.value, of_values))


def _chain(given: Chain, steps: list[str]) -> Chain:
    if given.transforms or not isinstance(given.code, Affine):
        return given
    bits = given.code.bits
    return chain_of([*steps, f"codebook{bits}" if bits <= _BOOK else bits])
