"""The kernels read a real cache: same outputs and scores as unpacking everything and attending."""

from __future__ import annotations

import pytest
import torch
from conftest import engine, tokens

from baselines.h2o import h2o
from mikv.budget import Amounts
from mikv.cache.backend import Backend
from mikv.cache.kernel_read import KernelReader
from mikv.cache.policy_store import PolicyStore, Received
from mikv.cache.reader import Reader
from mikv.mikv import mikv
from mikv.policy import Policy
from mikv.quant.tier import Tier
from mikv.whiten import whiten

PANEL = [
    mikv(keep=0.3),
    mikv(keep=0.5, high=Tier(8), low=Tier(bits=4, key_bits=3)),
    mikv(keep=0.4, high=8, low=Tier(key=["balance/rms", "rotate", "affine3"], value=4)),
    mikv(keep=0.2, low=Tier(2, group=16), balance=False),
    h2o(keep=0.4),
]
FOLDED = [  # logits are shifted, and the weighted sum of values is rotated back; levels are looked up
    mikv(keep=0.3, low=Tier(key=["centre", "balance/rms", "rotate", "affine3"], value=["rotate", "affine3"])),
    mikv(keep=0.3, high=8, low=Tier(key=["centre/after", "balance", "affine4"], value=["centre/after", "rotate", "affine4"])),
    whiten("k3v2", extra=0.5, window=6, keep=0.1),
    whiten(2, window=4, newest=4, keep=0.0, code="codebook"),
]
# FP32 for torch; the kernel takes 16 bits, and the dense way rounds what it unpacks to 16 bits as well.
TOLERANCE = {None: 2e-5, "reference": 2e-5, "triton": 1e-2}


def places(reader: Reader) -> dict[PolicyStore, tuple[int, slice]]:
    """Number and rows of each store that a reader reads."""
    return {store: (i, rows) for i, (store, rows) in enumerate(reader._rows())}


@torch.inference_mode()
@pytest.mark.parametrize("implementation", TOLERANCE)
def test_attention_and_scores_of_a_compressed_cache(implementation: str | None) -> None:
    """Left-padded prompts of unequal length, a panel of policies, after a few steps that moved tokens between tiers."""
    dtype = torch.float16 if implementation == "triton" else torch.float32
    run = engine("packed", dtype=dtype, head_dim=32, query_heads=4, kv_heads=2)
    prompts = [tokens(40), tokens(23, seed=1)]
    panel = PANEL + FOLDED
    state = run.prefill(prompts, {observer for policy in panel for observer in policy.observers})
    cache = run.compress(state, panel)
    rows = len(panel) * len(prompts)
    positions = torch.tensor([len(prompt) for prompt in prompts] * len(panel))
    for step in range(3):
        run.step(cache, torch.full((rows,), step), positions + step, torch.ones(rows, dtype=torch.bool))
    bank = cache.banks[0]
    bank.keys.normal_(generator=torch.Generator().manual_seed(0))
    bank.values.normal_(generator=torch.Generator().manual_seed(1))
    kernels = KernelReader(bank.stores, implementation)
    tolerance = TOLERANCE[implementation]
    query = torch.randn((rows, 4, 1, 32), generator=torch.Generator().manual_seed(2)).to(dtype)
    for layer in range(len(bank.layers)):
        wanted = bank.attend(layer, query, 0.3)
        out = kernels.attend(layer, query, bank.keys[layer], bank.values[layer], 0.3)
        assert (out.float() - wanted.float()).abs().max() <= tolerance
    # a score is wanted of the first tier and of the newest token
    received = {store: reader._received(*place) for reader in bank.readers for store, place in places(reader).items()}
    for store, place in places(kernels).items():
        mine, theirs = kernels._received(*place), received[store]
        if not store.policy.scored:
            assert mine == theirs == Received()
            continue
        assert mine.newest is not None
        assert theirs.newest is not None
        assert (mine.newest - theirs.newest).abs().max() <= tolerance
        assert [x is None for x in mine.tiers] == [x is None for x in theirs.tiers]
        used = store.tiers[0].used().expand(mine.tiers[0].shape)  # type: ignore[union-attr]
        assert (mine.tiers[0] - theirs.tiers[0])[used].abs().max() <= tolerance  # type: ignore[operator]
        assert mine.tiers[0][used].sum() > 0.1  # type: ignore[index]


def test_policies_without_scores_want_no_mass(monkeypatch: pytest.MonkeyPatch) -> None:
    from mikv.kernels import pick

    wants: list[bool] = []
    original = pick.decode_attention

    def watched(query: torch.Tensor, segments: list, *rest: object) -> object:  # type: ignore[type-arg]
        wants.extend(segment.wants_mass for segment in segments)
        return original(query, segments, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(pick, "decode_attention", watched)
    run = engine("packed")
    policy = Policy(name="recent", label="recent", tiers=(Tier(16), Tier(4)), budget=Amounts((0.5,)))
    bank = run.compress(run.prefill([tokens(9)]), [policy]).banks[0]
    query = torch.zeros(1, 4, 1, 16)
    reader = KernelReader(bank.stores)
    out = reader.attend(0, query, bank.keys[0], bank.values[0], 1.0)
    assert wants == [False, False, False]
    assert reader._received(0, slice(0, 1)) == Received()
    assert out.isfinite().all()


@pytest.mark.parametrize("implementation", [None, "reference", "triton"])
def test_what_can_be_folded_is_read_by_the_kernels(implementation: str | None) -> None:
    """Codes that no kernel knows are read from a dense copy, and tiers whose keys and values have scales of two sizes."""
    backend = Backend("kernel", implementation)
    assert all(backend.reader_of(policy) == "kernel" for policy in PANEL + FOLDED)
    for low in (Tier(key="codebook3", value=2), Tier(5), Tier(key="channel2", value=2), Tier(key="affine4/8", value=4)):
        assert backend.reader_of(mikv(low=low, balance=False)) == "packed"
