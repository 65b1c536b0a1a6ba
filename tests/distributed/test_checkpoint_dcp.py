"""Sharded checkpoints: any mesh reads what any other saved, bit for bit, and no rank's trouble costs a checkpoint."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests import forked
from tests.distributed.checkpoint_worker import Everything, Run, assert_equal
from utils import checkpoint

pytestmark = pytest.mark.slow


def launch(ranks: int, scene: str, folder: Path) -> forked.Done:
    return forked.run(ranks, "tests.distributed.checkpoint_worker", scene, str(folder))


def everything(path: Path) -> Everything:
    return {name: checkpoint.load_tensors(path, name) for name in checkpoint.tensor_names(path)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("meshes")
    done = launch(4, "four", folder)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def test_shards_put_together_are_the_whole_and_each_is_written_once(folder: Path) -> None:
    whole = everything(folder / "whole/step_00000003")
    assert {"student", "student_ema", "student_adamw", "critic", "critic_adamw", "critic_sgd"} == whole.keys()
    assert whole["student_adamw"]["0.weight/step"].item() == 3
    assert whole["critic"]["table"].tolist() == [0, 1, 2]
    for saved in ("four", "hsdp"):
        path = folder / saved / "step_00000003"
        assert_equal(everything(path), whole)
        written = sum(value.numel() for file in path.glob("*.safetensors") for value in load_file(file).values())
        assert written == sum(value.numel() for group in whole.values() for value in group.values())
        assert len(list(path.glob("student-*"))) == 4  # replicas share the work
    assert_equal(everything(folder / "four/step_00000005"), everything(folder / "whole/step_00000005"))


def test_training_goes_on_bit_for_bit_on_two_ranks_and_on_one(folder: Path) -> None:
    """Saved on 1 and on 2 x 2, resumed on 2, and on 1 from 4: two more updates are those of the four ranks."""
    done = launch(2, "two", folder)
    assert done.returncode == 0, done.stderr[-4000:]
    expected = everything(folder / "whole/step_00000005")
    for saved in ("two_whole", "two_hsdp"):
        assert_equal(everything(folder / saved / "step_00000005"), expected)
    run = Run(None, seed=3)
    run.load(folder / "four/step_00000003", None)
    for number in range(3, 5):
        run.step(number)
    assert_equal(run.whole(), expected)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_killed_while_it_saves_costs_that_save_only(victim: int, tmp_path: Path) -> None:
    root = tmp_path / f"run{victim}"
    done = launch(2, "killed", root)
    assert done.codes[victim] == -signal.SIGKILL
    assert sorted(path.name for path in root.iterdir()) in (
        [".tmp-step_00000002", "step_00000001"],
        ["step_00000001"],  # the other rank saw it die, and tidied up
    )
    found = checkpoint.find_resume("auto", root)
    assert found is not None
    assert found[0] == root / "step_00000001"
    assert len(everything(found[0])) == 6
    checkpoint.save(root, 3, {}, {})
    assert sorted(path.name for path in root.iterdir()) == ["step_00000001", "step_00000003"]
