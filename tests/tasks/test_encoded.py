"""Wan's task end to end: a tiny pipeline's encoder and VAE, a cache in the encoder's place, training, MP4 files."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from configs.schema import RunConfig
from evaluation.fid_suite import FidArgs, evaluate_fid
from generation.command import inference_args, open_generator
from generation.generator import Generator
from generation.preprocess_text import preprocess_text
from generation.videos import generate_videos
from model.codec import VAEConfig
from model.text_encoder import TextEncoder, toy_text_encoder
from model.wan import text_encoder as umt5
from model.wan.codecs import WanCodecs
from model.wan.config import WanConfig
from model.wan.image_encoder import image_channels, load_image_encoder
from model.wan.text_encoder import load_text_encoder
from model.wan.vae import load_vae
from planning.files import check_files
from planning.launch import Recipe
from scripts.tiny_models import save_image_encoder, save_text_encoder, small_transformer, small_vae
from tasks.build import build_task, task_to_sample
from tasks.fitting import fitting_vae, statistics_of
from tasks.kinds.encoded import EncodedTask
from tasks.task import for_each
from tasks.text import prompt_encoder, warn_once
from tests.evaluation.test_evaluation import save_encoder
from tests.small import DISTILLATION, NETWORKS, config, merged, trainer
from utils.config import to_yaml
from utils.data.buckets import Size
from utils.data.safetensors_shards import write_latents, write_trajectories
from utils.data.stream import Sample
from utils.errors import ConfigError, UserError
from utils.logging import read_jsonl
from utils.random import Noise
from utils.video import read_video, write_video

CPU = torch.device("cpu")
PROMPTS = ["a cat on a mat", "a hat on a cat", "a mat"]
NEGATIVE = "no cat"
NETWORK = {"overrides": {"in_dim": 16, "out_dim": 16, "text_dim": 32, "text_len": 8}}

TEACHER: dict[str, Any] = {
    "trainer": "diffusion", "teacher": None, "critic": None,
    "diffusion": {"dropped_caption": "negative"},  # which the cache holds
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline's folder, prompts, and a finished cache."""
    root = tmp_path_factory.mktemp("wan")
    text = toy_text_encoder([*PROMPTS, NEGATIVE], 8, 32, seed=0)
    save_text_encoder(root / "pipeline", text)
    small_vae("2.1").save_pretrained(root / "pipeline/vae")
    (root / "prompts.txt").write_text("\n".join([*PROMPTS, PROMPTS[0]]))
    (root / "run.yaml").write_text(to_yaml(run(root, encoder=True)))
    argv = [
        "--config_path",
        str(root / "run.yaml"),
        "--prompts",
        str(root / "prompts.txt"),
        "--out",
        str(root / "text"),
    ]
    assert preprocess_text(argv) == 0
    assert preprocess_text([*argv, "--check"]) == 0
    return root


def test_processes_of_one_part_of_an_array_share_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["--config_path", str(folder / "run.yaml"), "--prompts", str(folder / "prompts.txt"), "--out", str(tmp_path)]
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert preprocess_text([*argv, "--shard", "1/2"]) == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == [f"shard_0000{i}_of_00004.safetensors" for i in (2, 3)]


def run(root: Path, *, encoder: bool = False, cache: bool = False, **changes: Any) -> RunConfig:
    return config(base(root, encoder=encoder, cache=cache), **changes)


def base(root: Path, *, encoder: bool = False, cache: bool = True) -> dict[str, Any]:
    text = {"encoder": str(root / "pipeline") if encoder else None, "cache": str(root / "text") if cache else None}
    data = {
        **{"kind": "wan", "prompts": str(root / "prompts.txt"), "negative_prompt": NEGATIVE},
        **{"wan": {"frames": 3, "height": 4, "width": 4}, "text": {**text, "dtype": "fp32"}},
        "vae": {"path": str(root / "pipeline"), "dtype": "fp32"},
    }
    networks = dict.fromkeys(("student", "teacher", "critic"), NETWORK)
    return merged(DISTILLATION, {"data": data, "causal": {"num_frame_per_block": 1}, **networks})


def test_the_cache_is_the_encoder_bit_for_bit_and_the_encoder_is_not_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = load_text_encoder(folder / "pipeline", 8, dtype=torch.float32).encode([*PROMPTS, NEGATIVE])
    live = build_task(run(folder, encoder=True), CPU)
    assert torch.equal(live.conditioning(PROMPTS).prompt["text"], expected[:3])

    def never(*_: object, **__: object) -> None:
        raise AssertionError("the encoder was loaded")

    monkeypatch.setattr(umt5, "load_text_encoder", never)
    for encoder in (False, True):
        task = build_task(run(folder, cache=True, encoder=encoder), CPU)
        assert torch.equal(task.conditioning(PROMPTS).prompt["text"], expected[:3])
        assert torch.equal(task.negative(2)["text"], expected[3:].expand(2, -1, -1))
        with monkeypatch.context() as once:
            once.setattr(task.text, "encode", never)  # type: ignore[union-attr]
            assert torch.equal(task.negative(3)["text"], expected[3:].expand(3, -1, -1))
    with pytest.raises(AssertionError, match="was loaded"):  # only for what the cache lacks
        task.conditioning(["a mat on a mat"])


def test_what_only_training_reads_may_be_gone_when_a_run_is_sampled(folder: Path, tmp_path: Path) -> None:
    gone = {"prompts": str(tmp_path / "prompts.txt"), "latents": str(tmp_path / "latents")}
    present, away = run(folder, encoder=True, cache=True), run(tmp_path, encoder=True, cache=True, data=gone)
    away.data.text.encoder = away.data.vae.path = str(folder / "pipeline")
    with pytest.raises(ConfigError, match="prompts"):
        build_task(away, CPU)
    task, whole = task_to_sample(away, CPU), task_to_sample(present, CPU)
    assert whole.validation_prompts(2) == [PROMPTS[0], PROMPTS[2]]
    assert torch.equal(
        task.conditioning(PROMPTS).prompt["text"], whole.conditioning(PROMPTS).prompt["text"]
    )  # one by the cache
    with pytest.raises(UserError, match="data.prompts is null, or not there any more"):
        task.validation_prompts(2)
    alone = run(folder, cache=True)
    alone.data.text.cache = str(tmp_path / "text")
    with pytest.raises(ConfigError, match="text"):  # of embeddings there is no other source
        task_to_sample(alone, CPU)


def test_the_text_encoder_is_loaded_when_asked_for_and_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    task, loaded = build_task(run(folder, cache=True, encoder=True), CPU), []

    def load(*arguments: Any, **more: Any) -> TextEncoder:
        loaded.append(arguments[0])
        return load_text_encoder(*arguments, **more)

    monkeypatch.setattr(umt5, "load_text_encoder", load)
    for _ in range(2):
        task.load_text_encoder()
    task.conditioning(["a mat on a mat"])
    assert loaded == [str(folder / "pipeline")]
    build_task(run(folder, cache=True), CPU).load_text_encoder()  # it has none
    broken = build_task(run(folder, encoder=True), CPU)
    broken.text.config.encoder = str(folder / "pipeline/vae")  # type: ignore[union-attr]
    with pytest.raises(UserError, match="data: .*vae holds AutoencoderKLWan: give the folder of UMT5EncoderModel"):
        broken.load_text_encoder()
    cached = build_task(run(folder, encoder=True, cache=True), CPU)
    cached.text.config.encoder = str(folder / "pipeline/vae")  # type: ignore[union-attr]
    cached.load_text_encoder()
    assert "only prompts of" in caplog.text
    assert cached.conditioning(PROMPTS).batch == 3


def test_a_causal_student_trains_from_the_cache_and_makes_mp4_files(folder: Path, tmp_path: Path) -> None:
    more = {"training": {"max_steps": 2}, "validation": {"every": 2, "count": 1}, "checkpoint": {"every": 2}}
    trainer(tmp_path / "run", merged(base(folder), more)).train()
    (shown,) = (tmp_path / "run").rglob("*.mp4")
    assert read_video(shown).shape[0] == 9
    argv = ["--run", str(tmp_path / "run"), "--prompt", PROMPTS[1], "--out", str(tmp_path / "cat.mp4")]
    args = inference_args(argv)
    generator = Generator.load(args.source, CPU)
    generate_videos(generator, args)
    assert read_video(tmp_path / "cat.mp4").shape == (9, 3, 128, 128)  # enlarged, for it is small
    # blocks decoded as they come are the whole decoded at once
    latents = generator([PROMPTS[1]], args.sampling, [0])
    decode = generator.task.decoding()
    streamed = torch.cat([decode(block) for block in latents.split(1, dim=1)], dim=1)
    assert latents.shape == (1, 3, 16, 4, 4)
    assert torch.equal(streamed, generator.task.decode(latents))
    # and evaluation sees them through the VAE too
    write_video(tmp_path / "real/a.mp4", streamed[0].flip(0), fps=8)
    save_encoder(tmp_path / "clip", "clip")
    asked = FidArgs(str(tmp_path / "clip"), tmp_path / "real", None, 2, "dev", tmp_path, 2)
    rows = evaluate_fid(generator, asked, args.sampling)
    assert rows["generated"]["frames"] == 18
    assert rows["real"]["frames"] == 9
    assert rows["generated"]["fd_frames"] > 0


def test_given_frames_and_reencoded_ones_go_through_the_vae(folder: Path) -> None:
    task, vae = build_task(run(folder, cache=True), CPU), load_vae(VAEConfig(str(folder / "pipeline"), dtype="fp32"))
    latents = torch.randn(1, 2, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(task.reencode(latents), vae.encode(task.decode(latents)[:, -1:]))
    image = torch.rand(1, 1, 1, 32, 32)
    assert torch.equal(task.encode(image), vae.encode(image.expand(-1, -1, 3, -1, -1)))
    with pytest.raises(ValueError, match=r"pixels are \[3, 16, 32\], this run's are \[3, 32, 32\]"):
        task.encode(torch.rand(1, 1, 3, 16, 32))


@pytest.mark.parametrize("kind", ["t2v", "ti2v", "i2v", "i2v_clip"])
def test_given_pixels_become_what_the_networks_take(folder: Path, kind: str) -> None:
    """Latents, or channels and CLIP's tokens; one image for all prompts or one for each."""
    save_image_encoder(folder / "clip", 20)
    overrides = {"model_type": kind.removesuffix("_clip")}
    overrides |= {"in_dim": 36} if "i2v" in kind.split("_") else {}
    overrides |= {"image_dim": 20} if kind == "i2v_clip" else {}
    network = {"overrides": overrides}
    networks = dict.fromkeys(("student", "teacher", "critic"), network)
    task = build_task(run(folder, cache=True, data={"image_encoder": str(folder / "clip")}, **networks), CPU)
    assert isinstance(task, EncodedTask)
    assert task.pixel_size(3) == Size(9, 32, 32)
    pixels = torch.rand(2, 5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    made = task.image_conditioning(PROMPTS[:2], pixels)
    shared = task.image_conditioning(PROMPTS[:2], pixels[:1], frames=2)
    assert torch.equal(made.prompt["text"], task.conditioning(PROMPTS[:2]).prompt["text"])
    if "i2v" not in kind.split("_"):
        assert torch.equal(made.initial, task.encode(pixels))
        assert made.channels is None
        assert torch.equal(shared.initial, task.encode(pixels[:1]).expand(2, -1, -1, -1, -1))  # type: ignore[arg-type]
    else:
        assert made.initial is None
        assert made.channels is not None
        assert shared.channels is not None
        assert torch.equal(made.channels, image_channels(task.vae, pixels, 3))
        assert torch.equal(shared.channels, image_channels(task.vae, pixels[:1], 2).expand(2, -1, -1, -1, -1))
    if kind == "i2v_clip":
        tokens = load_image_encoder(folder / "clip").encode(pixels[:, 0])
        assert torch.equal(made.image, tokens)  # type: ignore[arg-type]
        task = build_task(run(folder, cache=True, **networks), CPU)
        with pytest.raises(UserError, match="data.image_encoder is null: these networks see CLIP's tokens"):
            task.image_conditioning(PROMPTS[:2], pixels)
    else:
        assert made.image is None
    with pytest.raises(ValueError, match="2 prompts and 3 images: give one for all, or one for each"):
        for_each(PROMPTS[:2], torch.zeros(3, 1))
    with pytest.raises(ValueError, match=r"this run's are \[3, 32, 32\]"):
        task.image_conditioning(PROMPTS[:2], pixels[..., :16])


def test_what_does_not_fit_is_one_line_before_training(folder: Path, tmp_path: Path) -> None:
    def refused(match: str, **data: Any) -> None:
        with pytest.raises(ConfigError, match=match) as caught:
            build_task(run(folder, cache=True, data=data), CPU)
        assert "\n" not in str(caught.value)

    (tmp_path / "more.txt").write_text("a mat\na cat on a cat\n")
    refused("'a cat on a cat' is not in the text cache", prompts=str(tmp_path / "more.txt"))
    refused("prompts is null: kind wan needs a file", prompts=None)
    refused("cache and encoder are both null", text={"cache": None})
    refused("holds no finished text cache", text={"cache": str(tmp_path)})
    refused("made by another encoder, precision", text={"encoder": str(folder / "pipeline"), "dtype": "bf16"})
    refused("latent size 3x4 is not a multiple of the patch", wan={"height": 3})
    refused("has no vae/config.json", vae={"path": str(tmp_path)})
    with pytest.raises(ConfigError, match=r"data.wan.frames and causal.num_frame_per_block disagree"):
        run(folder, cache=True, causal={"num_frame_per_block": 2})
    with pytest.raises(ConfigError, match="data.vae.path is null: give the VAE's folder, or set validation.every"):
        run(folder, cache=True, data={"vae": {"path": None}}, validation={"every": 5})
    with pytest.raises(ConfigError, match="data.latents is null, but rollout.kind noised_data needs real videos"):
        run(folder, rollout={"kind": "noised_data"})
    with pytest.raises(ConfigError, match="data: vae: .* has 16 channels, the networks 4: give theirs"):
        build_task(run(folder, cache=True, **{n: {"overrides": {"in_dim": 4, "out_dim": 4}} for n in NETWORKS}), CPU)
    with pytest.raises(UserError, match="has 16 channels, the networks 4: give theirs"):
        fitting_vae(WanCodecs(), VAEConfig(str(folder / "pipeline")), 4, CPU)
    with pytest.raises(UserError, match="data.text.encoder is null"):
        (tmp_path / "run.yaml").write_text(to_yaml(run(folder, cache=True)))
        preprocess_text(
            ["--config_path", str(tmp_path / "run.yaml"), "--prompts", str(tmp_path / "more.txt"), "--out", "x"]
        )


def test_an_encoder_on_the_hub_is_compared_by_what_the_cache_says(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without fetching it: by name and precision; where the name is another, or none, one warning for all."""
    monkeypatch.setattr(umt5, "load_text_encoder", None)
    manifest = json.loads((folder / "text/manifest.json").read_text())
    live = run(folder, encoder=True)
    assert manifest["made_with"] == prompt_encoder(live.data.text, live.student, CPU).made_with()
    assert manifest["made_with"]["encoder"] == str(folder / "pipeline")
    assert manifest["made_with"]["dtype"] == "fp32"

    def started(name: str | None, dtype: str = "fp32") -> str:
        cache = tmp_path / f"{name}_{dtype}".replace("/", "_")
        shutil.copytree(folder / "text", cache, dirs_exist_ok=True)
        said = {} if name is None else manifest["made_with"] | {"encoder": name}
        (cache / "manifest.json").write_text(json.dumps(manifest | {"made_with": said}))
        caplog.clear()
        text = {"cache": str(cache), "encoder": "Wan-AI/small", "dtype": dtype}
        build_task(run(folder, data={"text": text}), CPU)
        return caplog.text

    assert started("Wan-AI/small") == ""
    with pytest.raises(
        ConfigError, match="was made by another encoder, precision or cleaning than Wan-AI/small in bf1"
    ):
        started("Wan-AI/small", "bf16")
    assert "was made by Wan-AI/other: whether Wan-AI/small gives" in started("Wan-AI/other")
    assert started("Wan-AI/other") == ""
    assert "was made by an encoder that it does not name" in started(None)


def test_a_run_of_stored_clip_tokens_takes_an_image_encoder_for_inference(folder: Path, tmp_path: Path) -> None:
    save_image_encoder(folder / "clip", 20)
    image = Sample("0", PROMPTS[0], latents=torch.randn(1, 16, 4, 4), first_latents=torch.randn(3, 16, 4, 4))
    write_latents(tmp_path / "images/a.safetensors", [replace(image, clip=torch.randn(5, 20))], normalised=True)
    network = {"overrides": {**NETWORK["overrides"], "model_type": "i2v", "in_dim": 36, "image_dim": 20}}
    data = {"images": str(tmp_path / "images"), "prompts": None, "vae": {"path": str(folder / "pipeline")}}
    made = trainer(tmp_path / "run", base(folder), data=data, **dict.fromkeys(NETWORKS, network))
    made.save_checkpoint()
    made.finish_saving()
    write_video(tmp_path / "image.png", torch.rand(1, 3, 32, 32), 8)
    out = tmp_path / "video.mp4"
    argv = [
        "--run",
        str(tmp_path / "run"),
        "--prompt",
        PROMPTS[0],
        "--image",
        str(tmp_path / "image.png"),
        "--out",
        str(out),
    ]

    def infer(*more: str) -> None:
        args = inference_args([*argv, *more])
        generate_videos(open_generator(args, CPU), args)

    with pytest.raises(UserError, match=r"data.image_encoder is null: .* \(inference.py: --image_encoder\)"):
        infer()
    with pytest.raises(UserError, match="has no image_encoder/config.json"):
        infer("--image_encoder", str(tmp_path))
    infer("--image_encoder", str(folder / "clip"))
    assert read_video(out).shape[0] == 9
    out.unlink()
    parts = [part.name for part in (folder / "clip").iterdir()]
    for name in parts:  # in the run's own pipeline: nothing has to be said
        shutil.copytree(folder / "clip" / name, folder / "pipeline" / name)
    try:
        infer()
    finally:
        for name in parts:
            shutil.rmtree(folder / "pipeline" / name)
    assert read_video(out).shape[0] == 9
    with pytest.raises(UserError, match="--image_encoder is for runs"):
        inference_args(["--model", "x", "--prompt", "a", "--image_encoder", "y"])


def test_the_task_is_of_its_kind(folder: Path) -> None:
    task = build_task(run(folder, cache=True), CPU)
    assert isinstance(task, EncodedTask)
    assert task.latent_shape == (3, 16, 4, 4)
    assert sorted(task.prompts(range(4))) == sorted([*PROMPTS, PROMPTS[0]])


def test_training_on_stored_latents(folder: Path, tmp_path: Path) -> None:
    """Real videos are the files' latents under their captions' embeddings; raw ones are normalised by the VAE's own."""
    latents = torch.randn(3, 3, 16, 4, 4)
    samples = [Sample(str(i), p, latents=x) for i, (p, x) in enumerate(zip(PROMPTS, latents, strict=True))]
    write_latents(tmp_path / "latents/a.safetensors", samples, normalised=True)
    changes = {"data": {"latents": str(tmp_path / "latents"), "real": True}}
    task = build_task(run(folder, cache=True, **changes), CPU)
    clips = task.real(range(5))
    found, captions = clips.latents, clips.captions
    by_caption = dict(zip(PROMPTS, latents, strict=True))
    assert all(torch.equal(x, by_caption[caption]) for x, caption in zip(found, captions, strict=True))
    assert set(captions[:3]) == set(PROMPTS)
    shorter = task.real(range(5), (2, 16, 4, 4))
    assert torch.equal(shorter.latents, found[:, :2])
    assert shorter.captions == captions
    small = {name: value for name, value in base(folder).items() if name not in ("teacher", "critic", "trainer")}
    training = {"max_steps": 2, "critic_warmup_steps": 0}
    made = trainer(
        tmp_path / "run",
        merged(small, {**changes, **TEACHER, "training": training}),
    )
    assert made.train() == 0
    statistics = statistics_of(WanCodecs(), VAEConfig(path=str(folder / "pipeline")))
    vae = load_vae(VAEConfig(path=str(folder / "pipeline"), dtype="fp32"))
    assert statistics is not None
    normalised = statistics.normalise(latents[0])
    torch.testing.assert_close(normalised, (latents[0] - vae.mean) * vae.scale, rtol=1e-5, atol=1e-5)


def test_training_on_the_latents_of_several_buckets(folder: Path, tmp_path: Path) -> None:
    """Updates draw a size and read the samples of its shape, each once an epoch; what the first error proposes runs."""
    buckets = {PROMPTS[0]: (3, 16, 4, 4), PROMPTS[1]: (2, 16, 4, 6), PROMPTS[2]: (3, 16, 4, 4)}
    latents = {caption: torch.randn(shape) for caption, shape in buckets.items()}
    samples = [Sample(caption, caption, latents=x) for caption, x in latents.items()]
    for number, part in enumerate((samples[:2], samples[2:])):
        write_latents(tmp_path / f"latents/{number}.safetensors", part, normalised=True)
    mixed = merged(base(folder), {
        **TEACHER, "data": {"latents": str(tmp_path / "latents")},
        "training": {"max_steps": 6, "critic_warmup_steps": 0, "global_batch_size": 2, "micro_batch_size": 2},
    })  # fmt: skip

    def refused(sizes: list[dict[str, int]] | None) -> str:
        with pytest.raises(ConfigError) as error:
            trainer(tmp_path / "refused", merged(mixed, {"training": {"sizes": sizes}}))
        assert "\n" not in str(error.value)
        return str(error.value)

    held = "holds latents of [2, 16, 4, 6] (1 samples), [3, 16, 4, 4] (2 samples) and this run makes"
    said = refused(None)
    assert held in said
    proposed = yaml.safe_load(said.rpartition("training.sizes: ")[2])
    assert "add what is missing to training.sizes: [{frames: 2, height: 4, width: 6}]" in refused([{}])
    lacking = refused([*proposed, {"height": 6}])
    assert held in lacking
    assert "[3, 16, 6, 4]" in lacking

    made = trainer(tmp_path / "run", merged(mixed, {"training": {"sizes": proposed}}))
    assert len(made.streams()) == 2
    for shape in set(buckets.values()):
        of_shape = sorted(caption for caption, found in buckets.items() if found == shape)
        clips = made.task.real(range(2 * len(of_shape)), shape)
        assert sorted(clips.captions) == sorted(2 * of_shape)
        assert sorted(clips.captions[: len(of_shape)]) == of_shape
        assert all(torch.equal(x, latents[caption]) for x, caption in zip(clips.latents, clips.captions, strict=True))
    assert made.task.real(range(2), (2, 16, 4, 4)).latents.shape == (2, 2, 16, 4, 4)  # beginnings of longer ones
    assert made.train() == 0
    entries = [entry for entry in read_jsonl(tmp_path / "run/metrics.jsonl") if "student/loss" in entry]
    assert {value for entry in entries for key, value in entry.items() if key.endswith("/width")} == {4.0, 6.0}
    Generator.load(tmp_path / "run", CPU)  # sampling needs none of it


def test_a_teacher_that_drops_captions_needs_the_empty_text(folder: Path, tmp_path: Path) -> None:
    """Its recipe's cache has it, that of another recipe only the negative prompt, and the doctor finds it lacking."""
    samples = [Sample(str(i), p, latents=torch.randn(3, 16, 4, 4)) for i, p in enumerate(PROMPTS)]
    write_latents(tmp_path / "latents/a.safetensors", samples, normalised=True)
    teacher = merged(base(folder), {
        **TEACHER, "diffusion": {}, "data": {"latents": str(tmp_path / "latents")},
        "training": {"max_steps": 1, "critic_warmup_steps": 0},
    })  # fmt: skip
    lacking = "diffusion.caption_dropout: prompt '' is not in the text cache .*preprocess.py text encodes it too"
    with pytest.raises(ConfigError, match=lacking):
        trainer(tmp_path / "run", teacher)
    recipe = tmp_path / "teacher.yaml"
    recipe.write_text(to_yaml(config(teacher)))
    (found,) = (finding for finding in check_files(Recipe(recipe), config(teacher)) if not finding.ok)
    assert found.what.startswith("diffusion.caption_dropout: prompt ''")
    encoder = [f"data.text.encoder={folder / 'pipeline'}", "data.text.cache=null"]
    argv = ["--config_path", str(recipe), "--prompts", str(folder / "prompts.txt"), "--out", str(tmp_path / "text")]
    assert preprocess_text([*argv, *encoder]) == 0
    assert trainer(tmp_path / "run", teacher, data={"text": {"cache": str(tmp_path / "text")}}).train() == 0


@pytest.mark.parametrize("kind", ["videos", "trajectories"])
def test_captions_that_the_cache_lacks_are_refused_at_the_start(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    """Of all samples, not of the first; an encoder beside the cache makes what it lacks."""
    captions, latents = [*PROMPTS, "a hat"], torch.randn(4, 3, 16, 4, 4)
    if kind == "videos":
        samples = [Sample(str(i), p, latents=x) for i, (p, x) in enumerate(zip(captions, latents, strict=True))]
        write_latents(tmp_path / "data/a.safetensors", samples, normalised=True)
        changes: dict[str, Any] = {"trainer": "diffusion", "data": {"latents": str(tmp_path / "data")}}
    else:
        (tmp_path / "data").mkdir()
        levels = torch.tensor([1.0, 0.9, 0.75, 0.0])
        x = (1 - levels).view(-1, 1, 1, 1, 1) * latents[:, None]
        write_trajectories(tmp_path / "data/a.safetensors", x, levels, captions)
        changes = {"trainer": "ode", "ode": {"path": str(tmp_path / "data")}}
    changes |= {"teacher": None, "critic": None, "training": {"max_steps": 2, "critic_warmup_steps": 0}}
    key = "data.latents" if kind == "videos" else "ode.path"
    with pytest.raises(ConfigError, match=f"{key}: prompt 'a hat' is not in the text cache") as caught:
        trainer(tmp_path / "run", merged(base(folder), changes))
    assert "\n" not in str(caught.value)
    warn_once.cache_clear()
    made = trainer(tmp_path / "run", merged(base(folder, encoder=True), changes))
    assert f"1 of 4 prompts are not in {folder}/text (the first: 'a hat'): each process loads" in caplog.text
    assert made.train() == 0
    assert caplog.text.count("loads the text encoder") == 1


def test_a_prompt_that_is_missed_later_is_one_line(folder: Path, tmp_path: Path) -> None:
    """What cannot be known at the start: a cache that loses a prompt, and an encoder that does not load."""
    made = trainer(tmp_path / "run", base(folder))
    task = made.task
    assert isinstance(task, EncodedTask)
    assert task.text.cache is not None
    task.text.cache._places.clear()
    with pytest.raises(UserError, match="data: prompt '.*' is not in the text cache") as caught:
        made.train()
    assert "\n" not in str(caught.value)
    text = {"cache": None, "encoder": str(tmp_path)}
    with pytest.raises(UserError, match="data: text encoder: .* has no folder 'text_encoder'"):
        build_task(run(folder, data={"text": text}), CPU).negative(1)


def test_real_videos_need_a_folder_of_this_size(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="data.latents is null, but rollout.kind noised_data needs real videos"):
        run(folder, cache=True, rollout={"kind": "noised_data"})
    write_latents(
        tmp_path / "latents/a.safetensors", [Sample("0", PROMPTS[0], latents=torch.randn(2, 16, 4, 4))], normalised=True
    )
    with pytest.raises(ConfigError, match=r"data.latents: .* holds latents of \[2, 16, 4, 4\] and this run makes"):
        build_task(run(folder, cache=True, data={"latents": str(tmp_path / "latents")}), CPU)


@pytest.fixture
def released(folder: Path) -> Path:
    """The pipeline with a network and a scheduler, as Diffusers saves them."""
    from diffusers import UniPCMultistepScheduler

    if not (folder / "pipeline/transformer").is_dir():
        geometry = WanConfig(dim=24, num_heads=2, text_dim=32, freq_dim=32, ffn_dim=32, num_layers=1)
        small_transformer(geometry, 0).save_pretrained(folder / "pipeline/transformer")
        UniPCMultistepScheduler(
            flow_shift=3.0, use_flow_sigmas=True, prediction_type="flow_prediction"
        ).save_pretrained(folder / "pipeline/scheduler")
    return folder / "pipeline"


def test_a_released_model_makes_a_video(released: Path, tmp_path: Path) -> None:
    """From the folder alone: text, network, scheduler's shift, VAE; two Euler steps by hand give its latents."""
    argv = ["--model", str(released), "--prompt", PROMPTS[0], "--out", str(tmp_path / "cat.mp4"), "--size", "32x32"]
    args = inference_args([*argv, "--frames", "2", "--steps", "2", "--guidance", "4", "--negative_prompt", NEGATIVE,
                           "--solver", "euler"])  # fmt: skip
    generator = open_generator(args, CPU)
    generate_videos(generator, args)
    assert read_video(tmp_path / "cat.mp4").shape == (5, 3, 128, 128)
    latents = generator(PROMPTS[:1], args.sampling, [0])
    x = Noise(0, 0, [0]).normal("noise", (2, 16, 4, 4))
    text = load_text_encoder(released, 512, dtype=torch.float32).encode([PROMPTS[0], NEGATIVE])
    for sigma, target in ((1.0, 0.75), (0.75, 0.0)):  # 3 u / (1 + 2 u) at u = 1/2
        with torch.no_grad():
            cond, uncond = (generator.score.net(x, torch.tensor([sigma]), t[None]) for t in text)
        x = x + (target - sigma) * (uncond + 4 * (cond - uncond))
    torch.testing.assert_close(latents, x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--size", "30x32"], "--size 30x32: give multiples of 16"),
        (["--size", "big"], "--size big: give height x width"),
        (["--window", "3"], "--window: a bidirectional network takes none"),
    ],
)
def test_a_released_model_refuses_in_one_line(released: Path, tmp_path: Path, more: list[str], message: str) -> None:
    argv = ["--model", str(released), "--prompt", "a mat", "--out", str(tmp_path / "x.mp4"), "--frames", "1"]
    with pytest.raises(UserError, match=message) as caught:
        args = inference_args([*argv, *more])
        generate_videos(open_generator(args, CPU), args)
    assert "\n" not in str(caught.value)


def test_what_is_no_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--model .*nothing: .* is no folder"):
        open_generator(inference_args(["--model", str(tmp_path / "nothing"), "--prompt", "a"]), CPU)
    with pytest.raises(UserError, match="--shift is for --model"):
        inference_args(["--run", str(tmp_path), "--prompt", "a", "--shift", "3"])
