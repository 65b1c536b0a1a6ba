"""`export.py --push` against a stand-in of the Hub: what arrives is what was exported, and what cannot be sent is told."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, constants

from generation import export
from tests import ROOT
from tests.generation.test_export import BIDIRECTIONAL, make_run
from tests.hub import TOKEN, Hub, Repo
from tests.small import DISTILLATION, config
from utils.errors import UserError

BASE = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
REPO = "owner/name"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = config(DISTILLATION, **BIDIRECTIONAL, student={"init": BASE})
    return make_run(tmp_path_factory.mktemp("run"), settings)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """As HF_ENDPOINT and HF_TOKEN name it; large files by plain HTTP."""
    server = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    yield server
    server.shutdown()
    server.server_close()


def command(monkeypatch: pytest.MonkeyPatch, *options: str) -> int:
    monkeypatch.setattr(sys, "argv", ["export.py", *options])
    return export.main()


def options(run: Path, out: Path, *more: str) -> list[str]:
    return ["--run", str(run), "--format", "native", "--out", str(out), "--shard_gb", "0.0001", "--push", REPO, *more]


def contents(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_what_arrives_is_what_was_exported(
    run: Path, tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, *options(run, tmp_path / "out")) == 0
    repo, files = hub.repos[REPO], contents(tmp_path / "out")
    assert repo.private and repo.files == {".gitattributes": b"", **files}
    assert len(files) > 4 and "config.json" in files
    page = files["README.md"].decode()
    assert page.startswith(f"---\nlicense: apache-2.0\nbase_model:\n- {BASE}\n")
    said = capsys.readouterr()
    assert f"-> {hub.address}/{REPO}" in said.out and TOKEN not in said.out + said.err


def test_an_interrupted_upload_goes_on_as_it_says(
    run: Path, tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hub.refuse_put = 2
    with pytest.raises(UserError, match="is whole; go on with: python export.py --out") as problem:
        command(monkeypatch, *options(run, tmp_path / "out", "--public", "--licence", "mit"))
    assert "\n" not in str(problem.value) and TOKEN not in str(problem.value)
    before = contents(tmp_path / "out")
    went = shlex.split(str(problem.value).split("go on with: ")[1])
    assert went[:2] == ["python", "export.py"] and hub.repos[REPO].files == {".gitattributes": b""}
    assert command(monkeypatch, *went[2:]) == 0
    assert not hub.repos[REPO].private and hub.repos[REPO].files == {".gitattributes": b"", **before}
    assert hub.puts == len(hub.stored) + 1  # all but the refused one were sent once
    assert b"license: mit\n" in before["README.md"] and contents(tmp_path / "out") == before

    def stop(*args: object, **more: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(HfApi, "upload_folder", stop)
    with pytest.raises(KeyboardInterrupt):
        command(monkeypatch, *went[2:])
    assert "interrupted: " in caplog.text and "go on with: python export.py" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"offline": True}, "HF_HUB_OFFLINE is set: unset it"),
        ({"token": None}, "no token of the Hub: run `hf auth login`"),
        ({"token": "hf_Wrong"}, "nothing was exported"),
    ],
)
def test_what_cannot_be_sent_is_refused_before_anything_is_written(
    run: Path, tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    if "offline" in changes:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    elif changes["token"] is None:
        monkeypatch.delenv("HF_TOKEN")
    else:
        monkeypatch.setenv("HF_TOKEN", changes["token"])
    with pytest.raises(UserError, match=message) as problem:
        command(monkeypatch, *options(run, tmp_path / "out"))
    assert "\n" not in str(problem.value) and "hf_Wrong" not in str(problem.value)
    assert not (tmp_path / "out").exists() and hub.repos == {}


def test_an_unknown_licence_is_refused_and_can_be_given(
    tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run", config(DISTILLATION, **BIDIRECTIONAL))
    with pytest.raises(UserError, match=r"the licence is unknown \(No base model.*\): give --licence NAME"):
        command(monkeypatch, *options(run, tmp_path / "out"))
    assert not (tmp_path / "out").exists() and hub.repos == {}
    assert command(monkeypatch, *options(run, tmp_path / "out", "--licence", "cc-by-4.0")) == 0
    assert b"license: cc-by-4.0\n" in hub.repos[REPO].files["README.md"]
    page = tmp_path / "out" / "README.md"
    page.write_text(page.read_text().replace("license: cc-by-4.0\n", ""))
    with pytest.raises(UserError, match="has no line `license:`"):
        command(monkeypatch, "--out", str(tmp_path / "out"), "--push", REPO)


def test_a_repository_of_others_is_left_alone(
    run: Path, tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repos[REPO] = Repo(private=False)
    with pytest.raises(UserError, match="it is public already: give --public"):
        command(monkeypatch, *options(run, tmp_path / "out"))
    assert (tmp_path / "out" / "config.json").is_file() and hub.puts == 0
    hub.repos[REPO] = Repo(private=True, files={"model-00001-of-00009.safetensors": b"other"})
    with pytest.raises(UserError, match="holds 1 files that this export does not have, first model-00001-of-00009"):
        command(monkeypatch, "--out", str(tmp_path / "out"), "--push", REPO)
    assert hub.puts == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--push", "name"], "--push name: give a repository of the Hub as owner/name"),
        (["--licence", "a\nb: c"], "give one name"),
        (["--public"], "--public is for --push"),
        ([], "--run is missing"),
        (["--push", REPO, "--base", BASE], "--base is for an export of --run"),
        (["--run", "x"], "--format is missing"),
        (["--push", REPO], "no export lies there"),
    ],
)
def test_options_that_go_with_others(
    tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, given: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        command(monkeypatch, "--out", str(tmp_path / "out"), *given)


def test_the_program_pushes_where_the_environment_points(run: Path, tmp_path: Path, hub: Hub) -> None:
    environment = {**os.environ, "HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        [sys.executable, "export.py", *options(run, tmp_path / "out")], cwd=ROOT, env=environment,
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    assert hub.repos[REPO].files == {".gitattributes": b"", **contents(tmp_path / "out")}
