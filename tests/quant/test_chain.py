"""Ways to store: what may be written, what each transform and code promises, and what the bytes are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mikv.quant.base import Queries, Sample, Side, Transform, Where
from mikv.quant.chain import Chain, chain_of
from mikv.quant.codes.affine import Affine
from mikv.quant.codes.channel import Channel
from mikv.quant.codes.codebook import Codebook, centroids
from mikv.quant.codes.exact import Exact
from mikv.quant.codes.trellis import Trellis
from mikv.quant.tier import Tier, tier_of
from mikv.quant.transforms.balance import Balance
from mikv.quant.transforms.centre import Centre
from mikv.quant.transforms.rotate import Rotate, hadamard
from mikv.quant.transforms.scale import Scale
from mikv.rope import Rope

DIM, TOKENS = 64, 40
SHAPE = (2, 3, 2, TOKENS, DIM)  # layers, rows, heads
ROPE = Rope(10000.0 ** -(torch.arange(0, DIM, 2) / DIM))
TRANSFORMS = [Centre("before"), Centre("after"), Balance("max"), Balance("rms"), Rotate(), Scale("range"), Scale("root")]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def keys(seed: int = 0) -> Tensor:
    """Keys after RoPE with a bias that they had before it, and channels of very different size."""
    x = random(*SHAPE, seed=seed) * torch.exp(random(DIM, seed=1))
    return ROPE.turn(x + 5 * random(DIM, seed=2), positions(), TOKENS)


def positions(padding: int = 0) -> Tensor:
    return (torch.arange(TOKENS) - padding).clamp(min=0).expand(SHAPE[:4])


def sample(x: Tensor, real: Tensor | None = None) -> Sample:
    q = random(*SHAPE[:3], 2 * TOKENS, DIM, seed=3) * torch.exp(random(DIM, seed=4))
    queries = Queries(q.abs().amax(dim=3), q.square().mean(dim=3))
    real = torch.ones(SHAPE[1], TOKENS, dtype=torch.bool) if real is None else real
    return Sample(x, real, torch.arange(TOKENS).expand(SHAPE[1], -1), queries, ROPE)


WHERE = Where(positions(), ROPE)


@pytest.mark.parametrize(
    ("written", "chain"),
    [
        (4, Chain(Affine(4))),
        ("4", Chain(Affine(4))),
        (16, Chain(Exact())),
        (0, Chain(None)),
        ("affine4/32", Chain(Affine(4, 32))),
        ("channel2", Chain(Channel(2, 32))),
        (["channel2/64"], Chain(Channel(2, 64))),
        (["balance", "affine4"], Chain(Affine(4), (Balance(),))),
        (["balance", 3], Chain(Affine(3), (Balance(),))),
        (["centre", "balance/rms", "rotate", "codebook2"], Chain(Codebook(2), (Centre(), Balance("rms"), Rotate()))),
        (["centre/after", Codebook(5)], Chain(Codebook(5), (Centre("after"),))),
    ],
)
def test_what_may_be_written(written: Any, chain: Chain) -> None:
    assert chain_of(written) == chain
    assert chain_of(str(chain).split(" > ") if chain.code else 0) == chain  # and written back


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("afine4", "Did you mean affine"),
        ("affine", "how many bits"),
        ("affine7", "8, 5, 4, 3, 2, 1"),
        ("codebook8", "5, 4, 3, 2, 1"),
        ("affine4/32/1", "affine takes bits, group"),
        ("rotate/2", "rotate takes no parameters"),
        ("channel2/1", "at least 2 tokens"),
        ("balance", "balance is no code"),
        (["affine4", "affine2"], "affine4 is no transform"),
        (["rotate", "balance", "affine4"], "order is centre, balance, rotate"),
        (["balance", "balance/rms", "affine4"], "can't come after"),
        (["balance", 16], "16 bits or not at all"),
        (["rotate", 0], "16 bits or not at all"),
        ([], "empty list"),
        (6, "16, 8, 5, 4, 3, 2, 1, 0"),
        (True, "no step"),
        ("balance/mean", "max or rms"),
        ("scale/mean", "range or root"),
        ("unit6", "8, 5, 4, 3, 2, 1"),
        ("centre/between", "before or after"),
    ],
)
def test_what_makes_no_chain_is_refused(written: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        chain_of(written)


def test_tiers_in_short_and_in_full() -> None:
    assert tier_of("k4v2") == Tier(key_bits=4, value_bits=2) == Tier(2, key_bits=4)
    assert tier_of(0).evicted
    assert tier_of("16").exact
    assert str(Tier(key=["centre", "codebook3"], value="codebook2")) == "k3v2"
    assert Tier(2, key=["balance", "affine2"]) == Tier(2).balanced()
    assert Tier(3).balanced().balanced() == Tier(3).balanced()
    assert Tier(16).balanced() == Tier(16)
    assert Tier(4, group=32).group == 32
    for wrong, message in ((lambda: tier_of("four"), "no tier"), (lambda: Tier(value=["balance", 4]), "know nothing of")):
        with pytest.raises(ValueError, match=message):
            wrong()
    with pytest.raises(ValueError, match="both say"):
        Tier(key_bits=4, key="affine2")
    with pytest.raises(ValueError, match="evicted whole"):
        Tier(key=0, value=2)


@pytest.mark.parametrize("step", TRANSFORMS)
def test_undo_is_the_inverse(step: Transform) -> None:
    x = keys()
    side = step.fit(sample(x))
    y = step.apply(x, side, WHERE)
    assert not torch.allclose(y, x, atol=0.1)
    torch.testing.assert_close(step.undo(y, side, WHERE), x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("step", TRANSFORMS)
def test_query_and_shift_are_the_adjoint(step: Transform) -> None:
    """q . undo(y) = query(q) . y + shift(q), for any y."""
    side = step.fit(sample(keys()))
    y, q = random(*SHAPE, seed=5), random(*SHAPE[:3], 3, DIM, seed=6)
    mine = step.query(q, side) @ y.transpose(-1, -2)
    shift = step.shift(q, side, WHERE)
    mine = mine if shift is None else mine + shift
    torch.testing.assert_close(mine, q @ step.undo(y, side, WHERE).transpose(-1, -2), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("step", [Centre("after"), Rotate(), Scale("range"), Scale("root")])
def test_output_is_the_undo_of_a_weighted_sum(step: Transform) -> None:
    side = step.fit(sample(keys())._replace(queries=None))
    y, p = random(*SHAPE, seed=5), torch.rand(*SHAPE[:3], 3, TOKENS, generator=torch.Generator().manual_seed(7))
    got = step.output(p @ y, p.sum(dim=-1, keepdim=True), side)
    torch.testing.assert_close(got, p @ step.undo(y, side, WHERE), rtol=1e-4, atol=1e-3)


def test_the_hadamard_matrix_is_symmetric_and_its_own_inverse() -> None:
    for size in (2, 64, 128):
        h = hadamard(size, torch.device("cpu"))
        assert torch.equal(h, h.T)
        torch.testing.assert_close(h @ h, torch.eye(size), rtol=0, atol=1e-6)
        torch.testing.assert_close(h.abs(), torch.full((size, size), size**-0.5))


@pytest.mark.parametrize("dim", [80, 96])
def test_a_head_without_a_hadamard_matrix_is_refused(dim: int) -> None:
    with pytest.raises(ValueError, match=f"head_dim={dim} is no power of two"):
        Tier(key=["rotate", "codebook2"], value=2).check(dim)
    Tier(key=["rotate", "codebook2"], value=2).check(64)


@pytest.mark.parametrize(("rope", "turned"), [("after", False), ("before", True)])
def test_a_shift_of_all_keys_changes_no_code(rope: str, turned: bool) -> None:
    """A constant (after RoPE) or one that is turned with the position (before it) is what the centre takes away."""
    x, added = random(*SHAPE), 3 * random(DIM, seed=8)
    step, code = Centre(rope), Affine(4)
    shift = ROPE.turn(added.expand(SHAPE), positions(), TOKENS) if turned else added
    codes = []
    for moved in (x, x + shift):
        side = step.fit(sample(moved))
        codes.append(code.encode(step.apply(moved, side, WHERE), torch.float16)["codes"])
    # the mean is rounded to FP16: now and then a number on the edge of two codes falls to the other side
    assert (codes[0] != codes[1]).float().mean() < 0.02
    other = Centre("before" if rope == "after" else "after")
    side = [other.fit(sample(moved)) for moved in (x, x + shift)]
    again = [code.encode(other.apply(m, s, WHERE), torch.float16)["codes"] for m, s in zip((x, x + shift), side, strict=True)]
    assert (again[0] != again[1]).float().mean() > 0.2


@pytest.mark.parametrize("rope", ["before", "after"])
def test_centring_alone_changes_no_attention(rope: str) -> None:
    """All tokens in one tier: a softmax does not feel what all logits have in common; and what was taken is added back."""
    step, q = Centre(rope), random(*SHAPE[:3], 3, DIM, seed=6)
    x = keys()
    side = step.fit(sample(x))
    shift = step.shift(q, side, WHERE)
    assert shift is not None
    logits = (q @ step.apply(x, side, WHERE).transpose(-1, -2) + shift) / DIM**0.5
    torch.testing.assert_close(logits.softmax(dim=-1), (q @ x.transpose(-1, -2) / DIM**0.5).softmax(dim=-1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("step", TRANSFORMS)
def test_padding_and_first_tokens_do_not_count(step: Transform) -> None:
    x = keys()
    real = torch.ones(SHAPE[1], TOKENS, dtype=torch.bool)
    real[:, :7] = False
    spoiled = x.clone()
    spoiled[..., :7, :] = 1e4
    for name, tensor in step.fit(sample(x, real)).items():
        assert torch.equal(tensor, step.fit(sample(spoiled, real))[name])


@pytest.mark.parametrize("step", TRANSFORMS)
@pytest.mark.parametrize("real", [0, 1])
def test_no_token_or_one_and_channels_of_zeros_divide_by_nothing(step: Transform, real: int) -> None:
    x = keys()
    x[..., ::2] = 0
    mask = torch.zeros(SHAPE[1], TOKENS, dtype=torch.bool)
    mask[:, :real] = True
    side = step.fit(sample(x, mask))
    y = step.apply(x, side, WHERE)
    assert y.isfinite().all()
    if not real:
        assert torch.equal(y, x) or isinstance(step, Rotate)
    assert step.undo(y, side, WHERE).isfinite().all()


def test_the_rms_balancer_equalizes_and_is_the_least_error_under_a_rotation() -> None:
    """b^4 = Q / K: queries and keys then have the same mean square in each channel, and any other b makes
    (sum Q / b^2)(sum b^2 K) larger."""
    x, s = random(*SHAPE) * torch.exp(random(DIM, seed=1)), sample(random(*SHAPE))
    s = s._replace(x=x)
    b = Balance("rms").fit(s)["balancer"].float()
    assert s.queries is not None
    big_k = x.square().mean(dim=3)
    torch.testing.assert_close(s.queries.square / b.square(), b.square() * big_k, rtol=5e-3, atol=0)

    def error(by: Tensor) -> Tensor:
        assert s.queries is not None
        return (s.queries.square / by.square()).sum(dim=-1) * (by.square() * big_k).sum(dim=-1)

    for seed in range(5):
        assert (error(b * torch.exp(0.2 * random(DIM, seed=seed))) > error(b)).all()
    assert (error(Balance("max").fit(s)["balancer"]) > error(b)).all()


def test_a_later_step_sees_the_queries_as_the_earlier_ones_left_them() -> None:
    s = sample(keys())
    assert s.queries is not None
    side = Balance("max").fit(s)
    after = Balance("max").after(s.queries, side)
    assert after is not None
    torch.testing.assert_close(after.absmax, Balance("max").apply(s.x, side, WHERE).abs().amax(dim=3))
    assert Rotate().after(s.queries, {}) is None


def test_centroids_are_those_of_lloyd_and_max() -> None:
    """The published tables, and the two conditions that make them: edges half way, each centroid the mean of its cell."""
    published = {1: [0.7979], 2: [0.4528, 1.5104], 3: [0.2451, 0.7560, 1.3439, 2.1520]}
    for bits, positive in published.items():
        assert centroids(bits)[2 ** (bits - 1) :] == pytest.approx(positive, abs=2e-4)
    grid = torch.linspace(-12, 12, 2_000_001, dtype=torch.float64)
    density = torch.exp(-grid.square() / 2)
    for bits in range(1, 6):
        levels = torch.tensor(centroids(bits), dtype=torch.float64)
        cell = torch.bucketize(grid, (levels[1:] + levels[:-1]) / 2)
        mass, moment = (torch.zeros_like(levels).index_add_(0, cell, x) for x in (density, density * grid))
        torch.testing.assert_close(moment / mass, levels, rtol=0, atol=1e-4)
        assert len(levels) == 2**bits


@pytest.mark.parametrize(
    ("dim", "bits", "error"),
    [(64, 2, 0.116), (64, 3, 0.033), (64, 4, 0.0089), (128, 2, 0.119), (128, 3, 0.034), (128, 4, 0.0093)],
)
def test_the_codebooks_error_on_gaussian_vectors(dim: int, bits: int, error: float) -> None:
    """quantizers.md, section 1: measured with other code."""
    x = random(20_000, dim)
    code = Codebook(bits)
    back = code.decode(code.encode(x, torch.float16))
    assert float((back - x).square().sum() / x.square().sum()) == pytest.approx(error, rel=0.03)
    torch.testing.assert_close(back.norm(dim=-1), x.norm(dim=-1), rtol=1e-3, atol=0)  # the norm is kept


CODES: list[Any] = [
    *(Affine(bits) for bits in (8, 5, 4, 3, 2, 1)),
    Affine(2, 16),
    *(Affine(bits, "all") for bits in (8, 5, 4, 3, 2, 1)),
    *(Codebook(bits) for bits in (5, 4, 3, 2, 1)),
    *(Trellis(bits) for bits in (5, 4, 3, 2, 1)),
    *(Channel(bits, 8) for bits in (8, 5, 4, 3, 2, 1)),
    Exact(),
]


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("dim", [64, 128])
def test_stored_bytes_are_what_the_code_says(code: Any, dim: int) -> None:
    """Packed for real, scales and norms included; shapes of a cache."""
    parts = code.encode(random(2, 1, 3, 24, dim), torch.float16)
    assert sum(part.nbytes for part in parts.values()) * 8 == code.size(dim) * 2 * 3 * 24 * dim
    assert all(part.shape[3] == 24 // (code.block if name in code.per_block else 1) for name, part in parts.items())
    assert code.decode(parts).shape == (2, 1, 3, 24, dim)


@pytest.mark.parametrize("code", CODES)
def test_zeros_and_constants_are_exact_or_close_and_extremes_are_finite(code: Any) -> None:
    for value in (0.0, 1.5):
        x = torch.full((1, 1, 1, 16, 64), value)
        back = code.decode(code.encode(x, torch.float16))
        if isinstance(code, Codebook | Trellis) and value:
            assert torch.allclose(back.norm(dim=-1), x.norm(dim=-1), rtol=1e-3)
        else:
            assert torch.equal(back, x)
    for value in (1e30, 1e-30):
        assert code.decode(code.encode(torch.full((1, 1, 1, 16, 64), value), torch.float16)).isfinite().all()


@pytest.mark.parametrize("code", CODES)
def test_more_bits_are_closer_and_the_grid_is_fine_enough(code: Any) -> None:
    """The error of one number is at most half a step of its own group (affine)."""
    x = random(1, 1, 1, 48, 64)
    back = code.decode(code.encode(x, torch.float16))
    if code.bits in (8, 16):
        assert (back - x).abs().max() < 0.03
    if isinstance(code, Channel):
        blocks = x.unflatten(3, (-1, code.block))
        step = (blocks.amax(dim=4) - blocks.amin(dim=4)) / (2**code.bits - 1)
        assert ((back - x).abs().unflatten(3, (-1, code.block)) <= step.unsqueeze(4) * 0.51 + 4e-3).all()


def test_channels_with_an_outlier_cost_the_others_nothing() -> None:
    """Per channel an outlier channel has a step of its own; per token it widens everyone's."""
    x = random(1, 1, 1, 64, 64)
    x[..., 5] *= 100
    rest = [c for c in range(64) if c != 5]
    per_channel, per_token = ((c.decode(c.encode(x, torch.float16)) - x)[..., rest] for c in (Channel(4, 32), Affine(4)))
    assert per_channel.square().mean() < 0.05 * per_token.square().mean()


def test_a_new_step_is_a_class_of_ones_own() -> None:
    class Negate(Transform):
        order = 4

        def apply(self, x: Tensor, side: Side, where: Where) -> Tensor:
            return -x

        def undo(self, y: Tensor, side: Side, where: Where) -> Tensor:
            return -y

        def query(self, q: Tensor, side: Side) -> Tensor:
            return -q

    step = Negate()
    assert chain_of(["rotate", step, "affine4"]) == Chain(Affine(4), (Rotate(), step))
