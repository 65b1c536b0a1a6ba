"""Training on given first frames: all trainers see the image, no loss judges it, and it goes by position as all data does."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from generation.ode_pairs import preprocess_ode
from model.dmd import critic_loss
from model.text_encoder import toy_text_encoder
from model.types import Conditioning, VisualConditioning
from planning.hardware import GPUS
from planning.plan import Cluster, make_plan
from scripts.tiny_models import save_text_encoder
from tasks.build import build_task
from tasks.kinds.encoded import EncodedTask
from tests.nets import random_net
from tests.small import DIFFUSION, DISTILLATION, ODE, config, merged, trainer
from tests.trainer.test_trainer import assert_same_run, curve
from trainer import faults
from trainer.diffusion import DiffusionTrainer
from trainer.distillation import ScoreDistillationTrainer
from trainer.faults import SharedFaults
from trainer.losses import Sample as StudentSample
from trainer.ode import ODETrainer
from utils.config import save
from utils.data.latents import open_latents
from utils.data.order import ShardedOrder
from utils.data.safetensors_shards import write_latents, write_trajectories
from utils.data.stream import CorruptSample, Sample, Stream
from utils.errors import ConfigError, UserError
from utils.random import Noise

CPU = torch.device("cpu")
COUNT, C, F, H, W, CLIP = 6, 4, 3, 4, 4, (5, 10)
CAPTIONS = [f"image {i}" for i in range(COUNT)]
LEVELS = torch.tensor([1.0, 0.9, 0.75, 0.0])
# how each network takes an image: in the noise, pinned; beside the latents; as the first block of a causal one
KINDS = ("ti2v", "i2v", "causal", "causal_i2v")
INIT = ("student", "teacher", "critic")


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def network(kind: str) -> dict[str, Any]:
    sizes = {"dim": 24, "ffn_dim": 32, "num_layers": 1, "num_heads": 2, "text_dim": 16, "text_len": 6, "freq_dim": 16}
    if is_i2v(kind):
        sizes |= {"in_dim": C + 4 + C, "image_dim": CLIP[1]}
    model_type = {"ti2v": "ti2v", "causal": "t2v"}.get(kind, "i2v")
    return {"preset": "toy", "overrides": {**sizes, "out_dim": C, "model_type": model_type}, "attention": "plain"}


def samples(seed: int, frames: int) -> list[Sample]:
    """Latents, what i2v networks see of the first frame, and CLIP's tokens; the seed changes the image alone."""
    out = []
    for i, caption in enumerate(CAPTIONS):
        first = normal(100 * seed + i, F, C, H, W)
        latents = torch.cat([first[:1], normal(i, F, C, H, W)[1:]])[:frames]
        out.append(Sample(caption, caption, None, latents, first, normal(100 * seed + i + 50, *CLIP)))
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder of text, images and videos of two kinds of images, and trajectories that end in those videos."""
    root = tmp_path_factory.mktemp("images")
    text = toy_text_encoder([*CAPTIONS, "none"], 6, 16, seed=0)
    save_text_encoder(root / "text", text)
    (root / "prompts.txt").write_text("\n".join(CAPTIONS))
    for seed in (1, 2):
        write_latents(root / f"images{seed}/a.safetensors", samples(seed, 1), normalised=True)
        videos = samples(seed, F)
        write_latents(root / f"videos{seed}/a.safetensors", videos, normalised=True)
        clean = torch.stack([video.latents for video in videos if video.latents is not None])
        x = torch.stack([(1 - s) * clean + s * normal(9, *clean.shape) for s in LEVELS], 1)
        visual = {
            "first_latents": torch.stack([v.first_latents for v in videos if v.first_latents is not None]),
            "clip": torch.stack([v.clip for v in videos if v.clip is not None]),
        }
        write_trajectories(root / f"pairs{seed}/a.safetensors", x, LEVELS, CAPTIONS, visual=visual)
    return root


@pytest.fixture(autouse=True)
def no_vae(monkeypatch: pytest.MonkeyPatch) -> None:
    """Distillation logs how bright its videos are: here latents are pixels."""
    monkeypatch.setattr(EncodedTask, "decode", lambda _task, latents: latents[:, :, :3].sigmoid())


def is_i2v(kind: str) -> bool:
    return kind in ("i2v", "causal_i2v")


def options(folder: Path, kind: str, base: dict[str, Any], **data: Any) -> dict[str, Any]:
    """A run of one kind of network, without a VAE."""
    text = {"encoder": str(folder / "text"), "dtype": "fp32"}
    data = {"kind": "wan", "wan": {"frames": F, "height": H, "width": W}, "text": text, **data}
    present = {name: network(kind) for name in INIT if base[name] is not None}
    causal = {"num_frame_per_block": 1} if is_i2v(kind) else {"num_frame_per_block": 2, "independent_first_frame": True}
    rollout = {"kind": "self_forcing" if kind.startswith("causal") else "backward_simulation"}
    training = {"max_steps": 2, "critic_warmup_steps": 0, "generator_update_interval": 1, "global_batch_size": 2}
    more = {"data": data, "causal": causal, "rollout": rollout, "training": {**training, "micro_batch_size": 2}}
    return merged(base, {**present, **more})


def started(path: Path, base: dict[str, Any]) -> Any:
    """A trainer whose networks have no zero weights, so that all that they see matters."""
    run = trainer(path, base, resume="never")
    nets = {name: trained.net for name, trained in run.networks.items()}
    if (teacher := getattr(run, "teacher", None)) is not None:
        nets["teacher"] = teacher.net
    for seed, name in enumerate(sorted(nets)):
        nets[name].load_state_dict(random_net(seed, nets[name].config).state_dict())
    return run


def spoil(net: nn.Module, *frames: int) -> None:
    """Whatever the network says of these frames is wrong from now on."""

    def spoilt(_net: nn.Module, _args: Any, out: Tensor) -> Tensor:
        wrong = torch.zeros(out.shape[1])
        wrong[list(frames)] = 1e3
        return out + wrong.view(-1, 1, 1, 1)

    net.register_forward_hook(spoilt)


def shifted(visual: VisualConditioning) -> VisualConditioning:
    return VisualConditioning(*(None if t is None else t + 1 for t in (visual.initial, visual.channels, visual.image)))


# ---------------------------------------------------------------------------------------------------------- the trainers


@pytest.mark.parametrize("kind", KINDS)
def test_a_distillation_step_judges_what_was_made(folder: Path, kind: str, tmp_path: Path) -> None:
    """An i2v network sees channels and tokens, others a clean first frame, where no loss depends on the critic's output."""
    run = started(tmp_path, options(folder, kind, DISTILLATION, images=str(folder / "images1")))
    assert isinstance(run, ScoreDistillationTrainer)
    (micro,) = run.batch("generator")
    fake, sigma, noise = run.networks["critic"], torch.tensor([0.7, 0.4]), normal(3, 2, F, C, H, W)
    with torch.no_grad():
        made, conditioning = run.rollout(micro, with_gradient=False)

        def losses() -> list[Tensor]:
            student = run.losses.student_loss(StudentSample(made, conditioning, micro.positions, micro.noise))
            return [student.loss, critic_loss(made, fake.score, conditioning, sigma, noise).loss]

        before = losses()
        spoil(fake.net, 0)
        after = losses()
        if is_i2v(kind):
            assert conditioning.initial is None
            assert made.frame_mask is None
            assert made.x0.shape == (2, F, C, H, W)
            assert conditioning.channels is not None
            assert conditioning.channels.shape == (2, F, 4 + C, H, W)
            assert conditioning.image is not None
            assert conditioning.image.shape == (2, *CLIP)
            assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
            return
        assert made.frame_mask is not None
        assert made.frame_mask.tolist() == [False, True, True]
        assert conditioning.initial is not None
        assert conditioning.channels is None
        assert made.x0.shape == (2, F, C, H, W)
        assert torch.allclose(made.x0[:, :1], conditioning.initial, atol=1e-5)
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        spoil(fake.net, 1)
        assert all(not torch.equal(a, b) for a, b in zip(before, losses(), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_distillation_sees_the_image_and_resumes_exactly(folder: Path, kind: str, tmp_path: Path) -> None:
    found = {}
    for images in ("images1", "images2"):
        run = started(tmp_path / images, options(folder, kind, DISTILLATION, images=str(folder / images)))
        assert run.train() == 0
        found[images] = curve(tmp_path / images)
    for first, second in zip(found["images1"], found["images2"], strict=True):
        for name in ("student/loss", "critic/loss"):
            assert first[name] > 0
            assert first[name] != second[name]
    if kind != "causal":
        return
    base = options(folder, kind, DISTILLATION, images=str(folder / "images1"))
    for path, steps in (("whole", [None]), ("parts", [1, None])):
        for most in steps:
            assert trainer(tmp_path / path, base, max_steps=most).train() == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


MODES = [
    *(("bidirectional", kind) for kind in ("ti2v", "i2v")),
    *((mode, kind) for mode in ("diffusion_forcing", "teacher_forcing") for kind in KINDS if kind != "i2v"),
]


@pytest.mark.parametrize(("mode", "kind"), MODES)
def test_a_diffusion_step_is_given_the_first_frame(folder: Path, mode: str, kind: str, tmp_path: Path) -> None:
    data = {"latents": str(folder / "videos1"), "prompts": str(folder / "prompts.txt")}
    data |= {"first_frame": True} if kind == "causal" else {}
    run = started(tmp_path, merged(options(folder, kind, DIFFUSION, **data), {"diffusion": {"mode": mode}}))
    assert isinstance(run, DiffusionTrainer)
    (micro,) = run.batch("diffusion")
    real, clips = run.task.real, run.task.real(micro.positions)
    with torch.no_grad():
        before = run.loss(micro).loss
        changed = clips.latents.clone()
        if not is_i2v(kind):
            assert clips.visual.initial is not None
            assert torch.equal(clips.visual.initial, clips.latents[:, :1])
            changed[:, :1] += 1  # the frame itself has no loss: what changes is what the others see
        run.task.real = lambda positions, shape=None: replace(clips, latents=changed, visual=shifted(clips.visual))
        assert abs(run.loss(micro).loss - before) > 1e-4 * before
        run.task.real = real
        spoil(run.networks["student"].net, *((0, F) if mode == "teacher_forcing" else (0,)))
        assert torch.equal(run.loss(micro).loss, before) is not is_i2v(kind)
        spoil(run.networks["student"].net, -1)
        assert run.loss(micro).loss > 2 * before
    update = run.begin_update(run.networks["student"])
    for part in update.over([micro]):
        update.backward(run.loss(part))
    assert update.step()["student/loss"] > 0


@pytest.mark.parametrize("kind", KINDS)
def test_an_ode_step_is_given_the_first_frame(folder: Path, kind: str, tmp_path: Path) -> None:
    data = {"prompts": str(folder / "prompts.txt")} | ({} if is_i2v(kind) else {"first_frame": True})
    base = merged(options(folder, kind, ODE, **data), {"teacher": None, "ode": {"path": str(folder / "pairs1")}})
    run = started(tmp_path, base)
    assert isinstance(run, ODETrainer)
    assert run.stored is not None
    (micro,) = run.batch("ode")
    read, pairs = run.stored.read, run.stored.read(micro.positions)
    with torch.no_grad():
        before, changed = run.loss(micro).loss, pairs.trajectory.clone()
        if not is_i2v(kind):
            changed[:, -1, :1] += 1
        run.stored.read = lambda positions: replace(pairs, trajectory=changed, visual=shifted(pairs.visual))  # type: ignore[method-assign]
        assert abs(run.loss(micro).loss - before) > 1e-4 * before
        run.stored.read = read  # type: ignore[method-assign]
        spoil(run.networks["student"].net, 0)
        assert torch.equal(run.loss(micro).loss, before) is not is_i2v(kind)
    assert run.train() == 0


@pytest.mark.parametrize("kind", ["ti2v", "i2v"])
def test_trajectories_are_made_from_images_and_keep_what_they_were_made_from(
    folder: Path, kind: str, tmp_path: Path
) -> None:
    """By the trainer itself, and ahead of it: the files are enough for a run without the images."""
    images = str(folder / "images1")
    base = merged(options(folder, kind, ODE, images=images), {"ode": {"pairs": 4, "steps": 6}})
    run = started(tmp_path / "made", base)
    assert run.train() == 0
    save(config(base), tmp_path / "ode.yaml")
    assert preprocess_ode(["--config_path", str(tmp_path / "ode.yaml"), "--out", str(tmp_path / "out")]) == 0
    by_caption = {sample.caption: sample for sample in samples(1, 1)}
    stored = open_latents(tmp_path / "out")
    for number in range(4):
        found = stored.read(number, 0)
        made, image = run.trajectories[number], by_caption[found.caption]
        assert run.task.prompts(range(number, number + 1)) == [found.caption]
        assert found.trajectory is not None
        assert torch.allclose(found.trajectory, made, atol=1e-5)
        assert image.latents is not None
        assert found.latents is not None
        if kind == "ti2v":
            assert torch.equal(found.latents[:1], image.latents)
            assert found.clip is None
        else:
            assert torch.equal(found.first_latents, image.first_latents)  # type: ignore[arg-type]
            assert torch.equal(found.clip, image.clip)  # type: ignore[arg-type]
    data = {"images": None, "prompts": str(folder / "prompts.txt")} | ({} if kind == "i2v" else {"first_frame": True})
    other_run = started(
        tmp_path / "stored", merged(base, {"teacher": None, "data": data, "ode": {"path": str(tmp_path / "out")}})
    )
    assert other_run.train() == 0


# -------------------------------------------------------------------------------------------------------------- the data


def test_images_go_by_position_with_their_captions(folder: Path) -> None:
    """Any split over ranks and any resume reads the same images; each comes once an epoch, under its own caption."""
    base = config(options(folder, "i2v", DISTILLATION, images=str(folder / "images1")))
    task = build_task(base, CPU)
    whole = task.conditions(range(2 * COUNT))
    assert sorted(task.prompts(range(COUNT))) == sorted(task.prompts(range(COUNT, 2 * COUNT))) == CAPTIONS
    by_caption = {sample.caption: sample for sample in samples(1, 1)}
    for row, caption in enumerate(task.prompts(range(2 * COUNT))):
        first = by_caption[caption].first_latents
        assert whole.channels is not None
        assert first is not None
        assert torch.equal(whole.channels[row, :, 4:], first)
        assert torch.equal(whole.prompt["text"][row], task.conditioning([caption]).prompt["text"][0])
    parts = []
    for ranks, start, stop in ((1, 0, 4), (4, 4, 8), (2, 8, 12)):  # fresh tasks: nothing but the position goes on
        each = (stop - start) // ranks
        parts += [build_task(base, CPU).conditions(range(a, a + each)) for a in range(start, stop, each)]
    joined = Conditioning.joined(parts)
    assert torch.equal(joined.channels, whole.channels)
    assert torch.equal(joined.prompt["text"], whole.prompt["text"])
    assert torch.equal(joined.image, whole.image)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_validation_shows_images_under_their_captions(folder: Path, kind: str, tmp_path: Path) -> None:
    run = started(tmp_path, options(folder, kind, DISTILLATION, images=str(folder / "images1")))
    assert run.validation_prompts == CAPTIONS[:2]
    conditioning = run.task.validation_visual(range(2), CAPTIONS[:2]).with_prompt(
        run.task.conditioning(CAPTIONS[:2]).prompt["text"]
    )
    made = run.sample(conditioning, run.task.negative(2), Noise(0, 0, range(2)))
    assert made.shape == (2, F, C, H, W)
    if not is_i2v(kind):
        images = torch.stack([s.latents for s in samples(1, 1)[:2] if s.latents is not None])
        assert torch.equal(made[:, :1], images)


def test_what_does_not_fit_is_one_line(folder: Path, tmp_path: Path) -> None:
    images = str(folder / "images1")
    prompts = str(folder / "prompts.txt")

    def refused(match: str, kind: str, base: dict[str, Any], changes: dict[str, Any], **data: Any) -> None:
        with pytest.raises(ConfigError, match=match) as caught:
            trainer(tmp_path, merged(options(folder, kind, base, **data), changes))
        assert "\n" not in str(caught.value)

    simulated = {"rollout": {"kind": "backward_simulation"}}
    refused(
        "student: a bidirectional network of model_type 't2v' cannot", "causal", DISTILLATION, simulated, images=images
    )
    refused("teacher: a bidirectional network of model_type 't2v' cannot", "causal", ODE, {}, images=images)
    refused("set causal.independent_first_frame to true", "causal", DISTILLATION,
            {"causal": {"independent_first_frame": False, "num_frame_per_block": 3}}, images=images)  # fmt: skip
    refused("data.images is null, but networks are to be given", "i2v", DISTILLATION, {}, prompts=prompts)
    refused("data.images is null, but networks are to be given", "ti2v", DISTILLATION, {}, prompts=prompts,
            first_frame=True)  # fmt: skip
    adversarial = {"objective": {"gan": {}}}  # real videos for the discriminator, and nothing for its samples
    refused("data.images is null, but networks are to be given", "i2v", DISTILLATION, adversarial, prompts=prompts,
            latents=str(folder / "videos1"))  # fmt: skip
    refused("images and prompts are both given", "i2v", DISTILLATION, {}, prompts=prompts, images=images)
    refused("first_frame is false, but an i2v network", "i2v", DISTILLATION, {}, prompts=prompts, first_frame=False)
    refused("first_frame is false, but images give", "ti2v", DISTILLATION, {}, images=images, first_frame=False)
    synthetic = {"data": {"kind": "synthetic", "images": images}}
    refused("images is not for kind synthetic", "ti2v", DISTILLATION, synthetic)
    refused("num_training_frames 4: the channels of an i2v", "causal_i2v", DISTILLATION,
            {"rollout": {"num_training_frames": 4}}, images=images)  # fmt: skip
    refused("has no clip_feature of width 12", "i2v", DISTILLATION,
            {name: {"overrides": {"image_dim": 12}} for name in INIT}, images=images)  # fmt: skip
    refused("data.images: .* holds latents of .* and this run makes", "i2v", DISTILLATION, {}, images=images,
            wan={"frames": F, "height": H, "width": 2 * W})  # fmt: skip
    bare = [replace(sample, first_latents=None) for sample in samples(1, 1)]
    write_latents(tmp_path / "bare/a.safetensors", bare, normalised=True)
    refused("has no first_frame_latent of 3 frames", "i2v", DISTILLATION, {}, images=str(tmp_path / "bare"))
    refused("has no first_frame_latent of 5 frames", "i2v", DISTILLATION, {}, images=images,
            wan={"frames": 5, "height": H, "width": W})  # fmt: skip


def test_a_text_to_video_run_of_a_ti2v_network_is_given_nothing(folder: Path, tmp_path: Path) -> None:
    prompts = str(folder / "prompts.txt")
    run = started(tmp_path / "free", options(folder, "ti2v", DISTILLATION, prompts=prompts))
    assert run.task.conditions(range(2)).initial is None
    assert run.train() == 0
    data = {"prompts": prompts, "latents": str(folder / "videos1"), "first_frame": False}
    run = started(tmp_path / "real", options(folder, "ti2v", DIFFUSION, **data))
    assert run.task.real(range(2)).visual == VisualConditioning()
    assert run.train() == 0


def test_a_plan_of_an_i2v_run_needs_no_images(folder: Path) -> None:
    base = config(options(folder, "i2v", DISTILLATION, images=str(folder / "images1")))
    plan = make_plan(base, Cluster(1, 1, "h200", GPUS["h200"]))
    assert plan.peak > 0
    assert plan.seconds > 0


# ------------------------------------------------------------------------------------------------------- corrupt samples


class Broken:
    """100 samples, of which those in `bad` cannot be read."""

    shard_sizes = (100,)

    def __init__(self, bad: set[int]) -> None:
        self.bad = bad

    def read(self, item: int, position: int) -> Sample:
        if item in self.bad:
            raise CorruptSample(f"item {item} is broken")
        return Sample(str(item))


def test_corrupt_samples_of_all_ranks_count_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of two ranks met one: alone, that is no more than one in a hundred. A sample that both met counts once."""

    def stream(met: int) -> Stream:
        made = Stream(Broken({3, 4}), ShardedOrder([100], 0), 0)
        with pytest.raises(CorruptSample):
            made.source.read(met, 0)
        made.faults.add(met, CorruptSample(f"item {met} is broken"))
        return made

    asked: list[set[int]] = []

    def union(local: Any) -> set[int]:
        asked.append(set(local))
        return set(local) | others

    monkeypatch.setattr(faults.distributed, "union", union)
    monkeypatch.setattr(faults.distributed, "world_size", lambda: 2)
    others = {3}
    shared = SharedFaults([stream(3)])
    assert shared.agree(0.0) == {"corrupt_samples": 1.0}
    assert not asked
    assert shared.agree(2.0) == {"corrupt_samples": 1.0}
    assert asked == [{3}]
    assert shared.agree(2.0 * shared.count) == {"corrupt_samples": 1.0}
    assert len(asked) == 1
    others = {4}
    with pytest.raises(UserError, match=r"2 of 100 samples are corrupt, more than a share of 0\.01") as caught:
        shared.agree(3.0)
    assert "\n" not in str(caught.value)
    assert SharedFaults([]).agree(0.0) == {}


def test_a_run_counts_corrupt_images(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images = samples(1, 1)
    first = images[2].first_latents
    assert first is not None
    images[2] = replace(images[2], first_latents=first * torch.inf)
    write_latents(tmp_path / "images/a.safetensors", images, normalised=True)
    run = trainer(tmp_path / "run", options(folder, "i2v", DISTILLATION, images=str(tmp_path / "images")))
    (stream,) = run.faults.streams
    stream.faults.limit = 0.5
    with caplog.at_level(logging.WARNING):
        run.train()
    assert curve(tmp_path / "run")[-1]["corrupt_samples"] == len(stream.faults.reasons) == 1
    assert "a.safetensors, row 2: first_latents holds NaN or infinity" in caplog.text
