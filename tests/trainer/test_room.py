"""A run looks at its disk before it begins and before each save; what only shows it cannot stop it."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.sections import CheckpointConfig
from tests.small import BRIEF, DIFFUSION, ODE, SHORT, merged, trainer
from trainer.room import Room, bytes_of, save_bytes
from trainer.state import save_run
from utils.checkpoint import list_checkpoints
from utils.errors import UserError
from utils.logging import console, read_jsonl
from utils.space import free_space, size_text

MB = 10**6
MUON = {"generator_training": {"optimizer": {"kind": "muon"}}}


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    said: list[str] = []
    monkeypatch.setattr(console, "warning", lambda text, *args: said.append(text % args))
    return said


def test_the_size_of_a_save_is_known_before_the_first_update(tmp_path: Path) -> None:
    """Of a student by Muon, and a critic by AdamW."""
    run = trainer(tmp_path, merged(BRIEF, MUON), max_steps=1)
    before = save_bytes(run.trained)
    run.train()
    after = bytes_of(save_run(run.trained)[0])
    assert before == after == save_bytes(run.trained)
    (stored,) = list_checkpoints(tmp_path / "checkpoints")
    on_disk = sum(file.stat().st_size for file in stored.glob("*.safetensors"))
    assert after < on_disk < 1.1 * after  # names are all else


def room(folder: Path, free: int, hours: float = 0.0, cadence: CheckpointConfig | None = None) -> Room:
    """At step 300 of 1000 after so many hours."""
    now = [0.0, 3600 * hours]
    cadence = cadence or CheckpointConfig(every=100, keep_last=2)
    return Room(folder, cadence, 0, 1000, free=lambda folder: free, clock=lambda: now.pop(0))


def test_before_a_run_it_is_said_how_many_saves_fit(tmp_path: Path) -> None:
    assert room(tmp_path, 6 * MB).before_run(2 * MB) is None  # two are kept while the third is written
    assert room(tmp_path, 6 * MB - 1).before_run(2 * MB) == (
        f"{tmp_path}: 6.0 MB free, room for 2 more saves of 2.0 MB (of 10 to come): free some space there, or keep "
        "fewer (checkpoint.keep_last, checkpoint.keep_every)"
    )
    said = room(tmp_path, MB).before_run(2 * MB)
    assert said is not None and said.startswith(f"{tmp_path}: 1.0 MB free, a save of 2.0 MB does not fit: free")


def test_before_a_save_hours_left_are_counted_at_the_pace_so_far(tmp_path: Path) -> None:
    for step in (100, 200):
        folder = tmp_path / "checkpoints" / f"step_{step:08d}"
        folder.mkdir(parents=True)
        (folder / "state.json").write_text("{}")
    kept = CheckpointConfig(every=100, keep_last=2, keep_every=100)  # none is ever deleted
    said = room(tmp_path, 7 * MB, 6.0, kept).before_save(300, 2 * MB)
    assert said is not None
    assert "7.0 MB free, room for 3 more saves of 2.0 MB (of 8 to come): it lasts 6.0 hours: free" in said
    assert room(tmp_path, 7 * MB, 30.0, kept).before_save(300, 2 * MB) is None  # more than a day
    assert room(tmp_path, 2 * MB, 6.0).before_save(300, 2 * MB) is None  # each makes room for the next
    assert room(tmp_path, 2 * MB - 1, 6.0).before_save(300, 2 * MB) is not None


def test_logs_that_grow_count_too(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    looking = room(tmp_path, 10 * MB, 3.0, CheckpointConfig(every=100, keep_last=1))
    (tmp_path / "validation").mkdir()
    (tmp_path / "validation" / "x.mp4").write_bytes(b"1" * (3 * MB))
    (tmp_path / "metrics.jsonl").write_bytes(b"1" * (3 * MB))  # 2 MB from save to save
    said = looking.before_save(300, 2 * MB)
    assert said is not None and "room for 4 more saves of 2.0 MB (of 8 to come): it lasts 4.0 hours" in said


def test_a_run_warns_once_and_saves_once_it_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: list[str]
) -> None:
    monkeypatch.setattr("trainer.room.free_space", lambda folder: 0)
    trainer(tmp_path, merged(DIFFUSION, SHORT), max_steps=2, checkpoint={"every": 1, "keep_last": 1}).train()
    short = [text for text in warnings if "does not fit" in text]
    assert len(short) == 3  # before the run, and before each of two saves
    assert free_space(tmp_path) > 0 and list_checkpoints(tmp_path / "checkpoints")


@pytest.mark.parametrize("blocked", ["validation", "metrics.jsonl", "config.yaml"])
def test_what_only_shows_a_run_does_not_stop_it(tmp_path: Path, warnings: list[str], blocked: str) -> None:
    """A folder where a file should be, or a file where a folder should be."""
    if blocked == "validation":
        (tmp_path / blocked).write_text("kept")
    else:
        (tmp_path / blocked).mkdir()
        (tmp_path / blocked / "kept").write_text("kept")
    run = trainer(
        tmp_path, merged(DIFFUSION, SHORT), max_steps=2, validation={"every": 1, "steps": 1, "weights": "raw"}
    )
    assert run.train() == 0
    assert list_checkpoints(tmp_path / "checkpoints")
    first, *rest = warnings
    assert {
        "validation": f"videos cannot be written ({tmp_path / blocked} is a file and no folder): the run goes on",
        "metrics.jsonl": "metrics.jsonl cannot be written (Is a directory): the run goes on",
        "config.yaml": "config.yaml could not be written: it is a folder: give another place: the run goes on",
    }[blocked] in first
    assert len(rest) == (0 if blocked == "config.yaml" else 1)
    if blocked == "validation":
        assert "2 videos were lost" in rest[0]
        assert (tmp_path / blocked).read_text() == "kept"
        logged = read_jsonl(tmp_path / "metrics.jsonl")
        assert sum("validation/raw_luma" in entry for entry in logged) == 2
        assert not any("video" in entry for entry in logged)


def test_trajectories_that_cannot_be_kept_end_the_run_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(
        UserError, match=r"ode_pairs_\w+.safetensors could not be written: .*file is a file and no folder"
    ):
        trainer(tmp_path / "file" / "run", merged(ODE, SHORT))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_trajectories_that_do_not_fit_are_told_before_they_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: list[str]
) -> None:
    run = trainer(tmp_path, merged(ODE, SHORT))
    assert warnings == []
    (kept,) = tmp_path.glob("ode_pairs_*.safetensors")
    needed = run.trajectories.numel() * 4  # type: ignore[attr-defined]
    assert needed < kept.stat().st_size < needed + 500
    for free in (needed, needed - 1):
        kept.unlink()
        monkeypatch.setattr("trainer.ode.free_space", lambda folder, free=free: free)
        trainer(tmp_path, merged(ODE, SHORT))
    [said] = warnings
    assert f"trajectories of {size_text(needed)} do not fit: free some space there, or make fewer (ode.pairs)" in said
