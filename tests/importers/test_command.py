"""`python import_recipe.py`: a YAML that loads, a table, or one message and no YAML."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import import_recipe
from configs.load import load_run
from tests import forked
from tests.importers.cases import RECIPES
from tests.utils.test_writing import files_of_at_most, names
from utils.errors import ConfigError, UserError

FILE = RECIPES / "self_forcing.yaml"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["import_recipe.py", "self_forcing", *map(str, arguments)])
    return import_recipe.main()


def test_the_yaml_loads_and_no_file_is_written_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "ours.yaml"
    assert run(monkeypatch, FILE, "--out", out) == 0
    text = out.read_text()
    assert "#   sharding_strategy: 'hybrid_full' (speed or memory alone)\n" in text
    assert "# To fill in:\n" in text
    assert load_run(out).objective.real_guidance_scale == 4.0
    with pytest.raises(ConfigError, match="is there already"):
        run(monkeypatch, FILE, "--out", out)
    assert out.read_text() == text


def test_what_is_refused_is_one_message_and_no_yaml(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    more, out = tmp_path / "more.yaml", tmp_path / "ours.yaml"
    more.write_text("brand_new: 7\ntrainer: gan\n")
    assert run(monkeypatch, FILE, more, "--out", out) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 3
    assert "2 things are not understood, and no recipe was made (--allow KEY leaves an option out):" in said.err
    assert "\n  brand_new: 7: it is not known here\n" in said.err
    assert not out.exists()
    more.write_text("brand_new: 7\n")
    assert run(monkeypatch, FILE, more, "--out", out, "--allow", "brand_new") == 0
    assert "brand_new: 7" in out.read_text()


def test_what_train_py_would_refuse_makes_no_yaml(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The importers know no schema; the command checks what they make."""
    (tmp_path / "more.yaml").write_text("ema_weight: 1.5\n")
    assert run(monkeypatch, FILE, tmp_path / "more.yaml") == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "train.py would refuse it: ema.decay must be in" in said.err


def test_check_prints_the_table_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "more.yaml").write_text("brand_new: 7\n")
    assert run(monkeypatch, FILE, "--check") == 0
    rows = capsys.readouterr().out.splitlines()
    assert rows[0].split() == ["theirs", "ours", "how", "it", "differs"]
    (guidance,) = [row for row in rows if row.startswith("real_guidance_scale: 3.0 ")]
    assert "objective.real_guidance_scale: 4.0" in guidance and guidance.endswith("added to the conditional")
    assert run(monkeypatch, FILE, tmp_path / "more.yaml", "--check") == 2
    said = capsys.readouterr()
    assert any(row.startswith("brand_new: 7 ") and "refused: it is not known" in row for row in said.out.splitlines())
    assert "brand_new: 7: it is not known here" in said.err


def test_a_disk_that_takes_no_recipe_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "ours.yaml"
    with (
        files_of_at_most(100),
        pytest.raises(UserError, match=r"--out .*ours.yaml could not be written: File too large"),
    ):
        run(monkeypatch, FILE, "--out", out)
    assert names(tmp_path) == []
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file is a file and no folder: give another place"):
        run(monkeypatch, FILE, "--out", tmp_path / "file" / "ours.yaml")


@pytest.mark.parametrize(
    ("old", "arguments", "new"),
    [
        ("trainer.evaluate", ("--help",), "evaluate.py"),
        ("trainer.export", ("--help",), "export.py"),
        ("utils.data.preprocess", ("text", "--help"), "preprocess.py"),
        ("utils.config", ("import", "--help"), "import_recipe.py"),
    ],
)
def test_commands_of_version_0_1_name_the_new_one_and_run_it(old: str, arguments: tuple[str, ...], new: str) -> None:
    done = forked.run(1, old, *arguments)
    assert done.returncode == 0
    assert done.stdout.startswith(f"usage: {new}")
    assert f"is now: python {new}" in done.stderr
