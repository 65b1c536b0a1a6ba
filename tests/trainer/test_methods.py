"""Every objective in the trainer: it trains what it should, goes on exactly after a resume, and nonsense is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.small import BRIEF, DIFFUSION, NETWORK, merged, save_networks, trainer, with_weights
from trainer.base import Trainer
from utils import checkpoint
from utils.errors import ConfigError, UserError

HEADS = {"optimizer": {"lr": 1e-2, "betas": [0.0, 0.99]}}
GAN = {"weight": 0.5, "discriminator_weight": 0.5, "depths": [0.5], "training": HEADS}
BASE: dict[str, Any] = merged(BRIEF, {"checkpoint": {"every": 2}})
METHODS: dict[str, dict[str, Any]] = {
    "dmd2": {"objective": {"gan": GAN}},
    "dmd2_critic": {"objective": {"gan": {**GAN, "features": "critic", "heads": "register", "same_draw": True}}},
    "f_distill": {"objective": {"kind": "f_distill", "gan": GAN}},
    "ladd": {
        "objective": {"kind": "ladd", "gan": {**GAN, "r1": 0.1, "r2": 0.1}}, "critic": None,
        "rollout": {"kind": "backward_simulation"},
    },
    "gan": {
        "objective": {
            "kind": "gan",
            "gan": {
                **GAN, "features": "critic", "loss": "relativistic", "r1": 1.0, "penalty_step": 0.01,
                "penalty_per_step": True,
            },
        },
        "teacher": None,
    },
    "decoupled_dmd": {"objective": {"kind": "decoupled_dmd", "cfg_score_shift": 3.0}},
    "phased_dmd": {"objective": {"kind": "phased_dmd"}, "schedule": {"min_score_timestep": 400}},
    "rescaled": {"objective": {"guidance_rescale": 0.7}},
    "reward": {"objective": {"reward": {"name": "prompt_adherence", "beta": 0.5}}},
    "aligned": {"objective": {"critic_keep": 0.9}},
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    save_networks(folder)
    return folder


def made(folder: Path, path: Path, method: str, **changes: Any) -> Trainer:
    method_of = METHODS[method]
    base = merged(with_weights(BASE, folder), {k: v for k, v in method_of.items() if k not in changes})
    return trainer(path, base, **changes)


def weights(run: Trainer) -> dict[str, Tensor]:
    every = {**run.networks, **run.heads}
    return {
        f"{name}.{key}": v.detach().clone()
        for name, network in every.items()
        for key, v in network.state_dict().items()
    }


@pytest.mark.parametrize("method", METHODS)
def test_it_trains_what_it_should_and_goes_on_exactly(folder: Path, tmp_path: Path, method: str) -> None:
    run = made(folder, tmp_path, method)
    before = weights(run)
    first = run.training_step()
    after = weights(run)
    expected = {name for name in ("student", "critic") if METHODS[method].get(name, "") is not None}
    expected |= {"discriminator"} if "gan" in METHODS[method]["objective"] else set()
    changed = {key.split(".")[0] for key in after if not torch.equal(before[key], after[key])}
    assert changed == expected
    assert {name.split("/")[0] for name in first} >= expected
    assert all(first[f"{name}/grad_norm"] > 0 for name in expected)
    run.step = 1
    run.save_checkpoint()
    run.finish_saving()
    again = made(folder, tmp_path, method)
    assert again.step == 1
    second, resumed = run.training_step(), again.training_step()
    assert second == resumed
    assert second != first
    mine, theirs = weights(run), weights(again)
    assert all(bool((mine[key] == theirs[key]).all()) for key in mine)


def test_f_distill_of_the_reverse_kl_without_gan_term_is_dmd(folder: Path, tmp_path: Path) -> None:
    f = {"kind": "f_distill", "f_distill": {"divergence": "rkl"}, "gan": {**GAN, "weight": 0.0}}
    runs = [trainer(tmp_path / str(i), with_weights(BASE, folder), objective=o) for i, o in enumerate(({}, f))]
    for _ in range(2):
        plain, weighted = (run.training_step() for run in runs)
        for name in ("student/loss", "student/grad_norm", "student/dmd_gradient_norm"):
            assert plain[name] == weighted[name]


@pytest.mark.parametrize("method", ["f_distill", "reward"])
def test_weights_are_of_the_whole_batch_however_it_is_split(folder: Path, tmp_path: Path, method: str) -> None:
    """Four samples at once, and one at a time: the same weights, and so the same update. One at a time, normalised by
    itself, each sample would weigh 1."""
    runs = [
        made(folder, tmp_path / str(size), method, training={"global_batch_size": 4, "micro_batch_size": size})
        for size in (4, 1)
    ]
    at_once, split = (run.training_step() for run in runs)
    for name in ("student/loss", "student/grad_norm", "critic/loss"):
        assert at_once[name] == pytest.approx(split[name], rel=2e-5), name
    if method == "f_distill":
        for name in ("student/weight_max", "student/weight_min", "student/ratio"):
            assert at_once[name] == pytest.approx(split[name], rel=2e-5), name
        assert at_once["student/weight_max"] > 1 + 1e-4
        assert at_once["student/weight_min"] < 1 - 1e-4
        a, b = (run.losses.objective.bins for run in runs)  # type: ignore[attr-defined]
        torch.testing.assert_close(a.means, b.means)


def test_a_pulled_critic_is_between_itself_and_the_student(folder: Path, tmp_path: Path) -> None:
    run = made(folder, tmp_path, "aligned", training={"update_schedule": "alternating", "generator_update_interval": 2})
    key = "critic.head.head.weight"
    before = weights(run)[key]
    run.training_step()  # of the student alone
    after = weights(run)
    torch.testing.assert_close(after[key], 0.9 * before + 0.1 * after["student.head.head.weight"])


REFUSED = [
    ({"objective": {"kind": "f_distill"}}, "gan is null, but kind f_distill needs a discriminator"),
    ({"objective": {"gan": GAN}, "data": {"real": False}}, "data.real is false, but objective.gan needs real videos"),
    ({"objective": {"kind": "sid", "gan": GAN}}, "gan is not for kind sid"),
    ({"objective": {"kind": "ladd", "gan": GAN}}, "critic is not used by objective.kind ladd"),
    (
        {"objective": {"kind": "ladd", "gan": {**GAN, "features": "critic"}}},
        "gan.features must be teacher for kind ladd",
    ),
    ({"objective": {"kind": "gan", "gan": {**GAN, "features": "critic"}}}, "teacher is not used by objective.kind gan"),
    ({"objective": {"kind": "f_distill", "gan": {**GAN, "loss": "hinge"}}}, "gan.loss must be softplus"),
    ({"objective": {"kind": "sid", "reward": {"name": "prompt_adherence"}}}, "reward is not for kind sid"),
    (
        {"objective": {"reward": {"name": "beauty"}}},
        "reward.name 'beauty' is unknown: the toy world has prompt_adherence",
    ),
    ({"objective": {"ladd_mean": 0.0}}, "ladd_mean is not for kind dmd"),
    ({"objective": {"cfg_score_shift": 2.0}}, "cfg_score_shift is not for kind dmd"),
    (
        {"objective": {"kind": "decoupled_dmd", "guidance_rescale": 0.5}},
        "guidance_rescale is not for kind decoupled_dmd",
    ),
    ({"objective": {"kind": "phased_dmd"}}, "phased_dmd needs schedule.min_score_timestep"),
    (
        {"objective": {"gan": GAN}, "parallel": {"engine": "deepspeed"}},
        "objective.gan and critic_keep are not for engine",
    ),
    ({"objective": {"gan": {**GAN, "depths": [1.5]}}}, "depths of the discriminator's features must be shares"),
]


@pytest.mark.parametrize(("changes", "words"), REFUSED)
def test_nonsense_is_refused_in_one_line(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises((ValueError, ConfigError), match=words) as refused:
        trainer(tmp_path, **changes)
    assert "\n" not in str(refused.value)


CONSISTENCY = merged(
    DIFFUSION, {"trainer": "consistency", "teacher": NETWORK, "consistency": {"steps": 6, "guidance": 2.0}}
)


def test_consistency_trains_against_its_own_average_and_goes_on_exactly(folder: Path, tmp_path: Path) -> None:
    run = trainer(tmp_path, with_weights(CONSISTENCY, folder))
    student = run.networks["student"]
    assert student.ema is not None
    live = {name: p.detach().clone() for name, p in student.net.named_parameters()}
    (micro,) = run.batch("consistency")
    loss = run.loss(micro).loss  # type: ignore[attr-defined]
    assert all(torch.equal(p, live[name]) for name, p in student.net.named_parameters())  # its own weights again
    student.ema.shadow["head.head.weight"].add_(0.5)
    assert run.loss(micro).loss != loss  # type: ignore[attr-defined]
    student.ema.shadow["head.head.weight"].sub_(0.5)
    run.cursor = 0
    first = run.training_step()
    run.step = 1
    run.save_checkpoint()
    run.finish_saving()
    again = trainer(tmp_path, with_weights(CONSISTENCY, folder))
    assert run.training_step() == again.training_step() != first
    with pytest.raises(ConfigError, match="needs a causal teacher, and an average"):
        trainer(tmp_path / "no", CONSISTENCY, ema={"decay": None})


def test_a_guard_saves_and_ends_a_run_that_went_wrong(folder: Path, tmp_path: Path) -> None:
    """After `patience` updates in a row beyond a bound, counted over a resume; within it nothing happens."""
    guard = {"luma": [0.9, 1.0], "patience": 3}
    base = with_weights(
        merged(BASE, {"guard": guard, "training": {"max_steps": 6}, "checkpoint": {"every": 100}}), folder
    )
    assert trainer(tmp_path, base, max_steps=2).train() == 0
    with pytest.raises(
        UserError, match=r"guard.luma: the student's samples are at 0\.\d+, beyond \[0.9, 1\] for 3 updates"
    ):
        trainer(tmp_path, base).train()
    assert [checkpoint.step_of(path) for path in checkpoint.list_checkpoints(tmp_path / "checkpoints")] == [2, 3]
    assert trainer(tmp_path / "fine", base, guard={"luma": [0.0, 0.9], "clipped": 1.0}, max_steps=4).train() == 0
