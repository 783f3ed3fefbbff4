"""A token given as an option gets nowhere: the program ends before it writes anything, and doesn't repeat it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from mikv.config import compose
from mikv.credentials import names_secret, refuse_secret_arguments, refuse_secret_options

# Made up; of the shapes of real ones.
HF = "hf_" + "QwErTyUiOpAsDfGhJkLzXcVbNm12345678"[:34]
WANDB = "0123456789abcdef0123456789abcdef01234567"
WANDB_NEW = "wandb_v1_" + "AbCdEf0123456789_AbCdEf0123456789"
PLAIN = "correct-horse-battery"
SECRETS = (HF, WANDB, WANDB_NEW, PLAIN)
# All ways to write one on the command line of run.py.
WRITTEN = [
    f"+tracker.api_key={PLAIN}",
    f"+model.token={PLAIN}",
    f"++model.hub_token={PLAIN}",
    f"model.path={HF}",
    f"model.hub=https://user:{PLAIN}@example.org/model",
    f"name={WANDB}",
    f"name='{WANDB}'",
    f"name={WANDB_NEW}",
    f"name=a/{HF}/b",
    f"+foo={HF}",
    f"{HF}",
    f"{HF}=1",
    f"~{HF}",
    f"+foo=[{HF}",
    f"seed={HF}",
    f"policy={HF}",
    f"out=/tmp/{HF}",
    "name=${oc.env:MY_TOKEN}",
    "name=${oc.env:'MY_TOKEN',null}",
    f"name={PLAIN}-of-the-environment",
    f"launcher=slurm launcher.setup=['export_HF_TOKEN={PLAIN}']",
    f"launcher=slurm +launcher.sbatch.export=ALL,HF_TOKEN={PLAIN}",
    f"task.gen_kwargs={{max_gen_toks:1,token:{PLAIN}}}",
    f"hydra.job.env_set.WANDB_API_KEY={PLAIN}",
    f"hydra.job.env_set={{WANDB_API_KEY:{PLAIN}}}",
    f"--config-dir={HF}",
    f"--token={PLAIN}",
    f"--cfg job +model.token={PLAIN}",
]
RIGHT = [
    *("task.max_new_tokens=8", "policy.low.key_bits=3", f"model.revision={WANDB}", "model.max_tokens=100", "task=key_value"),
    *("task.parts.ruler.niah_multikey=[wrong]", "task.system='The password: open sesame, secret: none'", "tracker.entity=me"),
    *("launcher.setup=['module load cuda/12.4','export HF_HOME=/scratch/hf']", "+launcher.sbatch.mail-type=END"),
    *("panel.entries=[{policy: mikv, low.key_bits: 4}]", f"model.path=/hub/snapshots/{WANDB}", "name=hf_first_try"),
    *("name=sk-short", "~task.parts.token", "out=${oc.env:HOME}/runs", "model.path=https://example.org:80/a@b"),
]


@pytest.mark.parametrize("line", WRITTEN)
@pytest.mark.parametrize("sweep", [False, True], ids=["run", "sweep"])
def test_a_secret_on_the_command_line_is_refused_and_not_repeated(
    line: str, sweep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_TOKEN", f"{PLAIN}-of-the-environment")
    arguments = [*(["-m", "seed=0,1"] if sweep else []), *line.split(" ")]
    with pytest.raises(ValueError, match="Secrets are no options") as caught:
        refuse_secret_arguments(arguments)
    assert not [secret for secret in SECRETS if secret in str(caught.value)]


def test_what_only_looks_like_one_passes() -> None:
    for argument in RIGHT:
        refuse_secret_arguments([argument])


def test_the_option_is_named() -> None:
    with pytest.raises(ValueError, match=r"^tracker\.api_key holds or names a secret"):
        refuse_secret_arguments(["batch_size=4", f"+tracker.api_key={PLAIN}"])


def test_what_comes_from_files_is_looked_at_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", f"{PLAIN}-of-the-environment")
    options = {"model": {"name": "tiny", "token": None}, "list": [{"a": 1}, "b"], "revision": WANDB}
    refuse_secret_options(options)
    for more in (
        {"token": PLAIN},
        {"list": [{"password": PLAIN}]},
        {"name": WANDB},
        {"setup": [f"export WANDB_API_KEY={PLAIN}"]},
        {"url": f"https://u:{HF}@example.org"},
        {"name": f"{PLAIN}-of-the-environment"},
    ):
        with pytest.raises(ValueError, match="Secrets are no options") as caught:
            refuse_secret_options({**options, "more": more})
        assert not [secret for secret in SECRETS if secret in str(caught.value)]


def test_a_script_is_refused_as_a_command_line_is() -> None:
    with pytest.raises(ValueError, match="Secrets are no options"):
        compose("model=tiny-random", f"+model.token={PLAIN}")


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        *(
            (name, True)
            for name in ("token", "HF_TOKEN", "api_key", "WANDB_API_KEY", "apikey", "my-key", "db-password", "hubToken")
        ),
        *(
            (name, False)
            for name in ("max_new_tokens", "key_bits", "low.key", "niah_multikey", "monkey", "keys", "tokenizer", "name")
        ),
    ],
)
def test_names(name: str, secret: bool) -> None:
    assert names_secret(name) == secret


CONFIGURED = "# @package _global_\nname: {}\nmodel:\n  adapter: {}\n"


@pytest.mark.parametrize(
    "line",
    [
        *(
            f"+tracker.api_key={PLAIN}",
            f"+foo=[{HF}",
            f"-m name={HF},b",
            f"-m seed=0,1 launcher=local +launcher.api_key={PLAIN}",
        ),
        *(f"--cfg job name={HF}", f"--info all name={HF}", f"--config-dir={HF}", f"hydra.sweep.dir=/tmp/{HF} -m seed=0,1"),
        *("--config-dir=FOLDER experiment=private", "--config-dir=FOLDER -m experiment=private seed=0,1"),
        *("--config-dir=FOLDER experiment=by_environment", "--config-dir=FOLDER -m experiment=by_environment seed=0,1"),
        "--config-dir=FOLDER -m experiment=private,by_environment",
        "--config-dir=FOLDER -m launcher=local experiment=private,by_environment",
    ],
)
def test_of_the_whole_program_nothing_holds_it(line: str, tmp_path: Path) -> None:
    """Standard output, errors, and every file."""
    out, private = tmp_path / "out", tmp_path / "private"
    (private / "experiment").mkdir(parents=True)
    (private / "experiment" / "private.yaml").write_text(CONFIGURED.format("null", HF))
    (private / "experiment" / "by_environment.yaml").write_text(CONFIGURED.format("null", "${oc.env:MY_TOKEN}"))
    arguments = line.replace("FOLDER", str(private)).split(" ")
    command = [sys.executable, "run.py", *arguments, "model=tiny-random", "task.limit=1", "task.max_new_tokens=1", f"out={out}"]
    environment = {**os.environ, "MY_TOKEN": f"{PLAIN}-of-the-environment"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert "Secrets are no options" in done.stderr or "Secrets are no options" in "".join(
        file.read_text(errors="replace") for file in out.rglob("*.log")
    )
    written = [file.read_text(errors="replace") for file in out.rglob("*") if file.is_file()]
    for secret in SECRETS:
        assert secret not in done.stdout
        assert secret not in done.stderr
        assert not [text for text in written if secret in text]
