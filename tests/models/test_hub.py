"""Weights from the hub: the commit that is named is the one that runs, online, offline, and while a branch moves."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_stand_in import Hub, keep, serving, use
from safetensors.torch import load_file
from saved_models import answer, save

from mikv.models.load import ModelSpec, ModelUnavailable, load, load_geometry, load_tokenizer

REPOSITORY, A, B = "org/small", "a" * 40, "b" * 40
every_way = pytest.mark.parametrize(
    "call", [load, load_tokenizer, load_geometry, ModelSpec.describe], ids=["load", "tokenizer", "geometry", "describe"]
)


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """Two commits: other weights, and other limits in the configuration."""
    return {
        A: save(tmp_path / "a", seed=1, max_position_embeddings=100),
        B: save(tmp_path / "b", seed=2, max_position_embeddings=200),
    }


@pytest.fixture
def offline(tmp_path: Path, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A local copy of both; main is A."""
    use(monkeypatch, tmp_path / "cache", endpoint=None)
    keep(tmp_path / "cache", REPOSITORY, B, folders[B])
    keep(tmp_path / "cache", REPOSITORY, A, folders[A])
    return tmp_path / "cache" / "models--org--small"


@pytest.fixture
def hub(tmp_path: Path, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that has both, and no local copy; main is A."""
    with serving(REPOSITORY) as hub:
        hub.commits, hub.branches = folders, {"main": A}
        use(monkeypatch, tmp_path / "cache", hub.endpoint)
        yield hub


def spec(**options: Any) -> ModelSpec:
    return ModelSpec("m", hub=REPOSITORY, **options)


def same_weights(loaded: Any, folder: Path) -> bool:
    there = load_file(folder / "model.safetensors")
    return all(torch.equal(loaded.model.state_dict()[name], tensor) for name, tensor in there.items())


# --- offline ---


@pytest.mark.usefixtures("offline")
def test_two_commits_of_a_local_copy_are_two_models(folders: dict[str, Path]) -> None:
    main, other = spec(), spec(revision=B)
    assert main.describe() == f"hub:{REPOSITORY}@{A}"
    assert other.describe() == f"hub:{REPOSITORY}@{B}"
    assert (load(main).max_tokens, load(other).max_tokens) == (100, 200)
    assert answer(load(main)) == answer(load(ModelSpec("m", path=str(folders[A])))) != answer(load(other))


def test_a_branch_that_has_moved_is_another_model_and_one_spec_stays_with_its_own(
    offline: Path, folders: dict[str, Path]
) -> None:
    before = spec()
    assert before.describe().endswith(A)
    (offline / "refs" / "main").write_text(B)
    assert before.describe().endswith(A)
    assert same_weights(load(before), folders[A])
    assert load_geometry(before) == load_geometry(spec())
    assert spec().describe().endswith(B)
    assert same_weights(load(spec()), folders[B])


@every_way
def test_a_local_copy_that_is_not_whole_says_so(call: Callable[[ModelSpec], object], offline: Path) -> None:
    (offline / "snapshots" / A / "model.safetensors").unlink()
    with pytest.raises(ModelUnavailable, match=rf"the hub can't be reached, and of its commit {A} the local copy is no whole"):
        call(spec())


@every_way
@pytest.mark.parametrize("revision", [None, "v2", "c" * 40])
def test_without_a_local_copy_the_answer_comes_at_once(
    call: Callable[[ModelSpec], object], revision: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, tmp_path / "cache", endpoint=None)
    with pytest.raises(
        ModelUnavailable, match=rf"there is no local copy of {REPOSITORY}@{revision or 'main'}(.|\n)*hf download"
    ):
        call(spec(revision=revision))


# --- online ---


def test_what_was_named_is_what_runs_although_the_branch_moves_in_between(hub: Hub, folders: dict[str, Path]) -> None:
    named = spec()
    assert named.describe() == f"hub:{REPOSITORY}@{A}"
    hub.branches["main"] = B
    hub.asked.clear()
    loaded = load(named)
    assert same_weights(loaded, folders[A])
    assert loaded.max_tokens == 100
    assert hub.asked  # config, tokenizer and weights, all of the one commit
    assert [path for path in hub.asked if A not in path] == []
    assert spec().describe() == f"hub:{REPOSITORY}@{B}"


@pytest.mark.usefixtures("hub")
def test_what_was_loaded_once_is_loaded_again_without_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    online = answer(load(spec()))
    use(monkeypatch, tmp_path / "cache", endpoint=None)
    assert spec().describe() == f"hub:{REPOSITORY}@{A}"
    assert answer(load(spec())) == online


@every_way
def test_a_hub_that_is_gone_is_asked_once_and_the_copy_is_taken(
    call: Callable[[ModelSpec], object], hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the 25 s that the client waits and asks again, nothing is left; not even for files that this model has not."""
    load(spec())
    hub.shutdown()
    hub.server_close()
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    gone = spec()
    call(gone)
    assert gone.describe() == f"hub:{REPOSITORY}@{A}"
    assert slept == []
    assert capsys.readouterr().out.count(f"the local copy of {REPOSITORY} is taken") == 1


@pytest.mark.usefixtures("offline")
def test_a_hub_that_says_nothing_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mikv.models.sources.HUB_TIMEOUT_S", 0.1)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        use(monkeypatch, tmp_path / "cache", f"http://127.0.0.1:{silent.getsockname()[1]}")
        begun = time.monotonic()
        assert spec().describe() == f"hub:{REPOSITORY}@{A}"
        assert time.monotonic() - begun < 5  # without a timeout: for ever


@every_way
def test_a_hub_that_is_gone_and_no_copy_is_said_at_once(
    call: Callable[[ModelSpec], object], hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.shutdown()
    hub.server_close()
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    with pytest.raises(ModelUnavailable, match=rf"reached \(.*refused.*\), and there is no local copy of {REPOSITORY}@main"):
        call(spec())
    assert slept == []


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"hub": "org/none"}, "Repository Not Found"),
        ({"revision": "v7"}, "Revision Not Found"),
        ({"hub": "no name"}, "Repo id must use"),
    ],
)
@pytest.mark.usefixtures("hub")
def test_what_the_hub_does_not_have_is_said_with_the_ways(options: dict[str, str], why: str) -> None:
    with pytest.raises(
        ModelUnavailable, match=rf"can't be had here: (?!the hub can't be reached).*{why}(.|\n)*Ways to get them"
    ):
        ModelSpec("m", **{"hub": REPOSITORY, **options}).describe()


@pytest.mark.parametrize(
    ("rename", "why"),
    [
        ({"model.safetensors": "pytorch_model.bin"}, "its weights are pickles"),
        ({"tokenizer.json": "other"}, "there is no tokenizer"),
        ({"config.json": "other"}, "config.json"),
    ],
)
@every_way
def test_a_repository_without_a_whole_model_is_refused_before_it_is_downloaded(
    rename: dict[str, str], why: str, call: Callable[[ModelSpec], object], hub: Hub
) -> None:
    for name, other in rename.items():
        (hub.commits[A] / name).rename(hub.commits[A] / other)
    with pytest.raises(ModelUnavailable, match=why):
        call(spec())
    assert not any(path.endswith(("safetensors", ".bin")) for path in hub.asked)


def test_weights_of_the_hub_that_are_not_whole_are_refused(hub: Hub) -> None:
    config = hub.commits[A] / "config.json"
    config.write_text(config.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    with pytest.raises(
        ModelUnavailable, match=rf"the weights of m \({REPOSITORY}\).*: 9 of the model's 30 tensors are missing"
    ):
        load(spec())
