"""The mirror: what W&B is told is what the records hold, and whatever happens to it, the run is done."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from written_run import divergences, read_summary, samples, summary, write_run

from mikv import tracking
from mikv.config import ConfigError
from mikv.config import tracker as configured
from mikv.records import read_rows
from mikv.tracking import Tracker, has_key, without_secret_options

KEY = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def nobodys_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No key of whoever runs the tests, and no network: W&B's address leads nowhere."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")


def wandb_records(folder: Path) -> Iterator[Any]:
    """Records of the one offline run in a folder: LevelDB's log format (blocks of 32 KiB; crc, length, kind), of protobufs."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    data, place, parts = file.read_bytes(), 7, b""
    while place + 7 <= len(data):
        left = 2**15 - place % 2**15
        if left < 7:
            place += left
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, last
            record = Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def items(entries: Any) -> dict[str, Any]:
    return {entry.key or "/".join(entry.nested_key): json.loads(entry.value_json) for entry in entries}


def table(folder: Path, name: str) -> list[dict[str, Any]]:
    (file,) = folder.glob(f"wandb/offline-run-*/files/media/table/{name}_*.table.json")
    found = json.loads(file.read_text(encoding="utf-8"))
    return [dict(zip(found["columns"], row, strict=True)) for row in found["data"]]


def everything(folder: Path) -> bytes:
    return b"".join(file.read_bytes() for file in (folder / "wandb").rglob("*") if file.is_file())


def test_an_offline_run_holds_what_the_records_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "digits")
    assert Tracker("offline").mirror(folder, "sweep-7")
    assert "wandb sync" in capsys.readouterr().out
    records = list(wandb_records(folder))

    (run,) = [record.run for record in records if record.WhichOneof("record_type") == "run"][:1]
    assert (run.project, run.run_group, run.display_name, list(run.tags)) == ("mikv", "sweep-7", "digits", ["tiny", "digits"])
    config = items(run.config.update)
    assert config["seed"] == 0
    assert config["about"]["identity"]["model"]["name"] == "tiny"

    summary = read_summary(folder)
    lines = [items(record.history.item) for record in records if record.WhichOneof("record_type") == "history"]
    sizes = [line["size_percent"] for line in lines if "size_percent" in line]
    assert sizes == sorted(row["size_percent"] for row in summary)  # the axis of W&B's own charts
    curve: dict[str, list[tuple[float, float]]] = {}
    for line in lines:
        for name in [name for name in line if name.startswith("accuracy/")]:
            curve.setdefault(name, []).append((line["size_percent"], line[name]))
    assert curve == {f"accuracy/{row['policy']}": [(row["size_percent"], row["value"])] for row in summary}
    drawn = [(row["step"], row["lineKey"], row["lineVal"]) for row in table(folder, "curve/accuracy")]
    assert drawn == [(row["size_percent"], row["policy"], row["value"]) for row in summary]
    steps = [record.metric for record in records if record.WhichOneof("record_type") == "metric"]
    assert ("accuracy/*", "size_percent") in [(metric.glob_name, metric.step_metric) for metric in steps]

    points = table(folder, "points")
    for point, row in zip(points, summary, strict=True):
        assert (point["label"], point["accuracy.value"], point["size_percent"]) == (
            row["label"],
            row["value"],
            row["size_percent"],
        )
        assert [point["accuracy.ci95_low"], point["accuracy.ci95_high"]] == pytest.approx(row["ci95"])
        assert [point["accuracy.mcnemar_p"], point["accuracy.lost"]] == [row["mcnemar_p"], row["lost"]]
        assert {part: point[f"nbytes.{part}"] for part in row["nbytes"]} == row["nbytes"]
        assert point["invented.value"] == row["rates"]["invented"]["value"]
    stored = list(read_rows(folder / "samples.jsonl"))
    shown = table(folder, "samples")
    for name in ("label", "sample", "answer", "target", "score", "correct", "invented", "kl"):
        assert [row[name] for row in shown] == [row[name] for row in stored]
    assert [row["seconds.decode"] for row in shown] == [row["seconds"]["decode"] for row in stored]

    last: dict[str, Any] = {}
    for record in records:
        if record.WhichOneof("record_type") == "summary":
            last |= items(record.summary.update)
    assert last["seconds"] == summary[0]["seconds"]
    assert last["policies"]["h2o 20%"]["accuracy.value"] == summary[1]["value"]


def test_a_divergence_is_told_without_a_change() -> None:
    full, h2o, _ = (dict(tracking.point_row(row)) for row in summary(divergences()))
    assert (full["kl.value"], full["kl.ci95_low"], full["kl.ci95_high"]) == (0.0, None, None)
    assert h2o["kl.ci95_low"] < h2o["kl.value"] < h2o["kl.ci95_high"]
    assert not [name for name in (*full, *h2o) if name.startswith(("kl.difference", "kl.mcnemar", "kl.lost"))]


def test_a_run_is_mirrored_once_and_again_when_it_has_grown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "digits")
    for _ in range(2):
        assert Tracker("offline").mirror(folder)
    assert "mirrored already" in capsys.readouterr().out
    assert len(list(folder.glob("wandb/offline-run-*"))) == 1
    write_run(folder, samples({("full", "full"): "0123", ("mikv", "mikv 20% 8/3"): "0199"}))
    assert Tracker("offline").mirror(folder)
    assert len(list(folder.glob("wandb/offline-run-*"))) == 2


def test_no_key_no_machine_no_path_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("HF_TOKEN", "hf_not-a-real-token")
    folder = write_run(tmp_path / "digits")
    config = "model: {hub_token: abc123, name: tiny}\nurl: https://u:hf_not-a-real-token@example.org\nmax_new_tokens: 7\n"
    (folder / "config.yaml").write_text(config)
    assert Tracker("offline").mirror(folder)
    written = everything(folder)
    for secret in (KEY, "hf_not-a-real-token", "abc123"):
        assert secret.encode() not in written
    sent = b"".join(record.SerializeToString() for record in wandb_records(folder))
    for private in (str(tmp_path), sys.executable):
        assert private.encode() not in sent
    (run,) = [record.run for record in wandb_records(folder) if record.WhichOneof("record_type") == "run"][:1]
    assert run.host == ""
    assert items(run.config.update)["max_new_tokens"] == 7


def test_options_named_like_secrets() -> None:
    given = {
        "api_key": "a",
        "hub": {"token": "b", "key_bits": 4, "max_new_tokens": 9},
        "list": [{"password": "c"}],
        "token": None,
    }
    wanted = {"api_key": "***", "hub": {"token": "***", "key_bits": 4, "max_new_tokens": 9}, "list": [{"password": "***"}]}
    assert without_secret_options(given) == wanted | {"token": None}


def test_a_server_that_is_not_there_leaves_an_offline_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    folder = write_run(tmp_path / "digits")
    assert Tracker("online", timeout_s=12).mirror(folder)
    said = capsys.readouterr().out
    assert "note: W&B is not reached" in said
    assert "offline; send it with: wandb sync" in said
    assert KEY not in said
    assert len(list(wandb_records(folder))) > 10


def test_without_a_key_auto_is_offline_and_asks_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert not has_key()
    assert Tracker("auto")._resolved() == "offline"
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login user password x\n")
    (tmp_path / "netrc").chmod(0o600)
    assert has_key()
    assert Tracker("auto")._resolved() == "online"
    for mode, wanted in (("disabled", "none"), ("offline", "offline"), ("dryrun", "offline"), ("online", "online")):
        monkeypatch.setenv("WANDB_MODE", mode)
        assert Tracker("auto")._resolved() == wanted
        assert Tracker("offline")._resolved() == "offline"  # what was asked for


def test_online_without_a_key_does_not_ask(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "digits")
    assert Tracker("online", timeout_s=30).mirror(folder)
    assert "note: W&B is not reached" in capsys.readouterr().out


@pytest.mark.parametrize(
    "breaks", ["raise RuntimeError('out of order')", "import os; os._exit(3)", "import time; time.sleep(60)"]
)
def test_a_tracker_that_fails_or_hangs_is_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], breaks: str
) -> None:
    """With another wandb in its place: one that raises, that ends the process, that never returns."""
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "wandb.py").write_text(breaks)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "broken"))
    folder = write_run(tmp_path / "digits")
    before = (folder / "summary.jsonl").read_bytes()
    started = time.monotonic()
    assert not Tracker("offline", timeout_s=5).mirror(folder)
    assert time.monotonic() - started < 30
    assert "note: W&B did not take the run" in capsys.readouterr().out
    assert (folder / "summary.jsonl").read_bytes() == before


def test_a_folder_that_can_not_be_read_is_a_note(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert not Tracker("offline").mirror(tmp_path / "nothing")
    assert "note: W&B did not take the run (" in capsys.readouterr().out


def test_modes_of_the_configuration_and_what_is_refused() -> None:
    import hydra

    from mikv.config import CONF, build

    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        for name, mode in (("none", "none"), ("wandb", "online"), ("wandb_offline", "offline"), ("auto", "auto")):
            config = hydra.compose("config", [f"tracker={name}"])
            assert configured(config).mode == mode
            assert "tracker" not in build(config).config  # the record does not depend on who looks on
        assert configured(hydra.compose("config")).mode == "none"
        with pytest.raises(ConfigError, match="one of none, auto, online, offline"):
            configured(hydra.compose("config", ["tracker=auto", "tracker.mode=on"]))
        with pytest.raises(ConfigError, match="at least 1"):
            configured(hydra.compose("config", ["tracker=auto", "tracker.timeout_s=0"]))


def test_a_run_of_a_sweep_is_mirrored_and_succeeds_whatever_the_tracker_does(tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "wandb.py").write_text("raise RuntimeError('out of order')")
    tiny = ["model=tiny-random", "task.lines=2", "task.limit=2", "task.max_new_tokens=4", f"out={tmp_path / 'runs'}"]

    def run(*arguments: str, **environment: str) -> str:
        command = [sys.executable, str(ROOT / "run.py"), *arguments, *tiny]
        return subprocess.run(
            command, env=os.environ | environment, cwd=ROOT, capture_output=True, text=True, check=True, timeout=300
        ).stdout

    assert "note: W&B did not take the run" in run("tracker=wandb_offline", "name=a", PYTHONPATH=str(tmp_path / "broken"))
    run("-m", "tracker=wandb_offline", "seed=0,1", "name=swept-${seed}")
    groups = []
    for folder in (tmp_path / "runs" / "swept-0", tmp_path / "runs" / "swept-1"):
        (started,) = [record.run for record in wandb_records(folder) if record.WhichOneof("record_type") == "run"][:1]
        groups.append(started.run_group)
    assert groups[0] == groups[1] != ""


def test_nothing_imports_wandb_before_it_is_needed() -> None:
    code = "import sys, mikv.tracking, mikv.config; sys.exit('wandb' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(ROOT)}).returncode == 0
    assert not hasattr(tracking, "wandb")
