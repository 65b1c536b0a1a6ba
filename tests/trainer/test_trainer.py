"""The training loop: exact resume, accumulation, cadence, skipped steps, signals, every trainer and rollout."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from model.types import Conditioning, LossOutput
from tests import small
from tests.small import NETWORK, SHORT, config, merged, save_networks, trainer, with_weights
from trainer import ode as trainer_ode
from utils import activity, checkpoint
from utils.errors import UserError
from utils.logging import read_jsonl

Losses = list[dict[str, float]]
DISTILLATION, DIFFUSION, ODE = (merged(base, SHORT) for base in (small.DISTILLATION, small.DIFFUSION, small.ODE))


def curve(path: Path) -> Losses:
    """What a run logged, without what depends on the clock or the machine."""
    drop = ("time", "step_seconds", "samples_per_second", "peak_memory_gib")
    return [{k: v for k, v in entry.items() if k not in drop} for entry in read_jsonl(path / "metrics.jsonl")]


def tensors(path: Path) -> dict[str, dict[str, torch.Tensor]]:
    folder = checkpoint.latest(path / "checkpoints")
    assert folder is not None
    return {name: checkpoint.load_tensors(folder, name) for name in checkpoint.tensor_names(folder)}


def assert_same_run(a: Path, b: Path) -> None:
    assert curve(a) == curve(b)
    tensors_a, tensors_b = tensors(a), tensors(b)
    assert tensors_a.keys() == tensors_b.keys()
    for name in tensors_a:
        assert all(torch.equal(value, tensors_b[name][key]) for key, value in tensors_a[name].items()), name


@pytest.mark.parametrize("base", [DISTILLATION, DIFFUSION, ODE], ids=["distillation", "diffusion", "ode"])
def test_defect_10_resume_is_exact(base: dict[str, Any], tmp_path: Path) -> None:
    """losses(10) == losses(5) + resume + losses(5), bit for bit, and so are weights, averages and optimizers."""
    save_networks(tmp_path / "start")
    base = with_weights(base, tmp_path / "start")
    assert trainer(tmp_path / "whole", base).train() == 0
    assert trainer(tmp_path / "parts", base, max_steps=5).train() == 0
    assert trainer(tmp_path / "parts", base).train() == 0
    losses = [entry["student/loss"] for entry in curve(tmp_path / "whole") if "student/loss" in entry]
    assert len(curve(tmp_path / "whole")) == 10
    assert len(set(losses)) == len(losses) >= 5
    assert min(losses) > 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_resume_from_an_older_checkpoint_rewrites_the_curve(tmp_path: Path) -> None:
    trainer(tmp_path, DISTILLATION).train()
    before = curve(tmp_path)
    trainer(tmp_path, DISTILLATION, resume=str(tmp_path / "checkpoints/step_00000005")).train()
    assert curve(tmp_path) == before


def test_resume_from_an_older_checkpoint_leaves_the_other_future_aside(tmp_path: Path) -> None:
    """Else the newest checkpoint, which `auto` takes and retention keeps, would be of the abandoned branch."""
    keep = {"checkpoint": {"every": 2, "keep_last": 5}}
    trainer(tmp_path, DISTILLATION, max_steps=8, **keep).train()
    older = str(tmp_path / "checkpoints/step_00000002")
    trainer(tmp_path, DISTILLATION, resume=older, max_steps=4, checkpoint={"every": 2, "keep_last": 1}).train()
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path / "checkpoints")] == ["step_00000004"]
    assert len(checkpoint.list_checkpoints(tmp_path / "previous_1/checkpoints")) == 3
    assert [entry["step"] for entry in curve(tmp_path)] == [1, 2, 3, 4]


def test_a_run_that_died_before_its_first_save_leaves_no_doubled_points(tmp_path: Path) -> None:
    trainer(tmp_path, DISTILLATION, max_steps=3, checkpoint={"every": 100})
    run = trainer(tmp_path, DISTILLATION, max_steps=3)
    run.logger.scalars(1, {"critic/loss": 1.0})
    trainer(tmp_path, DISTILLATION, max_steps=3).train()
    assert [entry["step"] for entry in curve(tmp_path)] == [1, 2, 3]


def test_never_resuming_keeps_the_earlier_run_out_of_the_way(tmp_path: Path) -> None:
    trainer(tmp_path, DISTILLATION, max_steps=6).train()
    before = curve(tmp_path)
    trainer(tmp_path, DISTILLATION, max_steps=2, resume="never", seed=1).train()
    assert curve(tmp_path / "previous_1") == before
    assert len(curve(tmp_path)) == 2
    assert checkpoint.latest(tmp_path / "checkpoints") == tmp_path / "checkpoints/step_00000002"


def test_muon_resumes_exactly_too(tmp_path: Path) -> None:
    muon = {"generator_training": {"optimizer": {"kind": "muon", "clip_norm": None, "clip_value": 0.1}}}
    trainer(tmp_path / "whole", DIFFUSION, **muon).train()
    trainer(tmp_path / "parts", DIFFUSION, max_steps=5, **muon).train()
    trainer(tmp_path / "parts", DIFFUSION, **muon).train()
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("base", [DISTILLATION, DIFFUSION], ids=["distillation", "diffusion"])
def test_defect_10_accumulation_gives_the_same_losses(base: dict[str, Any], tmp_path: Path) -> None:
    """A fixed global batch in one, two or four parts: the same samples, the same draws, the same mean."""
    curves = []
    for size in (4, 2, 1):
        trainer(tmp_path / str(size), base, training={"micro_batch_size": size}).train()
        curves.append(curve(tmp_path / str(size)))
    for other in curves[1:]:
        for a, b in zip(curves[0], other, strict=True):
            assert a.keys() == b.keys()
            for key in a:
                assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-6), key


def test_defect_10_accumulation_never_reuses_a_sample(tmp_path: Path) -> None:
    run = trainer(tmp_path, training={"micro_batch_size": 1})
    seen = [position for _ in range(3) for micro in run.batch("generator") for position in micro.positions]
    assert seen == list(range(12))


def test_cadence_of_student_critic_and_average(tmp_path: Path) -> None:
    """Critic every iteration, student each second after a critic-only one; the average counts student updates."""
    run = trainer(tmp_path, DISTILLATION)
    run.train()
    trained = ["student/loss" in entry for entry in curve(tmp_path)]
    assert trained == [False, True, False, True, False, True, False, True, False, True]
    assert all("critic/loss" in entry for entry in curve(tmp_path))
    assert (run.networks["student"].optimizer.updates, run.networks["critic"].optimizer.updates) == (5, 10)


def test_alternating_schedule_trains_one_network_an_iteration(tmp_path: Path) -> None:
    trainer(tmp_path, DISTILLATION, training={"update_schedule": "alternating", "generator_update_interval": 5}).train()
    for entry in curve(tmp_path):
        assert ("student/loss" in entry) != ("critic/loss" in entry)


def test_defect_10_average_moves_once_a_student_update(tmp_path: Path) -> None:
    run = trainer(tmp_path, DISTILLATION, max_steps=4, ema={"decay": 0.5, "start": 0})
    student = run.networks["student"]
    assert student.ema is not None
    name = "blocks.0.ffn.0.weight"
    expected = student.ema.shadow[name].clone()
    weight = dict(student.net.named_parameters())[name]
    for _ in range(4):
        before = student.optimizer.updates
        run.training_step()
        run.step += 1
        if student.optimizer.updates > before:
            expected = 0.5 * expected + 0.5 * weight.detach()
    torch.testing.assert_close(student.ema.shadow[name], expected)


def test_average_is_a_copy_until_it_starts_and_swaps_back_bit_for_bit(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=2, ema={"decay": 0.9, "start": 1})
    run.train()
    student = run.networks["student"]
    assert student.ema is not None
    assert student.optimizer.updates == 1
    weights = {name: p.detach().clone() for name, p in student.net.named_parameters()}
    assert all(torch.equal(student.ema.shadow[name], value) for name, value in weights.items())
    student.ema.shadow["head.head.weight"].add_(1)
    with student.ema.applied():
        assert torch.equal(student.net.head.head.weight, weights["head.head.weight"] + 1)
    assert all(torch.equal(p, weights[name]) for name, p in student.net.named_parameters())


def test_no_average_trains_and_saves(tmp_path: Path) -> None:
    """Defect 10: an average switched off broke the save."""
    trainer(tmp_path, DISTILLATION, max_steps=5, ema={"decay": None}).train()
    assert "student_ema" not in tensors(tmp_path)


def _poison(run: Any, steps: set[int]) -> None:
    healthy = run.losses.student_loss

    def objective(*arguments: Any) -> LossOutput:
        output = healthy(*arguments)
        return LossOutput(output.loss * float("nan"), output.metrics) if run.step in steps else output

    run.losses.student_loss = objective


def test_non_finite_step_is_skipped_and_counted(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=4)
    _poison(run, {1})
    before = {name: p.detach().clone() for name, p in run.networks["student"].net.named_parameters()}
    run.train()
    assert run.skips.total == 1
    assert run.networks["student"].optimizer.updates == 1
    assert all(bool(p.isfinite().all()) for p in run.networks["student"].net.parameters())
    assert not torch.equal(before["head.head.weight"], run.networks["student"].net.head.head.weight)
    assert [entry["skipped_updates"] for entry in curve(tmp_path)] == [0, 1, 1, 1]


def test_too_many_non_finite_steps_abort_with_a_checkpoint(tmp_path: Path) -> None:
    run = trainer(tmp_path, DIFFUSION, training={"non_finite_limit": 3})
    run.networks["student"].net.head.head.bias.data.fill_(float("nan"))
    with pytest.raises(UserError, match="3 updates of student in a row were not finite.*at step 2"):
        run.train()
    assert checkpoint.latest(tmp_path / "checkpoints") is not None


def test_one_bad_network_aborts_though_the_other_is_fine(tmp_path: Path) -> None:
    """The critic's good updates must not hide that the student never trains; the abort leaves a whole iteration."""
    run = trainer(tmp_path, training={"generator_update_interval": 1, "non_finite_limit": 3})
    _poison(run, set(range(20)))
    with pytest.raises(UserError, match="3 updates of student in a row"):
        run.train()
    assert run.networks["critic"].optimizer.updates == 4
    assert run.networks["student"].optimizer.updates == 0
    assert checkpoint.load_state(tmp_path / "checkpoints/step_00000004")["cursor"] == run.cursor
    trainer(tmp_path).train()  # goes on from there


def test_student_numbers_are_logged_though_not_every_iteration_has_them(tmp_path: Path) -> None:
    trainer(tmp_path, max_steps=8, training={"generator_update_interval": 4, "log_every": 4}).train()
    entries = curve(tmp_path)
    assert [entry["step"] for entry in entries] == [4, 8]
    assert all("student/loss" in entry and "student/luma" in entry for entry in entries)


def test_resume_takes_the_rates_and_decay_of_the_config(tmp_path: Path) -> None:
    trainer(tmp_path, max_steps=2).train()
    changed = {"generator_training": {"optimizer": {"weight_decay": 0.5, "betas": [0.0, 0.9]}}}
    group = trainer(tmp_path, **changed).networks["student"].optimizer.optimizers["adamw"].param_groups[0]
    assert group["weight_decay"] == 0.5
    assert tuple(group["betas"]) == (0.0, 0.9)


@pytest.mark.parametrize("first", [0.0, 0.9])
def test_resume_takes_the_momentum_of_the_config(first: float, tmp_path: Path) -> None:
    """Beta1 from 0 to 0.9 and back, through the files."""
    settings = [{"generator_training": {"optimizer": {"betas": [beta, 0.99]}}} for beta in (first, 0.9 - first)]
    assert trainer(tmp_path, max_steps=2, **settings[0]).train() == 0
    assert trainer(tmp_path, max_steps=4, **settings[1]).train() == 0
    kept = {name.rpartition("/")[2] for name in tensors(tmp_path)["student_adamw"]}
    assert kept == {"step", "exp_avg_sq"} | ({"exp_avg"} if first == 0 else set())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signal_saves_and_the_run_goes_on_exactly(number: signal.Signals, tmp_path: Path) -> None:
    trainer(tmp_path / "whole", DISTILLATION).train()
    run = trainer(tmp_path / "parts", DISTILLATION)
    step = run.training_step

    def training_step() -> dict[str, float]:
        if run.step == 6:
            os.kill(os.getpid(), number)
        return step()

    run.training_step = training_step  # type: ignore[method-assign]
    assert run.train() == 128 + number
    assert checkpoint.latest(tmp_path / "parts/checkpoints") == tmp_path / "parts/checkpoints/step_00000007"
    assert trainer(tmp_path / "parts", DISTILLATION).train() == 0
    whole, parts = tensors(tmp_path / "whole"), tensors(tmp_path / "parts")
    assert curve(tmp_path / "whole") == curve(tmp_path / "parts")
    assert all(torch.equal(value, parts["student"][key]) for key, value in whole["student"].items())


def test_a_signal_after_the_last_step_finds_a_finished_run(tmp_path: Path) -> None:
    made = trainer(tmp_path, DIFFUSION, training={"max_steps": 1})
    step = made.training_step

    def signalled() -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGUSR1)
        return step()

    made.training_step = signalled  # type: ignore[method-assign]
    assert made.train() == 0


def test_what_takes_long_has_the_watchdogs_long_patience(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last save is waited for as saves are, and each batch of ODE pairs counts for itself, not all together."""
    seen: list[activity.Activity] = []
    sampler = trainer_ode.euler_trajectory

    def noted(*args: Any) -> Any:
        seen.append(activity.current())
        return sampler(*args)

    monkeypatch.setattr(trainer_ode, "euler_trajectory", noted)
    activity.begin(0, slow=True)
    made = trainer(tmp_path, ODE, training={"max_steps": 1}, ode={"pairs": 5, "steps": 2})
    assert [(now.what, now.slow) for now in seen] == [("ODE pairs from 0", True), ("ODE pairs from 4", True)]
    waits: list[bool] = []
    wait = made.saver.wait

    def noted_wait() -> None:
        waits.append(activity.current().slow)
        wait()

    monkeypatch.setattr(made.saver, "wait", noted_wait)
    made.train()
    assert waits == [True, True]  # before the save and after it


@pytest.mark.parametrize("kind", ["self_forcing", "backward_simulation", "noised_data", "diffusion_forcing"])
@pytest.mark.parametrize("objective", ["dmd", "sid"])
def test_every_rollout_trains_under_every_objective(kind: str, objective: str, tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=2, rollout={"kind": kind}, objective={"kind": objective})
    before = {name: p.detach().clone() for name, p in run.networks["student"].net.named_parameters()}
    run.train()
    changed = [name for name, p in run.networks["student"].net.named_parameters() if not torch.equal(p, before[name])]
    assert "head.head.weight" in changed
    assert run.skips.total == 0


@pytest.mark.parametrize("mode", ["bidirectional", "diffusion_forcing", "teacher_forcing"])
def test_flow_matching_learns_in_every_mode(mode: str, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "diffusion": {"mode": mode, "clean_block_share": 0.3, "clean_noise_max": 100.0},
        "training": {"max_steps": 60}, "generator_training": {"optimizer": {"lr": 3e-3}},
    }  # fmt: skip
    trainer(tmp_path, DIFFUSION, **changes).train()
    losses = [entry["student/loss"] for entry in curve(tmp_path)]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


def test_long_rollouts_judge_only_the_last_window(tmp_path: Path) -> None:
    run = trainer(tmp_path, rollout={"num_training_frames": 15}, causal={"window_frames": 9, "sink_frames": 3})
    lengths = set()
    for step in range(12):
        run.step = step
        micro = run.batch("generator")[0]
        rollout, _ = run.rollout(micro, with_gradient=True)  # type: ignore[attr-defined]
        lengths.add(len(rollout.exit_steps) * 3)
        assert rollout.x0.shape[1] == 9
        if len(rollout.exit_steps) > 3:
            assert rollout.frame_mask is not None
            assert rollout.frame_mask.tolist() == [False] + [True] * 8
    assert lengths == {9, 12, 15}


def test_reused_rollout_costs_the_critic_nothing(tmp_path: Path) -> None:
    runs = {
        reuse: trainer(tmp_path / str(reuse), max_steps=2, rollout={"reuse_rollout": reuse}) for reuse in (True, False)
    }
    for run in runs.values():
        run.train()
    calls = {reuse: run.evaluations.calls["student"] for reuse, run in runs.items()}
    entries = {reuse: curve(tmp_path / str(reuse)) for reuse in runs}
    assert entries[True][0] == entries[False][0]  # critic alone: nothing to reuse
    assert entries[True][1]["student/loss"] == entries[False][1]["student/loss"]
    assert calls[True] < calls[False]
    assert runs[True].cursor == 8
    assert runs[False].cursor == 12


@pytest.mark.parametrize("kind", ["self_forcing", "noised_data", "diffusion_forcing", "teacher_forcing"])
def test_reused_rollout_keeps_its_own_captions(kind: str, tmp_path: Path) -> None:
    """Samples made from real videos have those videos' captions, not the prompt library's at the same place."""
    run = trainer(tmp_path, rollout={"kind": kind, "reuse_rollout": True}, training={"critic_warmup_steps": 0})
    seen: dict[str, list[torch.Tensor]] = {"student": [], "critic": []}
    velocity = run.networks["critic"].score.velocity

    def spy(x: torch.Tensor, sigma: torch.Tensor, conditioning: Conditioning, **mode: Any) -> torch.Tensor:
        seen["critic" if torch.is_grad_enabled() else "student"].append(conditioning.prompt["text"])
        return velocity(x, sigma, conditioning, **mode)

    run.networks["critic"].score.velocity = spy  # type: ignore[method-assign]
    run.training_step()
    assert torch.equal(seen["student"][0], seen["critic"][0])  # in the student's loss, and in the critic's own


def test_exit_steps_cover_the_whole_list_and_obey_their_switches(tmp_path: Path) -> None:
    """Defects 7 and 8: the last step is trained too, and the draw belongs to the step, not to the rank or sample."""
    for switch, check in (
        ({}, lambda s: len(set(s)) == 1),
        ({"same_step_across_blocks": False}, lambda s: len(s) == 3),
        ({"last_step_only": True}, lambda s: s == (2, 2, 2)),
    ):
        run = trainer(tmp_path / str(len(switch)) / str(switch), rollout=switch)
        drawn = []
        for step in range(30):
            run.step = step
            (micro,) = run.batch("generator")
            drawn.append(run._exit_steps(run.config.rollout, micro, 3))  # type: ignore[attr-defined]
        assert all(check(steps) for steps in drawn)
        assert {step for steps in drawn for step in steps} == ({2} if "last_step_only" in switch else {0, 1, 2})
        assert any(len(set(steps)) > 1 for steps in drawn) == ("same_step_across_blocks" in switch)


def test_teacher_is_frozen_in_bf16_and_trained_networks_are_fp32_masters(tmp_path: Path) -> None:
    """Defect 11: a frozen teacher kept in fp32 master weights."""
    run = trainer(tmp_path, max_steps=2, training={"precision": "bf16"})
    teacher = run.teacher.net  # type: ignore[attr-defined]
    assert {p.dtype for p in teacher.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in teacher.parameters())
    run.train()
    for trained in run.networks.values():
        assert {p.dtype for p in trained.net.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student": {"overrides": {"dim": 48}}, "teacher": NETWORK}, "another geometry"),
        (
            {"generator_training": {"optimizer": {"kind": "muon"}}},
            "student was trained with adamw, and this run's optimizer.kind is of adamw and muon: ",
        ),
        ({"ema": {"decay": None}}, None),
    ],
)
def test_resume_of_another_run_is_refused_in_one_line(
    changes: dict[str, Any], message: str | None, tmp_path: Path
) -> None:
    trainer(tmp_path, max_steps=5).train()
    if message is None:  # an average that is no longer wanted is no obstacle
        trainer(tmp_path, max_steps=6, **changes).train()
        return
    with pytest.raises(UserError, match=message) as caught:
        trainer(tmp_path, **changes)
    assert "\n" not in str(caught.value)


def test_uneven_global_batch_is_refused() -> None:
    from trainer.micro_batch import micro_batches

    with pytest.raises(UserError, match="global_batch_size 4 is not a multiple of 3 ranks x"):
        micro_batches(config(training={"micro_batch_size": 1}).training, 3)
