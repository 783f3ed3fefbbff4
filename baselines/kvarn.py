"""KVarN (arXiv 2606.03458): rotate, balance a tile of tokens to one variance in both directions, round.

    y = H k / sqrt(D), or H v / sqrt(D)             H: Hadamard
    keys      y^ = (code s_c + z_c) t_i             a minimum and a step per channel c of a tile, a scale per token i
    values    y^ = (code s_i + z_i) t_c             a minimum and a step per token, a scale per channel

How s, z and t are found for each tile and head: mikv/quant/codes/kvarn.py. With tiles of g tokens a number of a key takes
b + 16 (2 D + g) / (D g) bits, one of a value b + 16 (D + 2 g) / (D g). The first 128 tokens stay at 16 bits for good, and those
of the tile that is not full yet until it is: up to 255 tokens, all counted here (published factors leave them out).

Official: vllm-project/vllm, vllm/model_executor/layers/quantization/kvarn/config.py (Apache-2.0): 4 bits of both, tiles of 128,
8 rounds, 128 first tokens; presets k4v4 and k4v2 with tiles of 128 and 64.

Deviations, none of which makes it weaker: tiles are counted from the first token behind the 128 first ones (the same places
where `sinks` is a multiple of the tile, as in every preset); a prompt is prefilled exactly and then compressed, as for every
policy here; positions of the 16-bit tokens are stored and counted, 4 bytes each.
"""

from __future__ import annotations

from mikv.budget import Amounts
from mikv.policy import Policy, describe_options
from mikv.quant.tier import Tier, recoded, tier_of


def kvarn(tier: Tier | str | int = 4, tile: int = 128, sinks: int = 128, rounds: int = 8) -> Policy:
    """
    Args:
        tier: bits of the tokens in full tiles, in short: 4, k4v2. A chain that is given in full is taken as it is.
        tile: tokens that are coded together.
        sinks: first tokens that stay at 16 bits.
        rounds: of balancing.
    """
    coded = recoded(
        tier,
        lambda bits: ["rotate", f"kvarn{bits}/{tile}/channel/{rounds}"],
        lambda bits: ["rotate", f"kvarn{bits}/{tile}/token/{rounds}"],
    )
    return Policy(
        name="kvarn",
        label=f"kvarn {tier_of(tier).label}" + describe_options(tile=(tile, 128), sinks=(sinks, 128), rounds=(rounds, 8)),
        tiers=(Tier(16), coded),
        budget=Amounts((0.0,), (sinks,)),
        sinks=sinks,
    )
