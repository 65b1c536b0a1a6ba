"""Evaluation suites: measures against closed forms, encoders of transformers, VBench's protocol and published scores."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from configs.schema import RunConfig
from evaluation import fid_suite
from evaluation.command import main as evaluate
from evaluation.features import load_features
from evaluation.fid_suite import VideoSet, compare, video_set
from evaluation.vbench_protocol import DIMENSIONS, FLICKER, Prompt, read_scores, read_suite, totals, wanted_videos
from tests.small import NETWORK, config
from tests.utils.test_writing import PLACES, a_long_name, files_of_at_most, names, through_a_file
from trainer.network_factory import NetworkSpec, build_network
from utils import checkpoint, metrics
from utils.config import to_plain
from utils.errors import UserError
from utils.logging import console
from utils.metrics import Moments, diversity, drift, frame_luma, frechet_between, frechet_distance, moments_of, motion
from utils.video import read_video, write_video
from worlds import digit_net, toy_judge

CPU = torch.device("cpu")
# of the leaderboard, in percent and in the order of its columns, with quality, semantic and total as published there
PUBLISHED = {
    "VideoCrafter-2.0": (
        [
            96.85,
            98.22,
            98.41,
            97.73,
            42.50,
            63.13,
            67.22,
            92.55,
            40.66,
            95.00,
            92.92,
            35.86,
            55.29,
            25.13,
            25.84,
            28.23,
        ],
        (82.20, 73.42, 80.44),
    ),
    "T2V-Turbo (VC2)": (
        [
            96.28,
            97.02,
            97.48,
            97.34,
            49.17,
            63.04,
            72.49,
            93.96,
            54.65,
            95.20,
            89.90,
            38.67,
            55.58,
            24.42,
            25.51,
            28.16,
        ],
        (82.57, 74.76, 81.01),
    ),
}
COLUMNS = [
    *("subject_consistency", "background_consistency", "temporal_flickering", "motion_smoothness", "dynamic_degree"),
    *("aesthetic_quality", "imaging_quality", "object_class", "multiple_objects", "human_action", "color"),
    *("spatial_relationship", "scene", "appearance_style", "temporal_style", "overall_consistency"),
]


def test_moments_in_batches_are_those_of_the_whole_set() -> None:
    torch.manual_seed(0)
    a, b = (
        torch.randn(50, 6) @ torch.randn(6, 6) + 1000,
        torch.randn(70, 6) * 2 + 1000,
    )  # far from zero: no cancellation
    weights = torch.randn(6, 4)
    streamed = [moments_of(x.split([1, 30, 19, *[20] * (len(x) // 70)]), lambda batch: batch @ weights) for x in (a, b)]
    assert [m.count for m in streamed] == [50, 70]
    torch.testing.assert_close(streamed[0].covariance_DD, (a @ weights).double().T.cov(), rtol=1e-9, atol=1e-9)
    assert frechet_between(*streamed) == pytest.approx(frechet_distance(a @ weights, b @ weights), rel=1e-9)
    with pytest.raises(ValueError, match=r"must be \[N, 4\], got \[3, 5\]"):
        streamed[0].add(torch.zeros(3, 5))
    with pytest.raises(ValueError, match="NaN"):
        streamed[0].add(torch.full((2, 4), torch.nan))
    with pytest.raises(ValueError, match="N >= 2"):
        frechet_between(streamed[0], Moments())


def test_moments_over_ranks_are_those_of_all_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x = torch.randn(30, 5) + torch.arange(30)[:, None]
    shares, gate, lock = [x[:4], x[4:9], x[9:]], threading.Barrier(3), threading.Lock()
    board: list[torch.Tensor] = []

    def all_reduce_(tensor: torch.Tensor) -> torch.Tensor:
        with lock:
            board.append(tensor)
        gate.wait()
        total = torch.stack(board).sum(0)
        gate.wait()
        board.clear()
        gate.wait()
        return total

    monkeypatch.setattr(metrics, "all_reduce_", all_reduce_)
    found: list[Moments] = []

    def rank(share: torch.Tensor) -> None:
        found.append(moments_of([share], lambda batch: batch).over_ranks())

    threads = [threading.Thread(target=rank, args=(share,)) for share in shares]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    for moments in found:
        assert moments.count == 30
        torch.testing.assert_close(moments.mean_D, x.double().mean(0))
        torch.testing.assert_close(moments.covariance_DD, x.double().T.cov())


def test_drift_diversity_and_motion_of_known_videos() -> None:
    ramp = torch.arange(40.0).expand(2, 40) * torch.tensor([[1.0], [-1.0]])
    assert drift(ramp).tolist() == [34, -34]  # 6 frames at either end: means 2.5 and 36.5
    assert drift(ramp[:, :9]).tolist() == [8, -8]
    assert drift(ramp[:, :20]).tolist() == [17, -17]
    assert drift(ramp[:, :, None].expand(-1, -1, 3)).shape == (2, 3)
    for frames, share in ((1, 0.15), (9, 0.6), (9, 0.0)):
        with pytest.raises(ValueError, match="drift"):
            drift(ramp[:, :frames], share)
    assert diversity(torch.tensor([[0.0, 0], [3, 4], [0, 0]])) == pytest.approx(10 / 3)
    assert torch.tensor(diversity(torch.zeros(1, 2))).isnan()
    video = torch.zeros(2, 3, 3, 2, 2)
    video[0, 1, 1] = 0.5  # green of one frame, up and down: a third of the values change by half, twice
    assert motion(video).tolist() == pytest.approx([1 / 6, 0])
    assert frame_luma(video)[0].tolist() == pytest.approx([0, 0.7152 / 2, 0])
    with pytest.raises(ValueError, match="2 frames"):
        motion(video[:, :1])


def save_encoder(folder: Path, kind: str) -> Any:
    """A tiny encoder of transformers with its preprocessor's settings."""
    from transformers import (
        CLIPVisionConfig,
        CLIPVisionModel,
        VideoMAEConfig,
        VideoMAEModel,
        ViTConfig,
        ViTForImageClassification,
    )

    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape |= {"image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    made: Any = {
        "clip": lambda: CLIPVisionModel(CLIPVisionConfig(**shape)),
        "vit": lambda: ViTForImageClassification(ViTConfig(**shape)),
        "video": lambda: VideoMAEModel(VideoMAEConfig(**shape, num_frames=4, tubelet_size=2)),
    }[kind]()
    made.eval().save_pretrained(folder)
    settings = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.25, 0.3], "size": {"shortest_edge": 16}}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return made


@torch.no_grad()
def test_features_are_what_transformers_gives(tmp_path: Path) -> None:
    pixels = torch.rand(2, 6, 3, 16, 16)
    normalised = (pixels - torch.tensor([0.5, 0.4, 0.3])[:, None, None]) / torch.tensor([0.2, 0.25, 0.3])[:, None, None]
    clip = save_encoder(tmp_path / "clip", "clip")
    found = load_features(tmp_path / "clip")(pixels)
    assert found.shape == (2, 6, 16)
    torch.testing.assert_close(found.flatten(0, 1), clip(normalised.flatten(0, 1)).pooler_output)
    resized = load_features(tmp_path / "clip")(pixels.repeat_interleave(2, -1))  # another shape is squeezed to the size
    assert resized.shape == (2, 6, 16)
    assert (resized - found).abs().max() < (found - found.mean(0)).abs().max()

    vit = save_encoder(tmp_path / "vit", "vit")  # a classifier has no pooling layer: a random one must not be used
    tokens = vit.vit(normalised.flatten(0, 1)).last_hidden_state.mean(1)
    for _ in range(2):
        torch.testing.assert_close(load_features(tmp_path / "vit")(pixels).flatten(0, 1), tokens)

    video = save_encoder(tmp_path / "video", "video")
    seen = normalised[:, [0, 2, 3, 5]]
    expected = video(seen).last_hidden_state.mean(1)
    torch.testing.assert_close(load_features(tmp_path / "video")(pixels)[:, 0], expected)


def test_encoders_that_cannot_be_had_are_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"preprocessor_config.json.*save_pretrained"):
        load_features(tmp_path)
    save_encoder(tmp_path / "clip", "clip")
    weights = tmp_path / "clip" / "model.safetensors"
    whole = weights.read_bytes()
    weights.unlink()
    (tmp_path / "clip" / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ValueError, match=r"no \.safetensors file"):
        load_features(tmp_path / "clip")
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="does not load") as caught:
        load_features(tmp_path / "clip")
    assert "\n" not in str(caught.value)
    save_file({"nothing": torch.zeros(1)}, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks .* weights"):
        load_features(tmp_path / "clip")


def test_a_set_of_images_has_a_distance_and_no_motion(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "propagate", True)
    torch.manual_seed(0)
    videos, images = torch.rand(4, 10, 3, 4, 4), torch.rand(6, 1, 3, 4, 4)

    def features(pixels: torch.Tensor) -> torch.Tensor:
        return pixels.mean(dim=(-1, -2))

    rows = compare(video_set(videos.split(3), features), video_set(images.split(1), features))
    assert rows["real"].keys() == {"videos", "frames", "diversity"}
    assert rows["real"]["frames"] == 6
    expected = frechet_distance(features(videos).flatten(0, 1), features(images)[:, 0])
    assert rows["generated"]["fd_frames"] == pytest.approx(expected)
    assert "fd_videos" not in rows["generated"]
    assert rows["generated"]["motion"] == pytest.approx(motion(videos).mean().item(), rel=1e-6)
    assert rows["generated"]["videos"] == 4
    assert rows["generated"]["appearance_drift"] > 0
    both = compare(video_set([videos], features), video_set([videos], features))["generated"]
    assert both["fd_videos"] == pytest.approx(0, abs=1e-9) == both["fd_frames"]
    assert any(line.startswith("fd_frames: it is of 6 samples in 3 dimensions") for line in caplog.messages)
    assert any(line.startswith("fd_videos: it is of 4 samples in 3 dimensions") for line in caplog.messages)
    assert VideoSet().count == 0


def save_run(folder: Path, cfg: RunConfig) -> Path:
    weights = build_network(NetworkSpec(cfg.student, "student", 0), CPU).state_dict()
    checkpoint.save(folder / "checkpoints", 1, {"student": weights}, {"config": to_plain(cfg)})
    return folder


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_run(tmp_path_factory.mktemp("toy"), config())


@pytest.fixture(scope="module")
def synthetic_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"frames": 3, "height": 8, "width": 8, "prompts": 4}
    student = NETWORK | {"overrides": NETWORK["overrides"] | {"in_dim": 4, "out_dim": 4}}
    return save_run(
        tmp_path_factory.mktemp("synthetic"),
        config(data={"kind": "synthetic", "synthetic": sizes}, student=student, teacher=student, critic=student),
    )


def run(monkeypatch: pytest.MonkeyPatch, *argv: object) -> None:
    monkeypatch.setattr("sys.argv", ["evaluate", *map(str, argv)])
    assert evaluate() == 0


def quick_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digit_net, "_STEPS", 2)
    small = {"_TRAINING_VIDEOS": 64, "_ACCURACY_VIDEOS": 64, "_REFERENCE_VIDEOS": 8, "_FLOOR_DRAWS": 2}
    for name, value in small.items():
        monkeypatch.setattr(toy_judge, name, value)


def test_the_toy_worlds_table(
    toy_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quick_judge(monkeypatch)
    out = tmp_path / "rows.json"
    run(monkeypatch, "--run", toy_run, "--count", 6, "--cache", tmp_path, "--out", out)
    real, made = json.loads(out.read_text())
    assert real["metrics"]["motion"] == pytest.approx(real["metrics"]["motion_real"], rel=0.3)
    assert made["metrics"]["intensity_drift"] > real["metrics"]["intensity_drift"]
    assert made["evaluations"] > 0
    heads, *lines = capsys.readouterr().out.splitlines()
    assert heads.split()[-4:] == ["drift", "fading", "motion", "evaluations"]
    assert len(lines) == 2


def test_fid_of_the_toy_world(
    toy_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quick_judge(monkeypatch)
    out = tmp_path / "rows.json"
    common = ("--run", toy_run, "--suite", "fid", "--count", 12, "--cache", tmp_path, "--out", out)
    run(monkeypatch, *common)
    assert "12 videos: distances of fewer than 256 say little" in capsys.readouterr().err
    rows = json.loads(out.read_text())
    assert rows["generated"]["videos"] == rows["real"]["videos"] == 12
    assert rows["generated"].keys() >= {
        "fd_frames",
        "fd_videos",
        "luma_drift",
        "appearance_drift",
        "motion",
        "diversity",
    }
    assert rows["real"]["luma_drift"] < 0.01 < rows["real"]["motion"]
    run(monkeypatch, *common, "--batch", 5)  # any batches, the same videos
    again = json.loads(out.read_text())
    assert again["generated"] == pytest.approx(rows["generated"], rel=1e-3)


def test_fid_against_a_folder_by_an_encoder(
    synthetic_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_encoder(tmp_path / "clip", "clip")
    for i in range(3):
        write_video(tmp_path / f"real/{i}.mp4", torch.rand(5, 3, 8, 8), fps=8)
    argv = ("--run", synthetic_run, "--suite", "fid", "--count", 4, "--batch", 2)
    chosen = (*argv, "--features", tmp_path / "clip", "--real", tmp_path / "real", "--out", tmp_path / "rows.json")
    run(monkeypatch, *chosen)
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert (rows["real"]["videos"], rows["real"]["frames"]) == (3, 9)  # the run's videos have three frames
    assert rows["generated"]["frames"] == 12
    assert rows["generated"]["fd_videos"] > 0
    assert "fd_frames" in capsys.readouterr().out
    for lacking, message in (
        (("--real", tmp_path / "real"), "--features: only the toy world has its own"),
        (("--features", tmp_path / "clip"), "--real: only the toy world has held-out videos"),
        (("--features", tmp_path / "clip", "--real", tmp_path / "clip"), "holds no .*mp4.*png"),
        (("--features", tmp_path, "--real", tmp_path / "real"), "--features: .*preprocessor_config.json"),
        (("--features", tmp_path / "clip", "--real", tmp_path, "--fps", 8), "--fps is for --suite vbench"),
        (("--features", tmp_path / "clip", "--real", tmp_path, "--count", 1), "at least 2 videos"),
    ):
        with pytest.raises(UserError, match=message):
            run(monkeypatch, *argv, *lacking)


@pytest.mark.parametrize("model", PUBLISHED)
def test_vbench_totals_are_the_published_ones(model: str) -> None:
    scores, published = PUBLISHED[model]
    found = totals({name: score / 100 for name, score in zip(COLUMNS, scores, strict=True)})
    assert [100 * found[name] for name in ("quality", "semantic", "total")] == pytest.approx(published, abs=0.011)


def test_vbench_totals_need_their_dimensions() -> None:
    assert len(DIMENSIONS) == 16
    top = {name: dimension.high for name, dimension in DIMENSIONS.items()}
    assert totals(top) == {"quality": pytest.approx(1), "semantic": pytest.approx(1), "total": pytest.approx(1)}
    low = totals({name: dimension.low for name, dimension in DIMENSIONS.items()})
    assert low == {"quality": pytest.approx(0), "semantic": pytest.approx(0), "total": pytest.approx(0)}
    assert totals({k: v for k, v in top.items() if k != "scene"}).keys() == {"quality"}
    with pytest.raises(ValueError, match="'motion'"):
        totals({"motion": 1.0})


def test_vbench_wants_five_videos_a_prompt_and_more_where_flicker_is_judged(tmp_path: Path) -> None:
    rows = [("still", [FLICKER]), ("cat", ["color"]), ("cat", ["scene"]), ("dog", ["scene"])]
    (tmp_path / "full.json").write_text(json.dumps([{"prompt_en": p, "dimension": d} for p, d in rows]))
    suite = read_suite(tmp_path / "full.json")
    assert suite == [Prompt("still", (FLICKER,)), Prompt("cat", ("color", "scene")), Prompt("dog", ("scene",))]
    every = wanted_videos(suite, tuple(DIMENSIONS))
    assert len(every) == 25 + 5 + 5
    assert len({video.seed for video in every}) == 35
    assert [v.name for v in every[24:27]] == ["still-24.mp4", "cat-0.mp4", "cat-1.mp4"]
    some = wanted_videos(suite, ["scene"], {"cat": "a long cat", "dog": "a long dog"})
    assert [(v.name, v.text) for v in some[::5]] == [("cat-0.mp4", "a long cat"), ("dog-0.mp4", "a long dog")]
    assert [v.seed for v in some] == [v.seed for v in every[25:]]  # whatever else is asked for
    with pytest.raises(ValueError, match="no augmented prompt for 'dog'"):
        wanted_videos(suite, ["scene"], {"cat": "a long cat"})
    with pytest.raises(ValueError, match="take the / out"):
        wanted_videos([Prompt("a/b", ("scene",))], ["scene"])
    (tmp_path / "full.json").write_text(json.dumps([{"prompt_en": "a", "dimension": ["colour"]}]))
    with pytest.raises(ValueError, match="dimension 'colour'; known are"):
        read_suite(tmp_path / "full.json")
    (tmp_path / "x_eval_results.json").write_text("[]")
    with pytest.raises(ValueError, match="x_eval_results.json cannot be read as VBench's results"):
        read_scores(tmp_path)


# what the worker calls of vbench 0.1.5: names and keywords, and the files that it leaves
FAKE = """
import json, os
class VBench:
    def __init__(self, device, full_info_dir, output_path):
        self.device, self.out = device, output_path
        os.makedirs(output_path, exist_ok=True)
    def evaluate(self, videos_path, name, prompt_list=[], dimension_list=None, local=False, read_frame=False,
                 mode="vbench_standard", **kwargs):
        assert local and mode == "vbench_standard" and dimension_list == [name] and not kwargs
        seen = sorted(os.listdir(videos_path))
        assert all(file.endswith(".mp4") for file in seen), seen
        results = {name: [len(seen) / 100, []]}
        json.dump(results, open(f"{self.out}/{name}_eval_results.json", "w"))
        print(name, len(seen), file=open(os.path.join(self.out, "log"), "a"))
"""
FAKE_COMMAND = """
import os, shutil, sys
def main():
    command, _, videos, _, out = sys.argv[1:]
    assert command == "static_filter"
    os.makedirs(out + "/filtered_videos", exist_ok=True)
    for i in range(5):
        shutil.copy(f"{videos}/still-{2 * i}.mp4", f"{out}/filtered_videos/still-{i}.mp4")
"""


@pytest.fixture
def vbench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fake package, found by new interpreters, with a torch that takes no seconds to import; its empty cache."""
    site = tmp_path / "site"
    (site / "vbench/cli").mkdir(parents=True)
    (site / "vbench/__init__.py").write_text(FAKE)
    (site / "vbench/cli/__init__.py").write_text("")
    (site / "vbench/cli/vbench.py").write_text(FAKE_COMMAND)
    rows = [{"prompt_en": "still", "dimension": [FLICKER]}, {"prompt_en": "a cat", "dimension": ["scene"]}]
    (site / "vbench/VBench_full_info.json").write_text(json.dumps(rows))
    (site / "torch.py").write_text("device = str\n")
    monkeypatch.setenv("PYTHONPATH", str(site))
    monkeypatch.setenv("VBENCH_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_vbench_videos_are_made_once_and_scored_by_the_package(
    synthetic_run: Path,
    vbench: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    videos, out = tmp_path / "videos", tmp_path / "scores.json"
    argv = ("--run", synthetic_run, "--suite", "vbench", "--videos", videos, "--dimensions", f"{FLICKER},scene")
    with pytest.raises(UserError, match=r"cache .* lacks 2 models \(raft_model.* of temporal_flickering\).*--download"):
        run(monkeypatch, *argv)
    for file in (*DIMENSIONS[FLICKER].files, *DIMENSIONS["scene"].files):
        (vbench / file).parent.mkdir(parents=True, exist_ok=True)
        (vbench / file).touch()

    monkeypatch.setenv("WORLD_SIZE", "2")  # one of two ranks makes its half and scores nothing
    monkeypatch.setenv("RANK", "1")
    run(monkeypatch, *argv, "--batch", 4)
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.delenv("RANK")
    half = {file.name: file.read_bytes() for file in videos.iterdir()}
    assert len(half) == 15
    assert not (tmp_path / "videos_scores").exists()

    run(monkeypatch, *argv, "--batch", 8, "--out", out)
    assert len(list(videos.iterdir())) == 30
    assert read_video(videos / "a cat-4.mp4").shape == (3, 3, 8, 8)
    assert all((videos / name).read_bytes() == data for name, data in half.items())
    assert json.loads(out.read_text())["scores"] == {FLICKER: 0.05, "scene": 0.3}  # flicker: of the still ones
    said = capfd.readouterr().out
    assert "15 of 30 videos are there already" in said
    assert "14 of 16 dimensions were left out" in said
    log = (tmp_path / "videos_scores/log").read_text()
    assert log == f"scene 30\n{FLICKER} 5\n"
    run(monkeypatch, *argv)
    assert (tmp_path / "videos_scores/log").read_text() == log  # scored once

    (tmp_path / "long.json").write_text(json.dumps({"still": "a long still", "a cat": "a long cat"}))
    for changed, key in ((("--steps", 1), "steps"), (("--augmented", tmp_path / "long.json"), "texts")):
        with pytest.raises(UserError, match=rf"made with other settings \({key}\)"):
            run(monkeypatch, *argv, *changed)


def test_vbench_says_what_is_missing(
    synthetic_run: Path, vbench: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ("--run", synthetic_run, "--suite", "vbench", "--videos", tmp_path / "videos")
    short = tmp_path / "short.txt"
    short.write_text("one\n")
    for options, message in (
        (("--dimensions", "colour"), "--dimensions: VBench has no 'colour'"),
        (("--dimensions", "color"), "color need detectron2"),
        (("--vbench_python", tmp_path / "none"), "does not run"),
        (("--only_videos", "--augmented", short), "--augmented: a text file needs --originals"),
        (("--only_videos", "--augmented", short, "--originals", __file__), "--augmented: prompts: cannot read"),
        (("--count", 5), "--count is for --suite toy or fid"),
    ):
        with pytest.raises(UserError, match=message):
            run(monkeypatch, *argv, *options)
    monkeypatch.delenv("PYTHONPATH")
    with pytest.raises(UserError, match=r"has no vbench: `pip install vbench` in an environment of its own"):
        run(monkeypatch, *argv, "--vbench_python", sys.executable)
    with pytest.raises(UserError, match=r"or give its VBench_full_info.json by --prompts"):
        run(monkeypatch, *argv, "--only_videos")
    assert fid_suite.report({"generated": {"motion": 0.5}, "real": {}}).splitlines()[1].split() == [
        "motion",
        "0.5",
        "-",
    ]


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
def test_rows_that_could_not_be_written_are_not_made(
    place: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = place(tmp_path)
    before = names(tmp_path)
    monkeypatch.setattr(sys, "argv", ["evaluate", "--run", "absent", "--out", str(path)])
    with pytest.raises(UserError, match="^--out .* could not be written: .*: give another place$"):
        evaluate()
    assert names(tmp_path) == before


@pytest.mark.parametrize("place", [through_a_file, a_long_name])
def test_a_judge_that_could_not_be_kept_is_not_trained(place: Callable[[Path], Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="^judge .* could not be written: .*: give another place$"):
        digit_net.kept(place(tmp_path), 8, lambda: pytest.fail("a minute of training"))


def test_a_judge_that_cannot_be_kept_leaves_no_half_file(tmp_path: Path) -> None:
    net = digit_net.DigitNet(8)
    refused = pytest.raises(UserError, match="^judge .* could not be written: File too large: free some space there")
    with files_of_at_most(1000), refused:
        digit_net.kept(tmp_path / "judge.safetensors", 8, lambda: (net, 0.9))
    assert names(tmp_path) == []
