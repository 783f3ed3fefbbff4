"""ZipCache (NeurIPS 2024, arXiv 2405.14256): salient tokens at 4 bits, the others at 2.

    salience    attention per query, estimated from 10 % of the prompt's queries (mikv/importance/probes.py), per layer and head
    keys        a minimum and a step for each channel, over all tokens: code = round((2^b - 1) (k - min_c) / (max_c - min_c))
    values      v / sqrt(max_t |v_c|), then a minimum and a step per token (mikv/quant/transforms/scale.py)
    decoding    new tokens wait at 16 bits; every 100 steps they are ranked and coded

Official: ThisisBillhe/ZipCache, zipcache/models/modeling_llama.py, zipcache/models/CompressUtils/compress_function.py and
zipcache_generation_demo.py (MIT): 60 % of the tokens at 4 bits, 40 % at 2, probes 5 % last and 5 % random, every 100 tokens.

Deviations from that code:

* Sums are divided by the number of probes that can see a token, as salience is defined. The code divides by T - i although it
  summed a tenth of the queries, half of them the last ones, so that late tokens win whatever they received: `per=length`.
* Channel ranges and value scales are the prompt's, of all its tokens, and frozen: what lies beyond is clipped later on. The
  code takes them of each tier's tokens, and every 100 steps codes the whole cache anew from what it reads of itself. A token
  here is coded once per tier, so that no error builds up, and a range is stored once, not per tier.
* All 4-bit and new tokens are ranked every 100 steps, by the mean attention of all queries since; the code ranks the 100 new
  ones alone, by one step's attention. What has gone to 2 bits stays there (the same in the code). For this the positions and
  scores of tokens that may still move are stored and counted, 4 bytes each.
* A token's minimum and step of values are per head, not per layer: tokens of one tier differ from head to head, and the code
  mixes different tokens of the heads in one range. It costs 32 / D bits per value number instead of 32 / (H D).
* Probes are drawn by a hash, the same in every layer and for every prompt of a length, not anew in each.
"""

from __future__ import annotations

from mikv.budget import Amounts
from mikv.importance.probes import Salience
from mikv.policy import Policy, describe_options, percent
from mikv.quant.tier import Tier, recoded, tier_of


def zipcache(
    keep: float = 0.6,
    high: Tier | str | int = 4,
    low: Tier | str | int = 2,
    probes: float = 0.1,
    per: str = "probes",
    every: int = 100,
    seed: int = 0,
) -> Policy:
    """
    Args:
        keep: share of the tokens seen that are held in `high`, the salient ones.
        high, low: bits of the two tiers, in short: 4, k4v2. A chain that is given in full is taken as it is.
        probes: share of the prompt's queries that say what is salient.
        per: what their sums are divided by, probes or length (see above).
        every: steps between two rankings; new tokens wait for the next one at 16 bits.
        seed: of the draw of probes.
    """
    label = f"zipcache {percent(keep)} {tier_of(high).label}/{tier_of(low).label}"
    label += describe_options(probes=(probes, 0.1), per=(per, "probes"), every=(every, 100), seed=(seed, 0))
    return Policy(
        name="zipcache",
        label=label,
        tiers=(Tier(16), _coded(high), _coded(low)),
        budget=Amounts((0.0, keep)),
        importance=Salience(probes, per, seed),
        every=every,
    )


def _coded(tier: Tier | str | int) -> Tier:
    return recoded(tier, lambda bits: ["scale/range", f"unit{bits}"], lambda bits: ["scale/root", f"affine{bits}/all"])
