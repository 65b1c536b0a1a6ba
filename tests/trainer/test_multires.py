"""Training on videos of several sizes: what is drawn, what follows it, and that nothing else changes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.load import run_from_plain
from configs.schema import RunConfig
from configs.sizes import resize, schedule_at, sizes_of, trained_frames
from generation.generator import Generator
from generation.levels import schedule_of
from generation.run_data import change_data
from generation.sampling import Sampling
from model.schedule import shift_sigma, uniform_sigmas
from model.score import ScoreNet
from model.types import VisualConditioning
from tasks.build import build_task
from tasks.clips import Clips
from tests.small import DIFFUSION, DISTILLATION, ODE, config, merged, save_networks, trainer, with_weights
from tests.trainer.test_methods import GAN
from tests.trainer.test_trainer import assert_same_run, curve, tensors
from trainer.diffusion import DiffusionTrainer
from trainer.distillation import ScoreDistillationTrainer
from trainer.drawn_sizes import drawn_size
from trainer.losses import SampleDraws
from trainer.rollout_cache import RolloutCache
from utils.config import to_plain
from utils.errors import ConfigError, UserError
from utils.parallel.mesh import Mesh
from utils.random import Noise
from worlds.toy import ToyWorld

CPU = torch.device("cpu")
OWN = (6, 8, 8)
SIZES = [{"frames": 3}, {"frames": 3, "height": 6, "width": 6, "weight": 2.0}, {}]
SHAPES = [(3, 4, 8, 8), (3, 4, 6, 6), (6, 4, 8, 8)]
CHANGES: dict[str, Any] = {
    "data": {"toy": {"frames": 6, "across": 1.5}},
    "schedule": {"denoising_step_list": [1000, 500]},
    "training": {
        "max_steps": 3, "critic_warmup_steps": 0, "generator_update_interval": 1, "global_batch_size": 2,
        "micro_batch_size": 2, "sizes": SIZES,
    },
    "checkpoint": {"every": 1},
}  # fmt: skip
GAN_RUN = merged(merged(DISTILLATION, CHANGES), {"objective": {"gan": GAN}, "rollout": {"num_training_frames": 6}})
DIFFUSION_RUN = merged(DIFFUSION, CHANGES)


def distiller(path: Path, base: dict[str, Any] = GAN_RUN, **changes: Any) -> ScoreDistillationTrainer:
    run = trainer(path, base, **changes)
    assert isinstance(run, ScoreDistillationTrainer)
    return run


# -------------------------------------------------------------------------------------------------------------- the draw


def test_sizes_are_drawn_by_their_weights_and_by_the_step_alone() -> None:
    several = config(GAN_RUN)
    assert sizes_of(several) == [(f, h, w) for f, _, h, w in SHAPES]
    drawn = [drawn_size(several, Noise(0, step, ())) for step in range(2000)]
    assert drawn == [drawn_size(several, Noise(0, step, [7, 8])) for step in range(2000)]
    assert drawn != [drawn_size(several, Noise(1, step, ())) for step in range(2000)]
    counts = Counter(drawn)
    for size, share in zip(sizes_of(several), (0.25, 0.5, 0.25), strict=True):
        assert abs(counts[size] / 2000 - share) < 4 * math.sqrt(share * (1 - share) / 2000)


def test_ranks_and_accumulation_make_the_same_losses_bit_for_bit(tmp_path: Path) -> None:
    """One rank with two micro-batches, or two ranks with one each: the same sizes, samples and numbers."""
    save_networks(tmp_path / "start")
    base = with_weights(GAN_RUN, tmp_path / "start")
    run = distiller(tmp_path, base, training={"micro_batch_size": 1})
    met = set()
    for run.step in range(6):
        run.cursor = 10 * run.step
        whole = run.batch("generator")
        shared = []
        for rank in (0, 1):
            run.mesh, run.micro_batches_per_rank, run.cursor = Mesh(replicate=2, rank=rank), 1, 10 * run.step
            shared += run.batch("generator")
        run.mesh, run.micro_batches_per_rank = Mesh(), 2
        (shape,) = {micro.shape for micro in [*whole, *shared]}
        if shape in met:
            continue
        met.add(shape)
        for pair in zip(whole, shared, strict=True):
            a, b = (run.losses.student_loss(run.sample_of(micro, with_gradient=False)) for micro in pair)
            assert torch.equal(a.loss, b.loss)
            assert a.loss != 0
    assert met == set(SHAPES)


def test_a_reused_rollout_has_one_size_for_both_networks(tmp_path: Path) -> None:
    run = distiller(tmp_path, rollout={"reuse_rollout": True})
    run.training_step()
    assert {name.split("/")[0] for name in run.sizes.metrics()} == {"generator"}


# ------------------------------------------------------------------------------------------------------- what follows it


@pytest.mark.parametrize("base", [GAN_RUN, DIFFUSION_RUN], ids=["self_forcing_gan", "diffusion"])
def test_resume_is_exact_with_sizes_mixed(base: dict[str, Any], tmp_path: Path) -> None:
    save_networks(tmp_path / "start")
    base = with_weights(base, tmp_path / "start")
    assert trainer(tmp_path / "whole", base).train() == 0
    assert trainer(tmp_path / "parts", base, max_steps=1).train() == 0
    assert trainer(tmp_path / "parts", base).train() == 0
    drawn = {
        tuple(v for k, v in entry.items() if k.endswith(("/frames", "/height"))) for entry in curve(tmp_path / "whole")
    }
    assert len(drawn) > 1
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_list_of_the_own_size_is_no_list(tmp_path: Path) -> None:
    """Bit for bit, but for what is logged of the sizes."""
    save_networks(tmp_path / "start")
    base = merged(with_weights(GAN_RUN, tmp_path / "start"), {"training": {"max_steps": 1}})
    curves, weights = [], []
    for name, sizes in (("none", None), ("one", [{}])):
        trainer(tmp_path / name, base, training={"sizes": sizes}).train()
        drop = ("/frames", "/height", "/width")
        curves.append([{k: v for k, v in entry.items() if not k.endswith(drop)} for entry in curve(tmp_path / name)])
        weights.append(tensors(tmp_path / name))
    assert curves[0] == curves[1]
    assert weights[0].keys() == weights[1].keys()
    for name, group in weights[0].items():
        assert all(torch.equal(value, weights[1][name][key]) for key, value in group.items())


KINDS: dict[str, dict[str, Any]] = {
    **{kind: merged(DISTILLATION, {"rollout": {"kind": kind}}) for kind in ("backward_simulation", "noised_data")},
    "diffusion_forcing": merged(DISTILLATION, {"rollout": {"kind": "diffusion_forcing"}}),
    "teacher_forcing": merged(DIFFUSION, {"diffusion": {"mode": "teacher_forcing"}}),
    "consistency": merged(DISTILLATION, {"trainer": "consistency", "critic": None, "consistency": {"steps": 4}}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_rollout_and_trainer_takes_its_shape_from_the_draw(kind: str, tmp_path: Path) -> None:
    run = trainer(tmp_path, merged(KINDS[kind], CHANGES))
    seen: set[tuple[int, ...]] = set()
    run.networks["student"].net.register_forward_pre_hook(lambda _, args: seen.add(tuple(args[0].shape[1:])))
    for run.step, (frames, *rest) in enumerate(SHAPES):
        run.sizes.shape = lambda phase, step, shape=(frames, *rest): shape  # type: ignore[method-assign, misc]
        seen.clear()
        run.training_step()
        both = kind in ("teacher_forcing", "consistency")  # clean frames before the noisy ones
        assert seen == {(2 * frames if both else frames, *rest)}
        assert run.skips.total == 0


def test_caches_of_all_sizes_lie_in_the_memory_of_the_largest() -> None:
    several = config(GAN_RUN)
    run_net = build_student(several)
    room = RolloutCache(several, run_net, CPU)
    caches = {size: room.empty(2, 6, *size[1:]) for size in sizes_of(several)}
    owners = {cache._kv.untyped_storage().data_ptr() for cache in caches.values()}
    assert len(owners) == 1
    assert {c._kv.untyped_storage().nbytes() for c in caches.values()} == {caches[OWN].nbytes}
    assert caches[OWN].nbytes > caches[3, 6, 6].nbytes
    assert room.empty(2, 6, 8, 8) is caches[OWN]  # the last one again
    # whoever would still read an earlier one in backward is told, not given other numbers
    k = torch.zeros(2, 48, 2, 16)
    stale = room.empty(2, 6, 8, 8)
    stale.write(3, [(k, k)] * 2)
    join = stale.join(0)
    room.empty(2, 6, 6, 6)
    with pytest.raises(RuntimeError, match="was reset before the backward"):
        join(k, k)


def build_student(of: RunConfig) -> Any:
    from tests.nets import random_net

    return ScoreNet(random_net(0, of.student.geometry()), "student")


def test_a_shared_memory_changes_no_rollout(tmp_path: Path) -> None:
    """After a rollout of another size has used the memory, a rollout is bit for bit that of a fresh cache."""
    save_networks(tmp_path / "start")
    run = distiller(tmp_path, with_weights(GAN_RUN, tmp_path / "start"))
    (micro,) = run.batch("generator")
    for shape in (SHAPES[2], SHAPES[1], SHAPES[0], SHAPES[2]):
        mine = replace(micro, shape=shape)
        shared = run.sample_of(mine, with_gradient=False).rollout.x0
        kept, run.cache = run.cache, RolloutCache(run.config, run.networks["student"].score, CPU)
        assert torch.equal(shared, run.sample_of(mine, with_gradient=False).rollout.x0)
        assert shared.shape[1:] == shape
        run.cache = kept


# -------------------------------------------------------------------------------------------------------------- the shift


def test_the_shift_grows_with_the_root_of_the_tokens(tmp_path: Path) -> None:
    """SD3, eq. 23: shifting by s and then by sqrt(m / n) is shifting by s sqrt(m / n)."""
    several = config(GAN_RUN, schedule={"timestep_shift": 3.0, "score_timestep_shift": 2.0})
    u = torch.linspace(0.05, 0.95, 7)
    for shape in SHAPES:
        factor = math.sqrt(shape[0] * shape[2] * shape[3] / math.prod(OWN))
        scaled = schedule_at(several, shape)
        assert scaled.sigmas() == pytest.approx([shift_sigma(s, factor) for s in several.schedule.sigmas()])
        expected = shift_sigma(shift_sigma(u, 2.0), factor).clamp(0.02, 0.98)
        torch.testing.assert_close(scaled.score_sigma(u), expected)
        torch.testing.assert_close(scaled.training_sigma(u), shift_sigma(shift_sigma(u, 3.0), factor))
    assert schedule_at(several, SHAPES[2]) == several.schedule != schedule_at(several, SHAPES[1])
    for off in ({"training": {"scale_shift": False}}, {"training": {"sizes": None}}):
        assert schedule_at(config(GAN_RUN, **off), SHAPES[1]) == config(GAN_RUN).schedule
    as_given = config(GAN_RUN, schedule={"warp_denoising_step": False})
    assert schedule_at(as_given, SHAPES[1]).sigmas() == (1.0, 0.5)


def test_rollout_scores_and_discriminator_use_the_scaled_shift(tmp_path: Path) -> None:
    run = distiller(tmp_path, rollout={"last_step_only": True, "num_training_frames": None})
    (micro,) = run.batch("generator")
    mine = replace(micro, shape=SHAPES[1])
    scaled = schedule_at(run.config, SHAPES[1])
    sample = run.sample_of(mine, with_gradient=False)
    assert sample.rollout.sigma_from == scaled.sigmas()[-1] != run.config.schedule.sigmas()[-1]
    u = micro.noise.uniform("score_sigma")
    assert torch.equal(
        SampleDraws(run.config, run.config.student.path, sample).score("score")[0], scaled.score_sigma(u)
    )
    ninefold = scaled.scaled(9 / run.config.schedule.score_timestep_shift)
    torch.testing.assert_close(
        SampleDraws(run.config, run.config.student.path, sample).score("score", 9.0)[0], ninefold.score_sigma(u)
    )
    adversary = run.losses.adversary
    assert adversary is not None
    real = adversary.real(micro.positions, micro.noise, "gan", SHAPES[1])
    assert real.x0.shape[1:] == SHAPES[1]
    assert torch.equal(real.sigma, scaled.score_sigma(micro.noise.uniform("gan_real_sigma")))


def test_diffusion_training_uses_the_scaled_shift(tmp_path: Path) -> None:
    run = trainer(tmp_path, merged(DIFFUSION_RUN, {"diffusion": {"mode": "diffusion_forcing"}}))
    assert isinstance(run, DiffusionTrainer)
    micro = replace(run.batch("diffusion")[0], shape=SHAPES[1])
    shift = run.config.schedule.timestep_shift * math.sqrt(3 * 6 * 6 / math.prod(OWN))
    expected = shift_sigma(micro.noise.uniform("sigma", (1,)), shift).expand(-1, 3)
    torch.testing.assert_close(run._block_sigmas(micro, 3), expected)


# ------------------------------------------------------------------------------------------------------------ the samples


def levels_seen(net: torch.nn.Module, make: Callable[[], object]) -> set[float]:
    """The noise levels above 0 at which `make` runs a network."""
    seen: set[float] = set()
    hook = net.register_forward_pre_hook(lambda _, args: seen.update(args[1].flatten().tolist()))
    with torch.no_grad():
        make()
    hook.remove()
    return seen - {0.0}


def sampler(run: RunConfig, score: ScoreNet, shape: Sequence[int]) -> Generator:
    """What samples a run at another height and width, as `--size` asks for them."""
    changed = run_from_plain(to_plain(run))
    change_data(changed, None, None if shape[2:] == SHAPES[2][2:] else (2 * shape[2], 2 * shape[3]), None)
    return Generator(changed, score, CPU)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["self_forcing", "backward_simulation"])
def test_a_student_is_sampled_at_the_levels_that_it_was_trained_at(
    kind: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    run = distiller(
        tmp_path, merged(DISTILLATION, merged(CHANGES, {"rollout": {"kind": kind, "last_step_only": True}}))
    )
    score = run.networks["student"].score
    micro = replace(run.batch("generator")[0], shape=shape)
    trained = levels_seen(score.net, lambda: run.rollout(micro, with_gradient=False))
    videos = sampler(run.config, score, shape)
    assert levels_seen(score.net, lambda: videos(["the digit one"], Sampling(frames=shape[0]), [0])) == trained
    assert len(trained) == 2
    if shape == SHAPES[2]:  # the data's own: what validation makes
        positions = run.task.conditioning(["the digit one"])
        shown = lambda: run.sample(positions, run.task.negative(1), Noise(0, 0, [0]))  # noqa: E731
        assert levels_seen(score.net, shown) == trained


@pytest.mark.parametrize("shape", SHAPES)
def test_a_teacher_is_sampled_with_the_shift_that_it_was_trained_with(shape: tuple[int, ...], tmp_path: Path) -> None:
    run = trainer(tmp_path, merged(DIFFUSION_RUN, {"validation": {"steps": 4}}))
    score, shift = run.networks["student"].score, schedule_at(run.config, shape).timestep_shift
    videos = sampler(run.config, score, shape)
    seen = levels_seen(score.net, lambda: videos(["the digit one"], Sampling(frames=shape[0]), [0]))
    assert sorted(seen, reverse=True) == pytest.approx(uniform_sigmas(4, shift))


def test_a_size_after_another_is_that_size() -> None:
    """A run put to another height and width, then asked for other lengths, has the schedule of its own rule."""
    several = config(DIFFUSION_RUN, training={"scale_shift": True})
    for shape in ((3, 4, 6, 6), (9, 4, 6, 6), (6, 4, 12, 12)):
        changed = run_from_plain(to_plain(several))
        resize(changed, changed.data.resized(2 * shape[2], 2 * shape[3], changed.student))
        assert schedule_at(changed, shape).sigmas() == pytest.approx(schedule_at(several, shape).sigmas(), rel=1e-14)
    single = config(DIFFUSION_RUN, training={"sizes": None})
    before = replace(single.schedule)
    resize(single, single.data.resized(12, 12, single.student))
    assert schedule_at(single, (9, 4, 6, 6)) == before


def test_a_causal_student_makes_long_videos_at_the_levels_of_those_that_it_knows() -> None:
    causal, whole = config(GAN_RUN), config(DIFFUSION_RUN)
    assert schedule_at(causal, (600, 4, 8, 8)) == schedule_at(causal, SHAPES[2])
    assert schedule_at(causal, (1, 4, 8, 8)) == schedule_at(causal, SHAPES[0])
    assert schedule_at(whole, (24, 4, 8, 8)).timestep_shift == 2 * whole.schedule.timestep_shift
    short = config(merged(DISTILLATION, CHANGES), training={"sizes": [{"frames": 3}]})
    assert trained_frames(short) == 3
    assert schedule_at(short, OWN).timestep_shift == pytest.approx(3.0 / math.sqrt(2))


def test_a_size_that_takes_a_step_from_its_expert_is_refused() -> None:
    bounds = {"max_score_timestep": 760, "denoising_step_list": [750, 500], "timestep_shift": 1.0}
    expert = config(
        merged(DISTILLATION, {"rollout": {"kind": "noised_data"}}), schedule=bounds,
        data=CHANGES["data"], training={"sizes": [{}]},
    )  # fmt: skip
    with pytest.raises(UserError, match="--size 24x24: scales schedule.timestep_shift 1 to 1.5, and a step leaves"):
        change_data(expert, None, (24, 24), None)
    with pytest.raises(UserError, match="--frames 24: scales schedule.timestep_shift 1 to 2, and a step leaves"):
        schedule_of(expert, torch.nn.Identity(), (24, 4, 8, 8), few_steps=True)


# --------------------------------------------------------------------------------------------------------------- the data


@pytest.mark.parametrize("shape", SHAPES)
def test_real_videos_of_any_size_show_the_same(shape: tuple[int, ...]) -> None:
    several = config(GAN_RUN)
    task = build_task(several, CPU)
    clips = task.real(range(4), shape)
    world = ToyWorld(replace(several.data.toy, frames=shape[0], canvas=2 * shape[2]))
    assert torch.equal(clips.latents, world.batch(range(4), "train").latents_BFCHW)
    assert clips.captions == task.real(range(4)).captions
    assert task.reencode(clips.latents).shape == (4, 1, *shape[1:])
    torch.testing.assert_close(task.reencode(clips.latents), clips.latents[:, -1:], atol=1e-5, rtol=0)


def test_synthetic_videos_and_images_have_the_size_that_is_asked_for() -> None:
    geometry = {"model_type": "i2v", "in_dim": 10}
    student = {"preset": "toy", "overrides": {"dim": 32, "ffn_dim": 64, "num_layers": 2, **geometry}}
    data = {"kind": "synthetic", "synthetic": {"frames": 3, "height": 4, "width": 4}, "toy": {}}
    task = build_task(config(DIFFUSION, student=student, data=data), CPU)
    for shape in ((3, 4, 4, 4), (5, 4, 6, 2)):
        clips, conditions = task.real(range(2), shape), task.conditions(range(2), shape)
        assert clips.latents.shape == (2, *shape)
        for channels in (clips.visual.channels, conditions.channels):
            assert channels is not None
            assert channels.shape == (2, shape[0], 6, *shape[2:])
        assert task.reencode(clips.latents).shape == (2, 1, *shape[1:])


def test_shorter_stored_videos_are_their_beginnings() -> None:
    latents, channels = torch.randn(2, 5, 4, 2, 2), torch.randn(2, 5, 6, 2, 2)
    image = torch.randn(2, 3, 7)
    short = Clips(latents, ["a", "b"], VisualConditioning(latents[:, :1], channels, image)).start(3, CPU)
    assert torch.equal(short.latents, latents[:, :3])
    assert torch.equal(short.visual.initial, latents[:, :1])
    assert torch.equal(short.visual.channels, channels[:, :3])
    assert short.visual.image is image


# ----------------------------------------------------------------------------------------------------------- what is said


def test_a_config_with_sizes_is_saved_and_read_again() -> None:
    several = config(GAN_RUN)
    assert run_from_plain(to_plain(several)) == several


WAN: dict[str, Any] = {"kind": "wan", "wan": {"frames": 6, "height": 8, "width": 8}, "prompts": "p.txt"}
STORED = {"data": {**WAN, "latents": "folder"}, "validation": {"every": None}}
REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (GAN_RUN, {"training": {"sizes": []}}, "training.sizes is empty"),
    (GAN_RUN, {"training": {"sizes": [{}, {"width": 0}]}}, r"training.sizes\[1\].width must be at least 1"),
    (GAN_RUN, {"training": {"sizes": [{"weight": 0.0}]}}, r"training.sizes\[0\].weight must be positive"),
    (GAN_RUN, {"training": {"sizes": [{"high": 2}]}}, r"training.sizes\[0\].high: unknown key"),
    (GAN_RUN, {"training": {"sizes": [{"frames": 4}]}}, r"sizes\[0\]: its frames and causal.num_frame_per_block disagree"),
    (GAN_RUN, {"training": {"sizes": [{"height": 5}]}}, r"sizes\[0\]: latent size 5x8 is not a multiple of the patch"),
    (GAN_RUN, {"training": {"sizes": [{"height": 6}]}}, "the toy world is square, not 6x8"),
    (GAN_RUN, {"training": {"sizes": [{"height": 2, "width": 2}]}}, r"sizes\[0\]: toy world: canvas must be"),
    (GAN_RUN, {"training": {"sizes": [{"frames": 9}]}}, r"sizes\[0\]: num_training_frames 6 must be 9 plus"),
    (
        GAN_RUN,
        {"objective": {"gan": None, "reward": {"name": "prompt_adherence", "beta": 1.0}}},
        r"sizes\[1\]: objective.reward judges 8x8, not 6x6",
    ),
    (
        GAN_RUN,
        {"schedule": {"max_score_timestep": 760, "denoising_step_list": [750, 500], "timestep_shift": 1.0},
         "training": {"sizes": [{"height": 12, "width": 12}]}},
        "scales schedule.timestep_shift 1 to 1.5, and a step leaves",
    ),
    (merged(ODE, CHANGES), {}, "training.sizes: trainer ode learns from trajectories"),
    (
        DIFFUSION_RUN,
        {**STORED,
         "student": {"overrides": {"model_type": "ti2v"}}, "data": {**WAN, "latents": "folder", "images": "folder", "prompts": None}, "training": {"sizes": [{"height": 6}]}},
        r"6x8 is not the 8x8 of data.wan, in which data.images",
    ),
    (DIFFUSION_RUN, {**STORED, "training": {"sizes": [{"frames": 9}]}}, r"9 frames of data.latents, which gives 6"),
]  # fmt: skip


@pytest.mark.parametrize(("base", "changes", "said"), REFUSED)
def test_sizes_that_cannot_be_are_refused_at_load(base: dict[str, Any], changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        config(base, **changes)
    assert "\n" not in str(caught.value)


def test_prompts_alone_have_any_size() -> None:
    changes = {
        "data": WAN,
        "validation": {"every": None},
        "training": {"sizes": [{"frames": 9, "height": 4}, {"width": 6}]},
    }
    assert sizes_of(config(merged(DISTILLATION, merged(CHANGES, changes)))) == [(9, 4, 8), (6, 8, 6)]
