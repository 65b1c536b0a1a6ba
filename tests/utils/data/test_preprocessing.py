"""Preprocessing: the same files whoever makes them and however often it is stopped; what is left out is named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tasks.video_command import Encoders, video_command
from tests.utils.data.test_videos import SIZES, encode, media
from tests.utils.test_writing import files_of_at_most, names, through_a_file
from utils.data.buckets import Pace
from utils.data.clips import Start, VideoClips, decode_clip, plan_clips
from utils.data.latents import latent_order, open_latents
from utils.data.media import find_media
from utils.data.preprocessing import Encoding, Files, Job, Report, Share, encode_videos, write_ode
from utils.data.safetensors_shards import SafetensorsFolder, read_header
from utils.data.shard_files import found_files
from utils.data.stream import Stream, TooManyCorrupt, stacked
from utils.data.tensors import Statistics
from utils.errors import UserError

pytest.importorskip("pyarrow")

STATISTICS = Statistics((0.5, 0.25, 0.125), (2.0, 4.0, 0.5))


def vae(pixels_BTCHW: Tensor) -> Tensor:
    """Every 4th frame at an 8th of the size: as causal in time as Wan's."""
    assert pixels_BTCHW.dtype == torch.float32
    assert (pixels_BTCHW.shape[1] - 1) % 4 == 0
    return pixels_BTCHW[:, ::4, :, ::8, ::8] * 2 - 1


def text(captions: list[str]) -> list[Tensor]:
    return [torch.tensor([[float(ord(c))] for c in caption.split()[0]]) for caption in captions]


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("videos")
    for i in range(7):
        tall = i in (2, 5)
        encode(root / f"{i}.mp4", 9 if not tall else 5, height=48 if tall else 32, width=32 if tall else 48)
        (root / f"{i}.txt").write_text(f"clip{i} of seven")
    return root


def clips_of(root: Path, **how: Any) -> VideoClips:
    shards = find_media(root)
    return VideoClips(shards, plan_clips(shards, SIZES, Pace(), threads=1, **how), SIZES, Pace(), Start.first)


@pytest.mark.parametrize("kind", ["parquet", "safetensors"])
@pytest.mark.parametrize("raw", [None, STATISTICS])
def test_latents_of_videos_come_back_from_the_files(
    kind: str, raw: Statistics | None, videos: Path, tmp_path: Path
) -> None:
    job = Job(tmp_path, {"vae": "test"}, rows=3, batch=2)
    report = encode_videos(clips_of(videos), Encoding(vae, text, raw=raw), job, kind=kind)
    assert (report.made, report.present, report.rows, report.corrupt) == (3, 0, 7, [])
    assert [path.name for path in found_files(tmp_path, f".{kind}")] == [
        f"latents_0000{i}_of_00003.{kind}" for i in range(3)
    ]
    folder = open_latents(tmp_path, statistics=raw)
    wide, tall = (3, 3, 4, 6), (2, 3, 6, 4)
    assert folder.shapes() == [tall if i in (2, 5) else wide for i in range(7)]
    for i in range(7):
        sample = folder.read(i, 0)
        size = SIZES[2 if i in (2, 5) else 0]
        expected = vae(decode_clip(media(videos / f"{i}.mp4"), size, Pace(), 16.0)[None])[0]
        assert torch.allclose(sample.latents, expected, atol=1e-5 if raw else 0)
        assert sample.caption == f"clip{i} of seven"
        assert torch.equal(sample.text, text([f"clip{i}"])[0])
    order = latent_order(folder, batch=2, seed=0)
    stream = Stream(folder, order, 0)
    shapes = [
        tuple(stacked([s.latents for s in stream.samples(range(p, p + 2))], "latents").shape) for p in range(0, 28, 2)
    ]
    assert shapes.count((2, *wide)) == 10
    assert shapes.count((2, *tall)) == 4


def assert_equal_tensors(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_any_split_and_any_stop_make_the_same_files(videos: Path, tmp_path: Path) -> None:
    clips, calls = clips_of(videos), list[int]()

    def counted(pixels: Tensor) -> Tensor:
        calls.append(len(pixels))
        if len(calls) == stop:
            raise KeyboardInterrupt
        return vae(pixels)

    def run(out: str, share: Share = Share()) -> Report:
        job = Job(tmp_path / out, {}, rows=2, share=share)
        return encode_videos(clips, Encoding(counted), job, kind="safetensors")

    stop = -1
    run("one")
    with pytest.raises(KeyboardInterrupt):
        stop = len(calls) + 4  # in the second file
        run("two")
    stop = -1
    assert [path.name for path in (tmp_path / "two").iterdir()] == ["latents_00000_of_00004.safetensors"]
    with pytest.raises(ValueError, match=r"lacks 3 of 4 files 'latents_\*' \(1, 2, 3\): finish its preprocessing"):
        open_latents(tmp_path / "two")
    before = len(calls)
    first, second = run("two", share=Share(0, 2)), run("two", share=Share(1, 2))
    assert (first.present, first.made, second.present, second.made) == (1, 1, 0, 2)
    assert sum(calls[before:]) == 5  # the two of the first file were not made again
    assert run("two").present == 4
    assert sum(calls[before:]) == 5
    for number in range(4):
        name = f"latents_0000{number}_of_00004.safetensors"
        assert read_header(tmp_path / "one" / name) == read_header(tmp_path / "two" / name)
        assert_equal_tensors(load_file(tmp_path / "one" / name), load_file(tmp_path / "two" / name))
    damaged = tmp_path / "two/latents_00002_of_00004.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:20])
    assert run("two").made == 1
    assert read_header(damaged)["captions"] == ["clip4 of seven", "clip5 of seven"]


def test_files_of_another_job_are_refused(videos: Path, tmp_path: Path) -> None:
    clips = clips_of(videos)
    job = Job(tmp_path, {"vae": "a"}, rows=4)
    encode_videos(clips, Encoding(vae), job)
    for changes, raw, kind, message in [
        ({"settings": {"vae": "b"}}, None, "parquet", "was made from other data or settings: give another --out"),
        ({}, STATISTICS, "parquet", "other data or settings"),
        ({"rows": 3}, None, "parquet", "is of another job"),
        ({}, None, "safetensors", "is of another job"),
        ({}, None, "npz", "written as parquet or safetensors, not 'npz'"),
        ({"batch": 0}, None, "parquet", "batch must be at least 1"),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            encode_videos(clips, Encoding(vae, raw=raw), replace(job, **changes), kind=kind)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="NaN or infinity: encode in another precision"):
        encode_videos(clips, Encoding(lambda x: vae(x) * torch.inf), Job(tmp_path / "x", {}))
    for wrong in ("3/3", "x", "1", "-1/2"):
        with pytest.raises(ValueError, match="i from 0 to n - 1"):
            Share.parse(wrong)
    assert Share.parse("1/3") == Share(1, 3)
    with pytest.raises(ValueError, match="at least one sample and one row"):
        Files(tmp_path, "a", ".x", 3, 0, "")


def test_broken_videos_are_left_out_by_name(videos: Path, tmp_path: Path) -> None:
    source = tmp_path / "videos"
    source.mkdir()
    for file in videos.iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    clips = clips_of(source)
    (source / "3.mp4").write_bytes((videos / "3.mp4").read_bytes()[:-1500])  # after its header was read
    (source / "4.txt").unlink()
    with pytest.raises(TooManyCorrupt, match="1 of 7 samples are corrupt"):
        encode_videos(clips, Encoding(vae), Job(tmp_path / "out", {}, rows=7), kind="safetensors")
    assert not list((tmp_path / "out").glob("*")) if (tmp_path / "out").is_dir() else True
    job = Job(tmp_path / "out", {}, rows=4)
    report = encode_videos(clips, Encoding(vae), job, kind="safetensors", max_corrupt=0.5)
    assert report.rows == 5
    assert len(report.corrupt) == 2
    assert "3.mp4" in report.corrupt[0]
    assert "4.mp4: its caption" in report.corrupt[1]
    left_out = json.loads(read_header(tmp_path / "out/latents_00000_of_00002.safetensors")["left_out"])
    assert len(left_out) == 1
    assert "3.mp4" in left_out[0]
    assert [open_latents(tmp_path / "out").read(i, 0).caption[:5] for i in range(5)] == [
        f"clip{i}" for i in (0, 1, 2, 5, 6)
    ]


LEVELS = (1.0, 0.75, 0.0)


def trajectories(positions: range, prompts: list[str]) -> Tensor:
    """[B, S, F, C, H, W], told apart by position and prompt."""
    assert prompts == [f"p{i}" for i in positions]
    return torch.stack(
        [torch.full((3, 2, 1, 2, 2), float(i)) * torch.arange(1, 4).view(3, 1, 1, 1, 1) for i in positions]
    )


PROMPTS = [f"p{i}" for i in range(7)]


def test_trajectories_by_any_number_of_ranks(tmp_path: Path) -> None:
    alone = Job(tmp_path / "one", {"steps": 48, "shift": 8.0, "guidance": 6.0}, rows=3, batch=2)
    shared = replace(alone, out=tmp_path / "two")
    assert write_ode(PROMPTS, trajectories, LEVELS, alone).rows == 7
    for rank in range(2):
        write_ode(PROMPTS, trajectories, LEVELS, replace(shared, share=Share(rank, 2), batch=3))
    folder = SafetensorsFolder(tmp_path / "two")
    assert folder.sigmas.tolist() == list(LEVELS)
    assert folder.shard_sizes == [3, 3, 1]
    for i in range(7):
        sample = folder.read(i, 0)
        assert sample.caption == f"p{i}"
        assert torch.equal(sample.trajectory, trajectories(range(i, i + 1), [f"p{i}"])[0])
        assert torch.equal(SafetensorsFolder(tmp_path / "one").read(i, 0).trajectory, sample.trajectory)
    header = read_header(tmp_path / "two/ode_00001_of_00003.safetensors")
    assert json.loads(header["settings"]) == {"steps": 48, "shift": 8.0, "guidance": 6.0}
    (tmp_path / "two/ode_00001_of_00003.safetensors").unlink()
    again = write_ode(PROMPTS, trajectories, LEVELS, shared)
    assert (again.present, again.made, again.rows) == (2, 1, 3)
    with pytest.raises(ValueError, match="other data or settings"):
        write_ode(PROMPTS, trajectories, LEVELS, replace(shared, settings={"steps": 50}))
    with pytest.raises(ValueError, match="other data or settings"):
        write_ode(PROMPTS, trajectories, (1.0, 0.7, 0.0), shared)


def test_ranks_of_a_sharded_teacher_call_it_equally_often(tmp_path: Path) -> None:
    """7 prompts in files of 3, one at a time: rank 0 has files 0 and 2 (4 calls), rank 1 file 1 (3)."""
    calls: list[list[range]] = [[], []]
    needed = {0: 4, 1: 3}
    for rank in range(2):

        def make(positions: range, prompts: list[str], rank: int = rank) -> Tensor:
            calls[rank].append(positions)
            return trajectories(positions, prompts)

        def most(count: int, rank: int = rank) -> int:
            assert count == needed[rank]
            return max(needed.values())

        write_ode(PROMPTS, make, LEVELS, Job(tmp_path, {}, rows=3, share=Share(rank, 2)), together=most)
    assert [len(each) for each in calls] == [4, 4]
    assert [SafetensorsFolder(tmp_path).read(i, 0).caption for i in range(7)] == PROMPTS
    report = write_ode(PROMPTS, trajectories, LEVELS, Job(tmp_path / "silent", {}), writes=False)
    assert report.rows == 7
    assert not (tmp_path / "silent").exists()


def test_bad_trajectories_are_refused(tmp_path: Path) -> None:
    def run(make: Any = trajectories, levels: tuple[float, ...] = LEVELS, batch: int = 1) -> None:
        write_ode(PROMPTS, make, levels, Job(tmp_path, {}, batch=batch))

    for levels in ((1.0, 0.5), (0.5, 1.0, 0.0), (0.0,), (1.0, 1.0, 0.0)):
        with pytest.raises(ValueError, match="must fall, and end at 0"):
            run(levels=levels)
    with pytest.raises(
        ValueError, match=r"7 trajectories of 2 points are \[B, S, F, C, H, W\], got \[7, 3, 2, 1, 2, 2\]"
    ):
        run(levels=(1.0, 0.0), batch=7)
    with pytest.raises(ValueError, match="prompts 4 to 5 holds NaN"):
        run(lambda p, c: trajectories(p, c) / (0.0 if 4 in p else 1.0), batch=2)
    assert not list(tmp_path.iterdir())


def test_a_folder_is_read_by_its_kind(tmp_path: Path) -> None:
    write_ode(PROMPTS, trajectories, LEVELS, Job(tmp_path / "ode", {}))
    assert isinstance(open_latents(tmp_path / "ode"), SafetensorsFolder)
    (tmp_path / "x.parquet").write_text("")
    (tmp_path / "empty").mkdir()
    for action, message in [
        (lambda: open_latents(tmp_path), "holds parquet and safetensors files: give a folder of one kind"),
        (lambda: open_latents(tmp_path / "absent"), "absent does not exist"),
        (lambda: open_latents(tmp_path / "empty"), "holds no .parquet, .safetensors or data.mdb"),
        (lambda: open_latents(tmp_path / "ode", sigmas=LEVELS), "stores its own noise levels: leave sigmas out"),
    ]:
        with pytest.raises(ValueError, match=message):
            action()


def command(videos: Path, out: Path, *more: str, **encoders: Any) -> int:
    made = Encoders(
        **{"video": vae, "settings": {}, "temporal": 4, "spatial": 16, "statistics": STATISTICS, **encoders}
    )
    arguments = ["--videos", str(videos), "--out", str(out), *more]
    return video_command(arguments, lambda parser: parser.add_argument("--vae"), lambda args: made)


BUCKETS = ("--bucket", "9x32x48", "--bucket", "5x48x32")


def test_the_command_writes_what_fastvideo_reads(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(videos, tmp_path, *BUCKETS, "--raw", "--rows", "4", "--vae", "x", "--fps", "16") == 0
    assert "2 files made (7 rows), 0 were there" in capsys.readouterr().out
    import pyarrow.parquet as pq

    row = pq.read_table(tmp_path / "latents_00000_of_00002.parquet").to_pylist()[1]
    raw = torch.frombuffer(bytearray(row["vae_latent_bytes"]), dtype=torch.float32).view(row["vae_latent_shape"])
    expected = vae(decode_clip(media(videos / "1.mp4"), SIZES[0], Pace(), 16.0)[None])[0]
    assert torch.allclose(STATISTICS.normalise(raw.transpose(0, 1)), expected, atol=1e-5)
    assert (row["width"], row["height"], row["num_frames"], row["fps"]) == (48, 32, 9, 16.0)
    assert row["duration_sec"] == pytest.approx(9 / 16)


def test_the_command_refuses_in_one_line(videos: Path, tmp_path: Path) -> None:
    for arguments, message in [
        (("--bucket", "10x32x48"), "bucket 10x32x48: frames must be 1 .* such as 9 or 13"),
        (("--bucket", "9x30x48"), "multiples of 16"),
        (("--bucket", "9x32"), "write FRAMESxHEIGHTxWIDTH"),
        ((*BUCKETS, "--share", "1"), "i from 0 to n - 1"),
        ((*BUCKETS, "--fps", "30"), "suits a bucket of .* has 16 frames a second, fewer than the 30"),
        ((*BUCKETS, "--captions", "x.csv"), "no such table"),
        ((), "the following arguments are required: --bucket"),
    ]:
        with pytest.raises(UserError, match=message) as error:
            command(videos, tmp_path, *arguments)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="no statistics of its latents"):
        command(videos, tmp_path, *BUCKETS, "--raw", statistics=None)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["parquet", "safetensors"])
def test_a_disk_that_fills_leaves_whole_files_alone(videos: Path, tmp_path: Path, kind: str) -> None:
    clips, out = clips_of(videos), tmp_path / "out"

    def run(out: Path, encode_video: Any = vae) -> Report:
        return encode_videos(clips, Encoding(encode_video, text), Job(out, {}, rows=4), kind=kind)

    with pytest.raises(UserError, match=r"^--out .*file/deep/x could not be written: .*file is a file and no folder"):
        run(through_a_file(tmp_path), lambda pixels: pytest.fail("hours of work"))
    first, second = (f"latents_0000{i}_of_00002.{kind}" for i in range(2))
    refused = pytest.raises(UserError, match=rf"{first} could not be written: File too large: free some space there")
    with files_of_at_most(1000), refused:
        run(out)
    assert names(out) == []
    run(out)
    (out / second).unlink()
    with files_of_at_most(1000), pytest.raises(UserError, match=f"{second} could not be written"):
        run(out)
    assert names(out) == [first]
    assert (run(out).made, names(out)) == (1, [first, second])


def test_trajectories_of_a_full_disk(tmp_path: Path) -> None:
    def run() -> None:
        write_ode(PROMPTS, trajectories, LEVELS, Job(tmp_path, {}, rows=4))

    with files_of_at_most(100), pytest.raises(UserError, match=r"ode_0.* could not be written: File too large: free"):
        run()
    assert names(tmp_path) == []
