"""A run whose newest checkpoints are damaged is refused with the way out, and goes on from the newest whole one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.small import DIFFUSION, SHORT, merged, trainer
from utils import checkpoint
from utils.errors import UserError

BASE = merged(DIFFUSION, {**SHORT, "checkpoint": {"every": 1, "keep_last": 5}})


def test_last_good_takes_the_newest_whole_checkpoint_and_sets_the_damaged_aside(tmp_path: Path) -> None:
    run = trainer(tmp_path, BASE, max_steps=4)
    run.train()
    unbroken = {name: value.clone() for name, value in run.networks["student"].net.state_dict().items()}
    _, second, third, fourth = (tmp_path / f"checkpoints/step_0000000{step}" for step in (1, 2, 3, 4))
    flipped = third / "student.safetensors"
    data = bytearray(flipped.read_bytes())
    data[-5] ^= 1  # of the size that was written: only its checksum tells
    flipped.write_bytes(data)
    (fourth / "student.safetensors").unlink()
    with pytest.raises(
        UserError, match=r"step_00000004/.* is missing: .*whole one is step_00000003: --resume last-good"
    ):
        trainer(tmp_path, BASE)
    with pytest.raises(UserError, match=r"step_00000003/.* is corrupt .*--resume last-good"):
        trainer(tmp_path, BASE, resume=str(third))
    again = trainer(tmp_path, BASE, resume="last-good", max_steps=4)
    assert again.step == 2
    assert checkpoint.list_checkpoints(tmp_path / "checkpoints")[-1] == second
    aside = sorted(path.name for path in (tmp_path / "previous_1/checkpoints").iterdir())
    assert aside == [third.name, fourth.name]
    again.train()
    assert all(torch.equal(value, unbroken[name]) for name, value in again.networks["student"].net.state_dict().items())
    for path in checkpoint.list_checkpoints(tmp_path / "checkpoints"):
        (path / "state.json").write_text("{")
    with pytest.raises(UserError, match=r"^--resume last-good: .* is whole: start anew with --resume never$"):
        trainer(tmp_path, BASE, resume="last-good")
