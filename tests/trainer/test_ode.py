"""ODE pairs: what the teacher's sampler passes through, for each position the same in any batch, counted once."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.nets import relative
from tests.small import DIFFUSION, ODE, save_networks, trainer, with_weights
from trainer.ode import ODETrainer
from utils.data.safetensors_shards import write_trajectories
from utils.errors import ConfigError
from utils.parallel.mesh import Mesh
from utils.random import Noise, keyed_seed

PAIRS, STEPS, SHIFT, GUIDANCE = 6, 6, 3.0, 2.0  # as tests.small.ODE has them


def made(path: Path, size: int = 4) -> ODETrainer:
    save_networks(path / "start")
    training = {"global_batch_size": 4, "micro_batch_size": size, "max_steps": 1}
    run = trainer(path, with_weights(ODE, path / "start"), training=training)
    assert isinstance(run, ODETrainer)
    return run


@torch.no_grad()
def by_hand(run: ODETrainer, position: int) -> list[Tensor]:
    """One video by Euler steps of uncond + w (cond - uncond) from its own noise: states [1, F, C, H, W] at each level."""
    levels = [SHIFT * u / (1 + (SHIFT - 1) * u) for u in (1 - i / STEPS for i in range(STEPS + 1))]
    noise = Noise(keyed_seed(run.config.seed, "ode_pairs"), 0, [position])
    text = run.task.conditioning(run.task.prompts(range(position, position + 1))).prompt["text"]
    states = [noise.normal("noise", run.task.latent_shape)]
    for sigma, target in itertools.pairwise(levels):
        cond, uncond = (
            run.teacher.net(states[-1], torch.tensor([sigma]), t) for t in (text, run.task.negative(1)["text"])
        )
        states.append(states[-1] + (target - sigma) * (uncond + GUIDANCE * (cond - uncond)))
    return states


@pytest.mark.parametrize("size", [4, 1])
def test_pairs_are_the_samplers_states_whatever_the_micro_batch(size: int, tmp_path: Path) -> None:
    run = made(tmp_path, size)
    assert run.trajectories.shape == (PAIRS, 4, *run.task.latent_shape)
    # the nearest of the sampler's levels, 1, 15/16, 6/7, 3/4, ..., to the student's: 1, 0.9, 0.75
    for position in range(PAIRS):
        states = by_hand(run, position)
        nearest = [states[index] for index in (0, 1, 3, STEPS)]
        assert relative(run.trajectories[position], torch.cat(nearest)) < 2e-6
        assert relative(run.trajectories[position, 0], run.trajectories[position, -1]) > 0.1
    assert run.evaluations.frames["teacher"] == PAIRS * STEPS * 2 * run.task.latent_shape[0]


@torch.no_grad()
def causal_by_hand(run: ODETrainer, position: int) -> Tensor:
    """Block by block without a cache: each step is a masked pass over the finished blocks, clean, and the block's own
    state; states [1, S, F, C, H, W] at the levels that are kept."""
    levels = [SHIFT * u / (1 + (SHIFT - 1) * u) for u in (1 - i / STEPS for i in range(STEPS + 1))]
    noise = Noise(keyed_seed(run.config.seed, "ode_pairs"), 0, [position]).normal("noise", run.task.latent_shape)
    text = run.task.conditioning(run.task.prompts(range(position, position + 1))).prompt["text"]
    done, parts = noise[:, :0], []
    for part in noise.split(3, 1):
        states, start = [part], done.shape[1]
        mask = run.config.causal.mask(start + 3)
        for sigma, target in itertools.pairwise(levels):
            time = torch.cat([torch.zeros(1, start), torch.full((1, 3), sigma)], 1)
            seen = torch.cat([done, states[-1]], 1)
            cond, uncond = (
                run.teacher.net(seen, time, t, mask=mask)[:, start:] for t in (text, run.task.negative(1)["text"])
            )
            states.append(states[-1] + (target - sigma) * (uncond + GUIDANCE * (cond - uncond)))
        done = torch.cat([done, states[-1]], 1)
        parts.append(torch.stack([states[index] for index in (0, 1, 3, STEPS)], 1))
    return torch.cat(parts, 2)


def test_pairs_of_a_causal_teacher_are_each_blocks_own_and_the_student_sees_their_ends(tmp_path: Path) -> None:
    """Causal Forcing: a trajectory given the clean blocks before it, regressed on with those same blocks in view."""
    save_networks(tmp_path / "start")
    training = {"global_batch_size": 4, "micro_batch_size": 4, "max_steps": 1}
    base = with_weights(ODE, tmp_path / "start")
    run = trainer(tmp_path, base, training=training, ode={"causal_teacher": True})
    assert isinstance(run, ODETrainer)
    for position in range(2):
        assert relative(run.trajectories[position], causal_by_hand(run, position)) < 5e-6
    assert run.evaluations.frames["teacher"] == PAIRS * 2 * (STEPS * 9 + 6)  # the last block writes no context

    micro = run.batch("ode")[0]
    (picked,) = {tuple(micro.positions)}
    x = run.trajectories[[p % PAIRS for p in picked]]
    index = (micro.noise.uniform("stored_index", (3,)) * 3).long()  # never the clean end
    text = run.task.conditioning(run.task.prompts(range(4))).prompt["text"]
    net, total = run.networks["student"].net, 0.0
    for block in range(3):  # each alone, after the clean ends before it
        frames, clean = slice(3 * block, 3 * block + 3), x[:, -1, : 3 * block]
        noisy = torch.stack([x[b, index[b, block], frames] for b in range(4)])
        sigma = run.sigmas_S[index[:, block]][:, None].expand(4, 3)
        time = torch.cat([torch.zeros(4, 3 * block), sigma], 1)
        velocity = net(torch.cat([clean, noisy], 1), time, text, mask=run.config.causal.mask(3 * block + 3))
        predicted = noisy - sigma[..., None, None, None] * velocity[:, 3 * block :]
        total += (predicted - x[:, -1, frames]).square().mean().item() / 3
    assert run.loss(micro).loss.item() == pytest.approx(total, rel=1e-5)


def test_pairs_made_again_after_a_resume_are_not_counted_again(tmp_path: Path) -> None:
    run = made(tmp_path)
    run.train()
    counted = run.summed_evaluations()
    next(tmp_path.glob("ode_pairs_*")).unlink()
    again = made(tmp_path)
    assert again.summed_evaluations() == counted
    again.mesh = Mesh(shard=2, rank=1)
    again._resume()
    assert again.evaluations.total_frames == 0  # the first rank has it all


def test_stored_pairs_train_alike_and_need_no_teacher(tmp_path: Path) -> None:
    """The same trajectories from a folder of shards, in the folder's order: the loss of the pairs that were made."""
    run = made(tmp_path / "made", size=1)
    prompts = [prompt for i in range(PAIRS) for prompt in run.task.prompts(range(i, i + 1))]
    folder = tmp_path / "pairs"
    folder.mkdir()
    write_trajectories(folder / "pairs.safetensors", run.trajectories, run.sigmas_S, prompts)
    save_networks(tmp_path / "start")
    training = {"global_batch_size": 4, "micro_batch_size": 1, "max_steps": 1}
    base = with_weights(ODE, tmp_path / "start") | {"teacher": None}
    other = trainer(tmp_path / "stored", base, training=training, ode={"path": str(folder)})
    assert isinstance(other, ODETrainer)
    assert other.stored is not None
    assert torch.equal(other.sigmas_S, run.sigmas_S)
    by_caption = dict(zip(prompts, run.trajectories, strict=True))
    seen = []
    for micro in run.batch("ode") + other.batch("ode"):
        pairs = other.stored.read(micro.positions)
        (caption,) = pairs.captions
        assert torch.equal(pairs.trajectory[0], by_caption[caption])
        seen.append(caption)
    assert len(set(seen[:4])) == 4  # no pair twice in an epoch
    assert other.train() == 0


def test_stored_pairs_of_another_size_are_refused(tmp_path: Path) -> None:
    (tmp_path / "pairs").mkdir()
    x = torch.randn(2, 3, 4, 8, 8)
    write_trajectories(tmp_path / "pairs/a.safetensors", x[None], torch.tensor([1.0, 0.0]), ["a"])
    with pytest.raises(ConfigError, match=r"ode.path: .* holds latents of \[3, 4, 8, 8\] and this run makes"):
        trainer(tmp_path / "run", ODE, ode={"path": str(tmp_path / "pairs")})


def test_steps_that_are_not_stored_are_refused(tmp_path: Path) -> None:
    """All of the student's noise levels must be there, as near as the teacher's grid comes; a file may hold more."""

    def started(levels: list[float]) -> ODETrainer:
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        x = torch.randn(1, len(levels), *shape)
        write_trajectories(folder / "a.safetensors", x, torch.tensor(levels), caption)
        run = trainer(tmp_path / "run", ODE, ode={"path": str(folder)})
        assert isinstance(run, ODETrainer)
        return run

    plain = trainer(tmp_path / "plain", DIFFUSION)
    shape, caption = plain.task.latent_shape, plain.task.prompts(range(1))
    # wanted are 1, 0.9, 0.75; of the teacher's grid 15/16 is the nearest to 0.9
    for levels in ([1.0, 0.9, 0.75, 0.0], [1.0, 15 / 16, 0.75, 0.0], [1.0, 0.95, 0.9, 0.8, 0.75, 0.4, 0.0]):
        assert started(levels).loss(plain.batch("ode")[0]).loss > 0
    for levels, lacking in (([1.0, 0.96, 0.75, 0.0], "0.9"), ([1.0, 0.9, 0.0], "0.75"), ([0.9, 0.0], "1, 0.75")):
        stored = ", ".join(f"{level:.4g}" for level in levels)
        with pytest.raises(ConfigError, match=f"stores the noise levels {stored}, and not {lacking} of") as caught:
            started(levels)
        assert "\n" not in str(caught.value)


def test_trajectories_of_unknown_captions_are_refused(tmp_path: Path) -> None:
    plain = trainer(tmp_path / "plain", DIFFUSION)
    x = torch.randn(2, 4, *plain.task.latent_shape)
    captions = [*plain.task.prompts(range(1)), "one zebra"]
    (tmp_path / "pairs").mkdir()
    write_trajectories(tmp_path / "pairs/a.safetensors", x, torch.tensor([1.0, 0.9, 0.75, 0.0]), captions)
    with pytest.raises(ConfigError, match="ode.path: prompt 'one zebra': unknown word 'zebra'"):
        trainer(tmp_path / "run", ODE, ode={"path": str(tmp_path / "pairs")})
