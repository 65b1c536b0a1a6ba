"""Runs that are given images and videos: given frames come back, and a clip of which nothing is kept has no effect."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from generation.command import inference_args
from generation.generator import Generator, Sampling
from generation.videos import generate_videos
from tests.nets import relative
from tests.small import DIFFUSION, DISTILLATION, merged, trainer
from utils.data.buckets import Size
from utils.data.clips import decode_end
from utils.data.media import Media, Part
from utils.data.stream import CorruptSample
from utils.errors import UserError
from utils.video import read_video, write_video

CPU = torch.device("cpu")
PROMPTS = ["the digit three moving left", "the digit seven moving up"]
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "causal": (DISTILLATION, {}),
    "causal_first": (DISTILLATION, {"causal": {"num_frame_per_block": 4, "independent_first_frame": True}}),
    "bidirectional": (DISTILLATION, {"rollout": {"kind": "backward_simulation"}}),
    "ti2v": (DISTILLATION, {"rollout": {"kind": "backward_simulation"}}),
    "teacher": (DIFFUSION, {"validation": {"steps": 4, "guidance": 2.0}}),
    "ti2v_teacher": (DIFFUSION, {"validation": {"steps": 4, "guidance": 2.0}}),
}


@pytest.fixture(scope="module")
def generators(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Generator]:
    """Of runs that learnt for a moment: their heads are no longer zero."""
    out = {}
    for name, (base, changes) in RUNS.items():
        path = tmp_path_factory.mktemp(name)
        changes = merged({"generator_training": {"optimizer": {"lr": 0.02}}}, changes)
        if name.startswith("ti2v"):
            overrides = {"overrides": {"model_type": "ti2v"}}
            changes |= {k: overrides for k in ("student", "teacher", "critic") if base[k] is not None}
        trainer(path, base, max_steps=3, **changes).train()
        out[name] = Generator.load(path, CPU, weights="raw")
    return out


def clip(generator: Generator, frames: int, seed: int = 3) -> Tensor:
    """Pixels [T, 3, 16, 16] of the toy world."""
    world = generator.task.world  # type: ignore[attr-defined]
    latents = torch.cat([world.batch([seed + i], "test").latents_BFCHW[0] for i in range(1 + frames // 9)])
    return world.decode(latents[None])[0, :frames]  # type: ignore[no-any-return]


# video to video


@pytest.mark.parametrize("name", ["causal", "bidirectional", "teacher", "ti2v"])
def test_strength_1_is_plain_generation_and_less_keeps_more(generators: dict[str, Generator], name: str) -> None:
    generator = generators[name]
    plain, pixels = generator(PROMPTS, Sampling(), [0, 1]), clip(generator, 9)
    start = generator.task.encode(pixels[None])
    made = {s: generator(PROMPTS, Sampling(strength=s), [0, 1], clip=pixels) for s in (1.0, 0.7, 0.3)}
    assert torch.equal(made[1.0], plain)
    assert not torch.allclose(made[0.7], plain, atol=1e-2)
    ids = range(16)  # of a hardly trained network: its videos differ more than its strengths
    many = [generator(PROMPTS * 8, Sampling(strength=s), ids, clip=pixels) for s in (1.0, 0.7, 0.3)]
    distance = [float((videos - start).square().mean()) for videos in many]
    assert distance[0] > distance[1] > distance[2]


def test_fewer_steps_are_made(generators: dict[str, Generator]) -> None:
    for name, steps in (("bidirectional", 2), ("teacher", 2), ("causal", 3 * 2 + 2)):
        generator = generators[name]
        before = generator.score.evaluations.calls.get("student", 0)
        generator(PROMPTS, Sampling(strength=0.67), [0, 1], clip=clip(generator, 9))
        assert generator.score.evaluations.calls["student"] - before == steps


def test_unipc_of_a_run(generators: dict[str, Generator]) -> None:
    """Of strength 1, all but a millionth of the clip is gone: UniPC's log-SNR has to be finite."""
    generator = generators["teacher"]
    plain = generator(PROMPTS, Sampling(solver="unipc"), [0, 1])
    made = generator(PROMPTS, Sampling(solver="unipc", strength=1.0), [0, 1], clip=clip(generator, 9))
    assert relative(made, plain) < 1e-4
    assert relative(plain, generator(PROMPTS, Sampling(), [0, 1])) > 1e-3


# given frames


@pytest.mark.parametrize("name", ["ti2v", "ti2v_teacher"])
@pytest.mark.parametrize("count", [1, 2])
def test_given_frames_are_pinned_and_steer_the_rest(generators: dict[str, Generator], name: str, count: int) -> None:
    generator = generators[name]
    first = clip(generator, count)
    pinned = generator.task.encode(first[None]).expand(2, -1, -1, -1, -1)
    made, other = (generator(PROMPTS, Sampling(), [0, 1], pixels) for pixels in (first, 1 - first))
    assert made.shape[1] == 9
    assert torch.equal(made[:, :count], pinned)
    assert not torch.allclose(made[:, count:], other[:, count:], atol=1e-3)
    assert not torch.equal(generator(PROMPTS, Sampling(), [0, 1])[:, :count], pinned)


@pytest.mark.parametrize(("name", "frames"), [("causal", 3), ("causal", 6), ("causal_first", 5)])
def test_a_causal_student_goes_on_from_whole_blocks(generators: dict[str, Generator], name: str, frames: int) -> None:
    """Given frames come back bit for bit, and the last of them counts, too."""
    generator = generators[name]
    first = clip(generator, frames)
    sampling = Sampling(frames=9 if name == "causal_first" else None)
    made = generator(PROMPTS, sampling, [0, 1], first)
    assert made.shape[1] == (9 if name == "causal_first" else 9 + frames)
    assert torch.equal(made[:, :frames], generator.task.encode(first[None]).expand(2, -1, -1, -1, -1))
    changed = torch.cat([first[:-1], 1 - first[-1:]])
    assert not torch.allclose(generator(PROMPTS, sampling, [0, 1], changed)[:, frames:], made[:, frames:], atol=1e-3)
    with pytest.raises(UserError, match=f"{frames - 1} initial latent frames do not end at a block"):
        generator(PROMPTS, Sampling(frames=9 if name == "causal_first" else 12), [0, 1], first[1:])


def test_each_network_goes_on_from_what_it_was_made_for(generators: dict[str, Generator]) -> None:
    found = {name: generator.context_frames for name, generator in generators.items()}
    assert found == {"causal": 3, "causal_first": 5, "bidirectional": 1, "ti2v": 1, "teacher": 1, "ti2v_teacher": 1}


def test_a_network_that_takes_nothing_says_so(generators: dict[str, Generator]) -> None:
    for name in ("bidirectional", "teacher"):
        with pytest.raises(UserError, match="a bidirectional network takes none unless it was made for it"):
            generators[name](PROMPTS, Sampling(), [0, 1], clip(generators[name], 1))
    for sampling, option in ((Sampling(solver="unipc"), "solver"), (Sampling(guidance_2=2.0), "guidance_2")):
        with pytest.raises(UserError, match=f"--{option}: a distilled student takes none"):
            generators["causal"](PROMPTS, sampling, [0, 1])
    for strength, pixels in ((0.5, None), (None, clip(generators["causal"], 9)), (0.0, clip(generators["causal"], 9))):
        with pytest.raises(UserError, match=r"--strength .*: give a clip and a share of the steps in \(0, 1\]"):
            generators["causal"](PROMPTS, Sampling(strength=strength), [0, 1], clip=pixels)
    with pytest.raises(UserError, match="--video: 8 latent frames for videos of 9: give as many"):
        generators["causal"](PROMPTS, Sampling(strength=0.5), [0, 1], clip=clip(generators["causal"], 8))


# files


def test_the_first_and_the_last_frames_of_a_file(tmp_path: Path) -> None:
    levels = torch.arange(20).view(20, 1, 1, 1) / 20
    write_video(tmp_path / "ramp.mp4", levels.expand(-1, 3, 16, 32), 8)
    media = Media("ramp", Part(tmp_path / "ramp.mp4"), None)
    for last, expected in ((False, levels[:7]), (True, levels[-7:])):
        made = decode_end(media, Size(7, 16, 16), last=last)
        assert made.shape == (7, 3, 16, 16)
        assert torch.allclose(made, expected.expand(-1, 3, 16, 16), atol=0.02)
    with pytest.raises(CorruptSample, match="ramp has 20 frames, 21 are needed: give a longer video"):
        decode_end(media, Size(21, 16, 16), last=True)


@pytest.mark.parametrize(
    ("name", "more", "frames"),
    [
        ("causal", ["--strength", "0.7"], 9),
        ("causal", ["--extend"], 12),
        ("causal", ["--extend", "6", "--frames", "9"], 9),
        ("ti2v", ["--extend", "2"], 9),
        ("bidirectional", ["--strength", "0.4"], 9),
    ],
)
def test_a_video_file_in_and_a_video_file_out(
    generators: dict[str, Generator], tmp_path: Path, name: str, more: list[str], frames: int
) -> None:
    generator, source, out = generators[name], tmp_path / "clip.mp4", tmp_path / "out.mp4"
    pixels = clip(generator, 12)
    write_video(source, pixels, 8)
    argv = ["--run", "x", "--prompt", PROMPTS[0], "--out", str(out), "--video", str(source), "--scale", "1", *more]
    assert generate_videos(generator, inference_args(argv)) == 0
    made = read_video(out)
    assert made.shape == (frames, 3, 16, 16)
    if "--extend" in more:  # the clip's last frames begin it
        count = int(more[1]) if len(more) > 1 and more[1].isdecimal() else 3
        assert float((made[:count] - pixels[-count:]).abs().mean()) < 0.03
        assert float((made[:count] - pixels[:count]).abs().mean()) > 0.03


def test_a_resumed_folder_was_made_from_the_same_footage(generators: dict[str, Generator], tmp_path: Path) -> None:
    generator = generators["causal"]
    (tmp_path / "prompts.txt").write_text(PROMPTS[0])
    write_video(tmp_path / "clip.mp4", clip(generator, 9), 8)
    argv = ["--run", "x", "--prompts", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "videos")]
    footage = ["--video", str(tmp_path / "clip.mp4")]
    generate_videos(generator, inference_args([*argv, *footage, "--strength", "0.7"]))
    with pytest.raises(UserError, match=r"made with other settings \(strength\)"):
        generate_videos(generator, inference_args([*argv, *footage, "--strength", "0.4"]))
    with pytest.raises(UserError, match=r"made with other settings \(extend, strength\)"):
        generate_videos(generator, inference_args([*argv, *footage, "--extend"]))
