"""Generation from runs: lengths, windows, first frames, step lists, resumable prompt files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from generation.acceleration import Acceleration
from generation.command import inference_args
from generation.generator import Generator
from generation.live import Live, Pace
from generation.places import slug
from generation.sampling import Sampling, StudentChoice
from generation.videos import Rate, check_out, generate_videos
from model.attention.captured import Captured
from model.attention.kv_cache import KVCache
from model.network import NetworkConfig
from model.wan.transformer import WanTransformer
from tests import forked
from tests.small import DIFFUSION, DISTILLATION, trainer
from tests.utils.test_writing import PLACES, a_folder, files_of_at_most, names
from trainer.run_networks import build_for_inference
from utils.errors import ConfigError, UserError
from utils.video import read_image, read_video, write_video

CPU = torch.device("cpu")
PROMPTS = ["the digit three moving left", "the digit seven moving up"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("student")
    trainer(path, DISTILLATION, max_steps=6, generator_training={"optimizer": {"lr": 0.02}}).train()
    return path


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("teacher")
    trainer(path, DIFFUSION, max_steps=2, validation={"steps": 3, "guidance": 2.0}).train()
    return path


def test_average_is_the_default_and_raw_weights_differ(run: Path) -> None:
    videos = {
        w: Generator.load(run, CPU, student=StudentChoice(w))(PROMPTS, Sampling(), [0, 1]) for w in ("ema", "raw")
    }
    assert videos["ema"].shape == (2, 9, 4, 8, 8)
    assert not torch.equal(videos["ema"], videos["raw"])


def test_a_video_does_not_depend_on_its_batch_and_depends_on_its_seed(run: Path) -> None:
    generator = Generator.load(run, CPU)
    both = generator(PROMPTS, Sampling(seed=5), [0, 1])
    alone = generator(PROMPTS[1:], Sampling(seed=5), [1])
    torch.testing.assert_close(both[1:], alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(alone, generator(PROMPTS[1:], Sampling(seed=6), [1]), atol=1e-2)


def test_blocks_arrive_one_by_one(run: Path) -> None:
    """After a block only its own evaluations are spent: 3 steps, and a cache pass of the block before it."""
    generator, spent, shapes = Generator.load(run, CPU), [], []
    for block in generator.stream(PROMPTS, Sampling(), [0, 1]):
        shapes.append(block.shape[1])
        spent.append(generator.score.evaluations.calls["student"])
    assert shapes == [3, 3, 3]
    assert spent == [3, 7, 11]


def test_longer_than_trained_with_a_window_costs_constant_memory(run: Path) -> None:
    generator = Generator.load(run, CPU)
    held = []
    new_cache = type(generator.score.net).new_cache

    def spy(net, spec, **options):  # type: ignore[no-untyped-def]
        held.append(spec.context_frames)
        return new_cache(net, spec, **options)

    type(generator.score.net).new_cache = spy  # type: ignore[method-assign]
    try:
        for frames in (18, 60):
            assert generator(PROMPTS, Sampling(frames=frames, window=9, sinks=3), [0, 1]).shape[1] == frames
        assert generator(PROMPTS, Sampling(frames=18), [0, 1]).shape[1] == 18
    finally:
        type(generator.score.net).new_cache = new_cache  # type: ignore[method-assign]
    assert held == [6, 6, 15]


def test_a_longer_video_begins_like_a_shorter_one(run: Path) -> None:
    generator = Generator.load(run, CPU)
    short, long = (generator(PROMPTS, Sampling(frames=frames), [0, 1]) for frames in (9, 18))
    torch.testing.assert_close(short, long[:, :9], rtol=1e-4, atol=1e-5)


def test_first_frame_is_kept_and_steers_the_rest(run: Path) -> None:
    generator = Generator.load(run, CPU)
    world = generator.task.world
    frame = world.decode(world.batch([3], "test").latents_BFCHW)[0, :1]
    video = generator(PROMPTS, Sampling(), [0, 1], frame)
    assert video.shape[1] == 10  # the given frame, then three blocks
    torch.testing.assert_close(world.decode(video)[:, :1], frame[None].expand(2, -1, -1, -1, -1), atol=1e-5, rtol=0)
    other = generator(PROMPTS, Sampling(), [0, 1], 1 - frame)
    assert not torch.allclose(video[:, 1:], other[:, 1:], atol=1e-3)


@pytest.mark.parametrize(("steps", "expected"), [(1, (1.0,)), (2, (1.0, 0.9)), (3, (1.0, 0.9, 0.75))])
def test_fewer_steps_are_a_choice_among_the_trained_ones(run: Path, steps: int, expected: tuple[float, ...]) -> None:
    assert Generator.load(run, CPU).step_list(steps) == pytest.approx(expected, abs=1e-6)


def test_teacher_takes_as_many_steps_as_asked(teacher: Path) -> None:
    generator = Generator.load(teacher, CPU)
    for steps in (1, 5):
        before = generator.score.evaluations.total_frames
        generator(PROMPTS, Sampling(steps=steps), [0, 1])
        assert (
            generator.score.evaluations.total_frames - before == steps * 2 * 2 * 9
        )  # steps x guidance x batch x frames


def test_options_that_would_be_ignored_are_refused(run: Path, teacher: Path) -> None:
    with pytest.raises(UserError, match="--guidance: a causal student takes none"):
        Generator.load(run, CPU)(PROMPTS, Sampling(guidance=2.0), [0, 1])
    with pytest.raises(UserError, match="--sinks 3: without a window"):
        Generator.load(run, CPU)(PROMPTS, Sampling(sinks=3), [0, 1])
    for sampling, image in ((Sampling(window=9), None), (Sampling(), torch.zeros(1, 3, 16, 16))):
        with pytest.raises(UserError, match="a bidirectional network takes none"):
            Generator.load(teacher, CPU)(PROMPTS, sampling, [0, 1], image)
    with pytest.raises(UserError, match="--steps 0"):
        Generator.load(teacher, CPU)(PROMPTS, Sampling(steps=0), [0, 1])


@pytest.mark.parametrize("prompt", ["a cat", "the digit eleven moving left"])
def test_a_prompt_that_cannot_be_encoded_is_one_line(run: Path, prompt: str) -> None:
    with pytest.raises(UserError) as caught:
        Generator.load(run, CPU)([prompt], Sampling(), [0])
    assert "\n" not in str(caught.value)


def test_first_frame_of_a_student_with_an_independent_first_frame(tmp_path: Path) -> None:
    trainer(tmp_path, causal={"num_frame_per_block": 4, "independent_first_frame": True}, max_steps=2).train()
    assert Generator.load(tmp_path, CPU)(PROMPTS, Sampling(), [0, 1], torch.zeros(1, 3, 16, 16)).shape[1] == 9


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        (Sampling(frames=10), "10 latent frames are not whole blocks of 3: use 9 or 12"),
        (Sampling(steps=5), "this student has 3 steps"),
        (Sampling(window=2), "window of 2"),
    ],
)
def test_impossible_requests_are_refused(run: Path, sampling: Sampling, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Generator.load(run, CPU)(PROMPTS, sampling, [0, 1])


def test_prompt_file_is_resumed(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    out = tmp_path / "videos"
    command = ["--run", str(run), "--prompts", str(prompts), "--out", str(out), "--batch", "1", "--scale", "2"]
    args = inference_args(command)
    generator = Generator.load(run, CPU)
    assert generate_videos(generator, args) == 0
    made = sorted(out.glob("*.mp4"))
    assert [p.name for p in made] == [f"{i:04d}_{slug(p)}.mp4" for i, p in enumerate(PROMPTS)]
    assert read_video(made[0]).shape == (9, 3, 32, 32)
    stamps = made[0].stat().st_mtime_ns
    before = read_video(made[1])
    made[1].unlink()
    generate_videos(generator, args)
    assert "1 of 2 videos are there already" in capsys.readouterr().out
    assert made[0].stat().st_mtime_ns == stamps
    # the encoder, not the sampler, varies in its last bits from call to call
    assert (read_video(made[1]) - before).abs().mean() < 0.02
    with pytest.raises(UserError, match=r"made with other settings \(seed\)"):
        generate_videos(generator, inference_args([*command, "--seed", "5"]))
    (folder,) = generator.checkpoints
    generator.checkpoints = (folder.replace("6", "7"),)  # training went on meanwhile
    with pytest.raises(UserError, match=r"made with other settings \(source\): .* or their --checkpoint \(in .*json"):
        generate_videos(generator, args)
    others = [out / ".0001_x.123.mp4", made[1].with_name(f".{made[1].stem}.old.mp4")]
    for file in (*others, made[1].with_name(f".{made[1].stem}.123.mp4")):  # the last of a process that was killed
        file.touch()
    made[1].unlink()
    pinned = inference_args(["--checkpoint", folder, *command[2:]])
    assert generate_videos(Generator.load(pinned.source, CPU), pinned) == 0  # type: ignore[arg-type]
    assert sorted(out.glob(".*")) == sorted(others)
    assert made[1].is_file()


def test_a_file_of_one_prompt_fills_a_folder_whatever_its_name(run: Path, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text(PROMPTS[0])
    out = tmp_path / "v1.0"
    args = inference_args(["--run", str(run), "--prompts", str(tmp_path / "one.txt"), "--out", str(out)])
    generate_videos(Generator.load(run, CPU), args)
    assert [path.name for path in out.glob("*.mp4")] == [f"0000_{slug(PROMPTS[0])}.mp4"]


def test_a_batch_is_written_as_each_video_alone(run: Path, tmp_path: Path) -> None:
    """Held as 8 bits, or written block by block: the same pixels."""
    generator, prompts = Generator.load(run, CPU), tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    for batch in ("1", "2"):
        out = ["--out", str(tmp_path / batch), "--batch", batch, "--format", "png"]
        generate_videos(generator, inference_args(["--run", str(run), "--prompts", str(prompts), *out]))
    for alone, both in zip(*(sorted((tmp_path / batch).glob("*.png")) for batch in ("1", "2")), strict=True):
        assert (read_image(alone) - read_image(both)).abs().max() <= 1.01 / 255


def test_rates_of_first_parts_and_later_ones_are_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that is read in turn: the start, two videos of three parts each, the end."""
    moments = iter([0.0, 5.0, 6.0, 8.0, 20.0, 21.0, 22.0, 24.0])
    monkeypatch.setattr("generation.videos.time.perf_counter", lambda: next(moments))
    rate, part = Rate(), torch.zeros(2, 3)  # two videos, three frames of each
    for _ in range(2):
        assert len(list(rate.follow([part] * 3))) == 3
    assert rate.frames == 36
    assert rate.told(36) == "in 24.0 s (1.5 frames/s; the first after 5.00 s, 4.8 frames/s once videos have begun)"


@pytest.mark.parametrize("suffix", ["mp4", "gif", "png"])
def test_one_prompt_to_one_file_of_each_format(
    run: Path, tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    args = inference_args(["--run", str(run), "--prompt", PROMPTS[0], "--out", str(tmp_path / f"v.{suffix}")])
    generate_videos(Generator.load(run, CPU), args)
    assert "there already" not in capsys.readouterr().out
    if suffix == "gif":
        generate_videos(Generator.load(run, CPU), args)
        assert f"{tmp_path}/v.gif is there already: it is made again" in capsys.readouterr().out
    assert (tmp_path / f"v.{suffix}").stat().st_size > 100


def latents_of(out: Path) -> dict[str, Tensor]:
    return {path.name: load_file(path)["latents"] for path in sorted(out.glob("*.safetensors"))}


@pytest.mark.parametrize("ranks", [["2"], ["2", "--sequence_parallel", "2"], ["3"]])
def test_any_number_of_processes_makes_the_same_videos(run: Path, tmp_path: Path, ranks: list[str]) -> None:
    """Prompts are shared out, or each video's tokens are; three ranks for two prompts leave one without work."""
    prompts, number, sharing = tmp_path / "prompts.txt", int(ranks[0]), ranks[1:]
    prompts.write_text("\n".join(PROMPTS))
    command = ["--run", str(run), "--prompts", str(prompts), "--format", "safetensors", "--batch", "1"]
    shared = forked.run(number, "inference.py", *command, "--out", str(tmp_path / "shared"), *sharing)
    assert shared.returncode == 0, shared.stderr
    assert shared.stdout.count("2 videos, 18 latent frames") == 1
    found, expected = latents_of(tmp_path / "shared"), Generator.load(run, CPU)(PROMPTS, Sampling(), [0, 1])
    assert list(found) == [f"{i:04d}_{slug(p)}.safetensors" for i, p in enumerate(PROMPTS)]
    torch.testing.assert_close(torch.stack(list(found.values())), expected, rtol=1e-4, atol=1e-5)


def test_groups_that_do_not_fit_are_refused(run: Path, tmp_path: Path) -> None:
    command = ["--run", str(run), "--prompt", PROMPTS[0], "--out", str(tmp_path / "v.mp4"), "--sequence_parallel", "2"]
    with pytest.raises(UserError, match="--sequence_parallel 2: 1 processes do not fall into groups of so many"):
        generate_videos(Generator.load(run, CPU), inference_args(command))


def test_blocks_of_their_own_steps_and_noisy_context(run: Path) -> None:
    generator = Generator.load(run, CPU)
    calls = generator.score.evaluations.calls
    for sampling, spent in (
        (Sampling(block_steps=(3, 1)), 3 + 1 + 1 + 1 + 1),
        (Sampling(noisy_context=True), 9),
        (Sampling(), 11),
    ):
        before = calls.get("student", 0)
        generator(PROMPTS, sampling, [0, 1])
        assert calls["student"] - before == spent
    first, other = (generator(PROMPTS, Sampling(block_steps=b), [0, 1]) for b in ((3, 3, 1), (3, 3, 3)))
    assert torch.equal(first[:, :6], other[:, :6])
    assert not torch.allclose(first, other, atol=1e-3)
    args = inference_args(["--run", "x", "--prompt", "y", "--block_steps", "4,2", "--noisy_context"])
    assert (args.sampling.block_steps, args.sampling.noisy_context) == ((4, 2), True)


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        (Sampling(block_steps=(3,), steps=3), "--block_steps names the steps of every block"),
        (Sampling(block_steps=(4,)), "--block_steps: 4: this student has 3 steps"),
    ],
)
def test_steps_that_make_no_sense_are_refused(run: Path, sampling: Sampling, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Generator.load(run, CPU)(PROMPTS, sampling, [0, 1])


def test_a_teacher_has_no_blocks(teacher: Path) -> None:
    generator = Generator.load(teacher, CPU)
    for sampling in (Sampling(block_steps=(2,)), Sampling(noisy_context=True)):
        with pytest.raises(UserError, match="a bidirectional network takes none: use a causal student"):
            generator(PROMPTS, sampling, [0, 1])
    with pytest.raises(UserError, match="a video without end needs a causal student"):
        generator.endless(PROMPTS, Sampling(), [0, 1])


def test_endless_begins_as_a_video_with_an_end(run: Path) -> None:
    generator = Generator.load(run, CPU)
    video = generator.endless(PROMPTS, Sampling(seed=4, window=9, sinks=3), [0, 1])
    blocks = [video.make(video.noise(generator.task.latent_shape[1:])) for _ in range(10)]
    ended = generator(PROMPTS, Sampling(seed=4, window=9, sinks=3, frames=30), [0, 1])
    torch.testing.assert_close(torch.cat(blocks, 1), ended, rtol=1e-4, atol=1e-5)
    assert video.cache.held_frames == 6
    assert video.cache.in_time == [*range(21, 27)]
    trained = generator.endless(PROMPTS, Sampling(), [0, 1])  # its window is then as long as its training
    assert trained.causal.window_frames == 9


def recording(run: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Generator, list[Captured]]:
    """A generator whose passes are recorded as on CUDA, and what has been recorded."""
    generator, recorded = Generator.load(run, CPU), []
    generator.acceleration = Acceleration()
    monkeypatch.setattr(Acceleration, "records", lambda self, device: self is generator.acceleration)

    def captured(net: WanTransformer, cache: KVCache) -> Captured:
        recorded.append(Captured(net, cache, lambda run: run))
        return recorded[-1]

    monkeypatch.setattr("pipeline.sampling.Captured", captured)
    return generator, recorded


def test_a_recorded_video_leaves_its_recordings_to_the_next(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA: of one geometry nothing is recorded twice, and what an open video uses is nobody else's."""
    plain, (generator, recorded) = Generator.load(run, CPU), recording(run, monkeypatch)
    for seed, batch in ((0, [0, 1]), (1, [0, 1]), (2, [0]), (3, [0])):
        prompts = PROMPTS[: len(batch)]
        made = generator(prompts, Sampling(seed=seed), batch)
        torch.testing.assert_close(made, plain(prompts, Sampling(seed=seed), batch), rtol=1e-4, atol=1e-5)
    assert len(recorded) == 2
    assert all(len(student.recorded) == 3 for student in recorded)
    both = zip(*(generator.stream(PROMPTS, Sampling(seed=s), [0, 1]) for s in (4, 5)), strict=True)
    for seed, parts in zip((4, 5), zip(*both, strict=True), strict=True):
        expected = plain(PROMPTS, Sampling(seed=seed), [0, 1])
        torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-4, atol=1e-5)


def test_visitors_who_come_later_find_what_earlier_ones_recorded(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two at once have a recording each; a third records nothing, and sees nothing of theirs."""
    plain, (generator, recorded) = Generator.load(run, CPU), recording(run, monkeypatch)
    first, second = (Live(generator, PROMPTS[0], Sampling(seed=seed)) for seed in (0, 1))
    for _ in range(5):
        shown = [first.next_frames(), second.next_frames()]
    assert len(recorded) == 2
    assert not torch.allclose(*shown, atol=1e-3)
    for live in (first, second):
        live.close()
    third, expected = (Live(source, PROMPTS[1], Sampling(seed=2)) for source in (generator, plain))
    for _ in range(5):
        torch.testing.assert_close(third.next_frames(), expected.next_frames(), rtol=1e-4, atol=1e-5)
    assert len(recorded) == 2
    assert all(len(student.recorded) == 3 for student in recorded)


def test_size_of_a_run(run: Path, tmp_path: Path) -> None:
    generator = Generator.load(run, CPU, size=(24, 24))
    assert generator(PROMPTS, Sampling(), [0, 1]).shape == (2, 9, 4, 12, 12)
    for size, message in (((24, 16), "the toy world is square"), ((10, 10), "canvas must be a multiple of 4")):
        with pytest.raises(UserError, match=f"--size {size[0]}x{size[1]}: .*{message}"):
            Generator.load(run, CPU, size=size)


def test_each_expert_has_its_strength() -> None:
    command = ["--model", "m", "--prompt", "p", "--out", "o", "--steps", "4"]
    loras = ["--lora", "h.safetensors", "--low_lora", "l.safetensors"]
    for text, expected in {"3.0,1.5": (3.0, 1.5), "0.5": (0.5, 0.5)}.items():
        args = inference_args([*command, *loras, "--lora_scale", text])
        assert (args.loras[0].scale, args.low_loras[0].scale) == expected
    with pytest.raises(UserError, match="two strengths are for two experts"):
        inference_args([*command, *loras[:2], "--lora_scale", "3,1.5"])
    for wrong in ("a", "1,2,3", "nan,1", ""):
        with pytest.raises(UserError, match="--lora_scale"):
            inference_args([*command, *loras, "--lora_scale", wrong])


def test_a_lora_scale_needs_an_adapter(run: Path) -> None:
    with pytest.raises(UserError, match="--lora_scale 0.5: this run trained no adapter"):
        Generator.load(run, CPU, student=StudentChoice(lora_scale=0.5))
    with pytest.raises(ValueError, match="init_lora_scale is of an adapter in init, which is null"):
        NetworkConfig(init_lora_scale=0.5)
    with pytest.raises(ConfigError, match="this is no run: leave it 1"):
        build_for_inference(NetworkConfig(init="weights.safetensors", init_lora_scale=0.5), "student", CPU, None)


def test_live_is_what_endless_makes_and_measures_its_pace(run: Path) -> None:
    generator = Generator.load(run, CPU)
    live = Live(generator, PROMPTS[0], Sampling(seed=2, window=9), number=7)
    assert live.pace == Pace()
    shown = [live.next_frames() for _ in range(2)]
    assert live.pace.frames == 6
    assert live.pace.first is not None
    assert live.pace.fps is not None
    live.switch(PROMPTS[1])
    assert live.prompt == PROMPTS[0]  # of what has been shown
    with pytest.raises(UserError, match="cannot read caption|unknown word|no embedding"):
        live.switch("a cat in the rain")
    shown.append(live.next_frames())
    assert live.prompt == PROMPTS[1]
    video = generator.endless(PROMPTS[:1], Sampling(seed=2, window=9), [7])
    frame = generator.task.latent_shape[1:]
    expected = [video.make(video.noise(frame)) for _ in range(2)]
    video.switch(generator.task.conditioning(PROMPTS[1:]).prompt["text"])
    expected.append(video.make(video.noise(frame)))
    assert torch.equal(torch.cat(shown), generator.task.decode(torch.cat(expected, 1))[0])


def test_what_a_cpu_cannot_speed_up_is_refused(run: Path) -> None:
    for wanted, message in (
        (Acceleration(fp8=True), "--fp8 needs an NVIDIA GPU of compute capability 8.9"),
        (Acceleration(graphs=True), "recorded passes need CUDA"),
    ):
        with pytest.raises(UserError, match=message):
            Generator.load(run, CPU, acceleration=wanted)


def test_image_option_reads_a_file(run: Path, tmp_path: Path) -> None:
    write_video(tmp_path / "first.png", torch.rand(1, 3, 16, 16), 8)
    out = tmp_path / "v.mp4"
    args = inference_args(
        ["--run", str(run), "--prompt", PROMPTS[0], "--image", str(tmp_path / "first.png"), "--out", str(out)]
    )
    generate_videos(Generator.load(run, CPU), args)
    assert read_video(out).shape[0] == 10


def test_bad_runs_are_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint in") as caught:
        Generator.load(tmp_path / "nothing", CPU)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="--out x.avi: unknown format"):
        inference_args(["--run", "x", "--prompt", "y", "--out", "x.avi"])


# ------------------------------------------------------------------------------------------------- a disk that refuses


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".png", ".safetensors", ""])
@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
def test_a_place_that_takes_no_video_is_refused_before_a_network_is_loaded(
    place: Callable[[Path], Path], suffix: str, tmp_path: Path
) -> None:
    (tmp_path / "disk").mkdir()
    out = place(tmp_path / "disk")
    if suffix and place is a_folder:
        out = out.rename(out.with_suffix(suffix))
    elif suffix:
        out = out.with_name(out.name + suffix)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    text = ["--prompt", PROMPTS[0]] if suffix else ["--prompts", str(prompts)]
    args, before = inference_args(["--run", "absent", *text, "--out", str(out)]), names(tmp_path)
    if not suffix and place is a_folder:
        return check_out(args)  # it takes many
    with pytest.raises(UserError, match="^--out .* could not be written: .*: give another place$"):
        check_out(args)
    assert names(tmp_path) == before


@pytest.mark.parametrize("suffix", ["mp4", "gif", "png", "safetensors"])
def test_a_disk_that_fills_ends_it_in_one_line_and_leaves_no_half_video(run: Path, tmp_path: Path, suffix: str) -> None:
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("\n".join(PROMPTS))
    command = ["--run", str(run), "--prompts", str(prompts), "--out", str(out), "--format", suffix, "--batch", "2"]
    args, generator = inference_args(command), Generator.load(run, CPU)
    with (
        files_of_at_most(1500),
        pytest.raises(UserError, match=rf"0000_[\w-]*\.{suffix} could not be written: .*: free"),
    ):
        generate_videos(generator, args)
    assert names(out) == ["settings.json"]
    assert generate_videos(generator, args) == 0  # with room it goes on
    whole = {path.name: path.read_bytes() for path in out.iterdir()}
    assert len(whole) == 3
    next(out.glob("0001*")).unlink()
    with files_of_at_most(1500), pytest.raises(UserError, match=r"0001_.* could not be written"):
        generate_videos(generator, args)
    assert names(out) == [name for name in sorted(whole) if not name.startswith("0001")]
    assert all((out / name).read_bytes() == whole[name] for name in names(out))
