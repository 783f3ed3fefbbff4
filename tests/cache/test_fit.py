"""Equal bytes: the size that a policy is fitted to is the size that its cache really has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import engine, prompt
from saved_models import save

from mikv.cache.fit import TOKENS, counted_size, largest_share
from mikv.config import ConfigError, compose, policy
from mikv.engine.requests import Decoding


@pytest.mark.parametrize(
    ("name", "options", "bytes_per_token"),
    [
        ("full", {}, 256),
        ("uniform", {"tier.bits": 4}, 64 + 16),  # 128 elements of 4 bits; a scale and a minimum of 2 bytes for 2 x 2 groups
        ("uniform", {"tier.bits": 4, "balance": True}, 80 + 64 * 4 / TOKENS),
        ("h2o", {"keep": 0.5}, (256 + 4 + 4) / 2),  # position and score of a token that stays
        ("mikv", {"keep": 0.5}, (256 + 4 + 4 + 32 + 16) / 2 + 64 * 4 / TOKENS),  # who is in the last tier never moves again
    ],
)
def test_the_size_is_counted_from_what_is_stored(name: str, options: dict[str, Any], bytes_per_token: float) -> None:
    assert counted_size(policy(name, options), 64) == pytest.approx(bytes_per_token / 256)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("size", [0.2, 0.3, 0.5])
@pytest.mark.parametrize("name", ["h2o", "streaming_llm", "mikv"])
def test_the_share_is_the_largest_that_fits(name: str, size: float, head_dim: int) -> None:
    options = {"low.bits": 2, "low.group": 64} if name == "mikv" else {}

    def made(share: float) -> float:
        return counted_size(policy(name, {**options, "keep": share}), head_dim)

    share = largest_share(lambda share: policy(name, {**options, "keep": share}), size, head_dim)
    assert share is not None
    assert made(share) <= size < made(round(share + 0.002, 3))


def test_what_fits_no_budget_has_no_share() -> None:
    assert largest_share(lambda share: policy("mikv", {"low.bits": 4, "keep": share}), 0.2, 64) is None
    assert largest_share(lambda share: policy("h2o", {"keep": share}), 2.0, 64) == 1.0


@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_run_has_the_size_that_its_panel_was_fitted_to(head_dim: int, tmp_path: Path) -> None:
    """The budgets of panel=risk, in caches of a model: never above, and not far below."""
    save(tmp_path, head_dim=head_dim)
    run = compose("panel=risk", f"model.path={tmp_path}")
    sizes: dict[str, float] = {}
    of_policies = engine(head_dim=head_dim).generate([prompt(1000)], run.panel, Decoding(1))
    for of_policy, (answer,) in zip(run.panel, of_policies, strict=True):
        sizes[of_policy.label] = sum(answer.usage.nbytes.values()) / answer.usage.full_nbytes
    fitted = {label: size for label, size in sizes.items() if not label.startswith(("full", "uniform"))}
    for budget in (0.2, 0.3, 0.5):
        assert sum(budget - 0.01 < size < budget + 0.002 for size in fitted.values()) >= 3, fitted
    assert all(any(b - 0.01 < size < b + 0.002 for b in (0.2, 0.3, 0.5)) for size in fitted.values()), fitted


def test_a_policy_that_does_not_fit_is_left_out_aloud(capsys: pytest.CaptureFixture[str]) -> None:
    entries = "[{policy: h2o, size: 0.2}, {policy: mikv, low.bits: 4, size: 0.1}]"
    run = compose("panel=demo", f"panel.entries={entries}", "model=tiny-random")
    assert [p.name for p in run.panel] == ["full", "h2o"]
    assert "mikv" in capsys.readouterr().out


def test_groups_that_a_head_can_not_be_cut_into_fit_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    entries = "[{policy: h2o, size: 0.5}, {policy: mikv, low.group: 5, size: 0.3}]"
    compose("panel=demo", f"panel.entries={entries}", "model=tiny-random")
    assert "group=5 does not divide head_dim=16" in capsys.readouterr().out


def test_a_size_needs_a_policy_with_a_share() -> None:
    with pytest.raises(ConfigError, match="uniform has no option 'keep'"):
        compose("panel=demo", "panel.entries=[{policy: uniform, size: 0.2}]", "model=tiny-random")
