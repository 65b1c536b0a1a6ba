"""Videos and images: which frames a clip has, sizes, buckets, captions, tar shards, and what is broken."""

from __future__ import annotations

import io
import json
import tarfile
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from utils.data.buckets import Info, Pace, Size, check_sizes, choose, cover
from utils.data.clips import Images, Start, VideoClips, decode_clip, plan_clips, probe
from utils.data.media import VIDEOS, Media, Part, find_media
from utils.data.stream import CorruptSample, Stream, TooManyCorrupt

LEVEL = 6  # grey levels between two frames: the codec loses less


def encode(path: Path, frames: int, fps: float = 16, height: int = 32, width: int = 48, **how: Any) -> Path:
    """Frame i is grey LEVEL * i, its left half a little darker, its top row of blocks brighter: one can tell sides."""
    path.parent.mkdir(parents=True, exist_ok=True)
    times = how.get("times") or [i / fps for i in range(frames)]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.options = {"crf": "1", "g": str(how.get("keys", 8)), "bf": "0"}
        stream.codec_context.time_base = Fraction(1, 16000)
        if "rotation" in how:
            stream.set_display_rotation(how["rotation"])
        for i in range(frames):
            picture = np.full((height, width, 3), LEVEL * i, np.uint8)
            picture[: height // 4] = 255
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = round(times[i] * 16000), Fraction(1, 16000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def media(path: Path, caption: str | None = "a caption") -> Media:
    return Media(str(path), Part(path), caption)


def numbers(pixels: torch.Tensor) -> list[int]:
    """Which frames these are, from their grey."""
    return [round(float(frame[:, -4:].mean()) * 255 / LEVEL) for frame in pixels]


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encode(tmp_path_factory.mktemp("videos") / "a.mp4", 40)


@pytest.mark.parametrize(
    ("pace", "begin", "expected"),
    [
        (Pace(), 0.0, [0, 1, 2, 3, 4]),
        (Pace(interval=3), 0.0, [0, 3, 6, 9, 12]),
        (Pace(fps=16), 0.0, [0, 1, 2, 3, 4]),
        (Pace(fps=8), 0.0, [0, 2, 4, 6, 8]),
        (Pace(fps=10), 0.0, [0, 2, 3, 5, 6]),  # times 0, 1.6, 3.2, 4.8, 6.4 in frames, rounded
        (Pace(), 13 / 16, [13, 14, 15, 16, 17]),  # past a key frame
        (Pace(interval=5), 19 / 16, [19, 24, 29, 34, 39]),  # to the very last frame
    ],
)
def test_a_clip_has_the_frames_of_its_times(video: Path, pace: Pace, begin: float, expected: list[int]) -> None:
    pixels = decode_clip(media(video), Size(5, 32, 48), pace, 16.0, begin)
    assert pixels.shape == (5, 3, 32, 48)
    assert pixels.dtype == torch.float32
    assert pixels.min() >= 0
    assert pixels.max() <= 1
    assert numbers(pixels) == expected


def test_a_variable_frame_rate_is_met_by_time(tmp_path: Path) -> None:
    """Frames at 0, 1, 2, 3 sixteenths, then nothing until 8: what was shown in between is frame 3."""
    times = [t / 16 for t in (0, 1, 2, 3, 8, 9, 10)]
    path = encode(tmp_path / "v.mp4", 7, times=times)
    assert numbers(decode_clip(media(path), Size(5, 32, 48), Pace(interval=2), 16.0)) == [0, 2, 3, 3, 4]


def test_a_video_that_ends_early_is_corrupt_and_never_padded(video: Path) -> None:
    with pytest.raises(CorruptSample, match="ends after 4 of the 5 frames"):
        decode_clip(media(video), Size(5, 32, 48), Pace(), 16.0, 36 / 16)


def test_a_clip_covers_its_size_and_is_cropped_in_the_middle(video: Path) -> None:
    wide = decode_clip(media(video), Size(1, 16, 40), Pace(), 16.0)  # scaled to 27x40, then 16 of 27 rows
    assert wide.shape == (1, 3, 16, 40)
    assert (wide[0, :, :1] > 0.9).all()
    assert (wide[0, :, 4:] < 0.1).all()
    tall = decode_clip(media(video), Size(1, 32, 16), Pace(), 16.0)
    assert tall.shape == (1, 3, 32, 16)
    assert (tall[0, :, :7] > 0.9).all()
    assert (tall[0, :, 10:] < 0.1).all()
    assert cover(32, 48, Size(1, 16, 40)) == (27, 40)
    assert cover(32, 48, Size(1, 64, 64)) == (64, 96)


@pytest.mark.parametrize(("degrees", "bright"), [(0, "top"), (90, "left"), (180, "bottom"), (270, "right")])
def test_a_rotated_video_is_turned_upright(degrees: int, bright: str, tmp_path: Path) -> None:
    """Against ffmpeg's own convention: a display rotation is against the clock."""
    path = encode(tmp_path / "r.mp4", 3, rotation=degrees)
    info = probe(media(path))
    turned = degrees % 180 != 0
    assert (info.height, info.width) == ((48, 32) if turned else (32, 48))
    pixels = decode_clip(media(path), Size(1, info.height, info.width), Pace(), 16.0)[0].mean(0)
    edges = {"top": pixels[:4], "bottom": pixels[-4:], "left": pixels[:, :4], "right": pixels[:, -4:]}
    assert max(edges, key=lambda side: float(edges[side].mean())) == bright


def test_headers(video: Path, tmp_path: Path) -> None:
    assert probe(media(video)) == Info(40, 16.0, 32, 48)
    slow = encode(tmp_path / "slow.mp4", 5, fps=10)
    assert probe(media(slow)).fps == pytest.approx(10)
    (tmp_path / "broken.mp4").write_bytes(video.read_bytes()[:300])
    (tmp_path / "text.mp4").write_text("no video")
    for name in ("broken", "text", "absent"):
        with pytest.raises(CorruptSample, match=f"{name}.mp4 cannot be decoded") as error:
            probe(media(tmp_path / f"{name}.mp4"))
        assert "\n" not in str(error.value)


SIZES = [Size(9, 32, 48), Size(5, 32, 48), Size(5, 48, 32), Size(5, 32, 32)]


@pytest.mark.parametrize(
    ("info", "expected"),
    [
        (Info(20, 16, 32, 48), 0),
        (Info(9, 16, 320, 470), 0),
        (Info(8, 16, 32, 48), 1),  # too short for 9 frames
        (Info(20, 16, 90, 50), 2),
        (Info(20, 16, 50, 52), 3),
        (Info(4, 16, 32, 48), None),
        (Info(20, 12, 32, 48), None),
        (Info(10, 32, 32, 48), 1),  # 10 frames of 32 a second are 5 of 16
    ],
)
def test_buckets_suit_length_then_aspect_then_frames(info: Info, expected: int | None) -> None:
    assert choose(info, SIZES, Pace(fps=16))[0] == expected


def test_sizes_that_a_vae_cannot_take_are_refused() -> None:
    check_sizes([Size(81, 480, 832), Size(1, 480, 832)], 4, 16)
    for sizes, message in [
        ([Size(80, 480, 832)], "bucket 80x480x832: frames must be 1 .* a multiple of 4, such as 77 or 81"),
        ([Size(81, 480, 830)], "multiples of 16, such as 480x832"),
        ([], "at least one, such as 81x480x832"),
    ]:
        with pytest.raises(ValueError, match=message):
            check_sizes(sizes, 4, 16)
    assert Size.parse("81x480x832") == Size(81, 480, 832)
    assert str(Size(81, 480, 832)) == "81x480x832"
    for text in ("81x480", "ax1x1", "0x1x1"):
        with pytest.raises(ValueError, match="bucket"):
            Size.parse(text)
    for wrong in ({"fps": 0}, {"interval": 0}, {"fps": 16, "interval": 2}):
        with pytest.raises(ValueError, match="only one of them"):
            Pace(**wrong)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """6 videos of two shapes and lengths, one too short, with captions of both kinds."""
    root = tmp_path_factory.mktemp("folder")
    for i in range(4):
        encode(root / f"w/{i}.mp4", 12 + i)
        (root / f"w/{i}.txt").write_text(f"wide {i}\n")
    for i in range(2):
        encode(root / f"t{i}.mp4", 6, height=48, width=32)
        (root / f"t{i}.json").write_text(json.dumps({"caption": f"tall {i}", "fps": 16}))
    encode(root / "short.mp4", 3)
    (root / "short.txt").write_text("short")
    return root


def test_a_folder_is_bucketed_and_streamed(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    shards = find_media(folder)
    assert [Path(item.name).name for item in shards[0]] == [
        "short.mp4", "t0.mp4", "t1.mp4", "0.mp4", "1.mp4", "2.mp4", "3.mp4"
    ]  # fmt: skip
    plan = plan_clips(shards, SIZES, Pace(fps=16), threads=2)
    assert plan.bucket_of == {1: 2, 2: 2, 3: 0, 4: 0, 5: 0, 6: 0}
    assert "1 of 7 videos suit no bucket" in caplog.text
    assert "short.mp4 has 3 frames, and the shortest" in caplog.text
    clips = VideoClips(shards, plan, SIZES, Pace(fps=16), Start.random, seed=0)
    stream = Stream(clips, clips.order(batch=2, seed=0), 0)
    batches = [stream.samples(range(start, start + 2)) for start in range(0, 24, 2)]
    for batch in batches:
        assert len({sample.pixels.shape for sample in batch}) == 1
        for sample in batch:
            wide = sample.caption.startswith("wide")
            assert sample.pixels.shape == ((9, 3, 32, 48) if wide else (5, 3, 48, 32))
            start, *rest = numbers(sample.pixels)
            assert [start, *rest] == list(range(start, start + len(rest) + 1))
    names = [sample.name for batch in batches for sample in batch]
    assert all(names.count(name) == 4 for name in set(names))
    assert len(set(names)) == 6
    starts = {(s.name, numbers(s.pixels)[0]) for batch in batches for s in batch}
    assert len(starts) > 8  # begun elsewhere when it comes again
    again = Stream(clips, clips.order(batch=2, seed=0), 0).sample(17)
    assert again.name == names[17]
    assert torch.equal(again.pixels, batches[8][1].pixels)


def test_where_a_clip_begins(folder: Path) -> None:
    shards = find_media(folder)
    plan = plan_clips(shards, SIZES, Pace(), threads=1)
    starts = (Start.first, Start.middle, Start.random)
    first, middle, anywhere = (VideoClips(shards, plan, SIZES, Pace(), start) for start in starts)
    assert numbers(first.read(6, 5).pixels)[0] == 0  # 15 frames, a clip of 9
    assert numbers(middle.read(6, 5).pixels)[0] == 3
    begins = [round(anywhere._begin(plan.infos[6], SIZES[0], position) * 16) for position in range(60)]
    assert set(begins) == set(range(7))  # each start that leaves 9 frames
    assert all(numbers(anywhere.read(6, p).pixels)[0] == begins[p] for p in (0, 7, 23))


def test_headers_are_kept_and_only_new_files_are_opened(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, opened = tmp_path / "headers.json", list[str]()
    monkeypatch.setattr("utils.data.clips.probe", lambda item: opened.append(item.name) or probe(item))
    plan = plan_clips(find_media(folder), SIZES, Pace(), cache=cache, threads=2)
    assert len(opened) == 7
    assert plan_clips(find_media(folder), SIZES, Pace(), cache=cache) == plan
    assert len(opened) == 7
    cache.write_text("{")
    assert plan_clips(find_media(folder), SIZES, Pace(), cache=cache) == plan
    assert len(opened) == 14
    assert [path.name for path in tmp_path.iterdir()] == ["headers.json"]


def pack(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_webdataset_shards_give_what_the_folder_gives(folder: Path, tmp_path: Path) -> None:
    files = {file.relative_to(folder).as_posix(): file.read_bytes() for file in sorted(folder.rglob("*.*"))}
    pack(tmp_path / "00000.tar", {name: data for name, data in files.items() if name.startswith("w/")})
    pack(tmp_path / "00001.tar", {name: data for name, data in files.items() if not name.startswith("w/")})
    shards = find_media(tmp_path)
    assert [len(shard) for shard in shards] == [4, 3]
    assert shards[0][1].name == f"{tmp_path}/00000.tar:w/1.mp4"
    clips = VideoClips(shards, plan_clips(shards, SIZES, Pace(), threads=1), SIZES, Pace(), Start.first)
    assert clips.shard_sizes == [4, 3]
    assert clips.buckets()[0] == [[0, 1, 2, 3], []]
    for item, name, caption in [(1, "w/1.mp4", "wide 1"), (6, "t1.mp4", "tall 1")]:
        plain = media(folder / name)
        sample = clips.read(item, 0)
        size = SIZES[clips.plan.bucket_of[item]]
        assert torch.equal(sample.pixels, decode_clip(plain, size, Pace(), 16.0))
        assert sample.caption == caption
    assert len(find_media(tmp_path / "00000.tar")[0]) == 4


def test_damaged_tars_are_refused_by_name(folder: Path, tmp_path: Path) -> None:
    pack(tmp_path / "a.tar", {"x.mp4": (folder / "t0.mp4").read_bytes(), "x.txt": b"c"})
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "b.tar").write_bytes(whole[:1024])
    (tmp_path / "c.tar").write_text("no tar")
    for name in ("b", "c"):
        with pytest.raises(ValueError, match=f"{name}.tar is damaged, or no uncompressed tar") as error:
            find_media(tmp_path / f"{name}.tar")
        assert "\n" not in str(error.value)
    pack(tmp_path / "d.tar", {"x.txt": b"c"})
    with pytest.raises(ValueError, match="holds no .mp4"):
        find_media(tmp_path / "d.tar")


@pytest.mark.parametrize("kind", ["csv", "jsonl", "json", "parquet"])
def test_tables_of_captions(kind: str, folder: Path, tmp_path: Path) -> None:
    rows = [{"path": "w/2.mp4", "caption": "two,  2"}, {"path": "t0.mp4", "caption": "a tall one"}]
    table = tmp_path / f"captions.{kind}"
    if kind == "csv":
        table.write_text('path,caption\nw/2.mp4,"two,  2"\nt0.mp4,a tall one\n')
    elif kind == "jsonl":
        table.write_text("\n".join(map(json.dumps, rows)))
    elif kind == "json":  # FastVideo's: several captions
        table.write_text(json.dumps([{"path": row["path"], "cap": [row["caption"], "other"]} for row in rows]))
    else:
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        pq.write_table(pa.Table.from_pylist(rows), table)
    (shard,) = find_media(folder, VIDEOS, table)
    assert [item.text() for item in shard] == ["two, 2", "a tall one"]
    assert shard[0].part.path == folder / "w/2.mp4"


def test_bad_captions(folder: Path, tmp_path: Path) -> None:
    for name, text, message in [
        ("a.csv", "id,caption\n1,x\n", r"row 1 needs a file \(column file, .* it has \['caption', 'id'\]"),
        ("a.csv", "file,caption\n", "names no file"),
        ("a.jsonl", "{", "cannot read the table of captions"),
        ("a.json", "[1]", "row 1 is no table of fields but 1"),
        ("a.xlsx", "", "give a .csv, .jsonl, .json or .parquet"),
    ]:
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=message) as error:
            find_media(folder, VIDEOS, tmp_path / name)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="no such table"):
        find_media(folder, VIDEOS, tmp_path / "absent.csv")
    with pytest.raises(ValueError, match="no such file or folder"):
        find_media(tmp_path / "absent")
    (tmp_path / "v").mkdir()
    for name, caption in [("none", None), ("empty", " \n"), ("bytes", b"\xff\xfe\xff")]:
        (tmp_path / f"v/{name}.mp4").write_bytes(b"")
        if caption is not None:
            (tmp_path / f"v/{name}.txt").write_bytes(caption if isinstance(caption, bytes) else caption.encode())
    broken = {Path(item.name).stem: item for item in find_media(tmp_path / "v")[0]}
    for name, message in [("none", "has no caption"), ("empty", "is empty"), ("bytes", "cannot be read")]:
        with pytest.raises(CorruptSample, match=message):
            broken[name].text()


def test_broken_videos_are_named_and_too_many_end_it(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for i in range(3):
        (tmp_path / f"{i}.mp4").write_bytes((folder / "t0.mp4").read_bytes())
        (tmp_path / f"{i}.txt").write_text("c")
    (tmp_path / "bad.mp4").write_bytes(b"x" * 100)
    shards = find_media(tmp_path)
    with pytest.raises(
        TooManyCorrupt, match=r"1 of 4 samples are corrupt.*bad.mp4 cannot be decoded.*raise --max_corrupt"
    ):
        plan_clips(shards, SIZES, Pace())
    plan = plan_clips(shards, SIZES, Pace(), max_corrupt=0.5)
    assert sorted(plan.bucket_of) == [0, 1, 2]
    assert "bad.mp4" in caplog.text
    with pytest.raises(ValueError, match="none of 4 videos suits a bucket of 99x32x48: .* has 6 frames"):
        plan_clips(shards, [Size(99, 32, 48)], Pace(), max_corrupt=0.5)
    (tmp_path / "1.mp4").write_bytes((folder / "t0.mp4").read_bytes()[:-2000])  # its header was fine when planned
    clips = VideoClips(shards, plan, SIZES, Pace(), Start.first)
    stream = Stream(clips, clips.order(1, 0), 0, max_corrupt=1)
    names = {Path(sample.name).stem for sample in stream.samples(range(9))}
    assert names == {"0", "2"}
    assert "1.mp4" in next(iter(stream.faults.reasons.values()))


def test_images(tmp_path: Path) -> None:
    gradient = np.zeros((20, 40, 3), np.uint8)
    gradient[:, 20:] = 255
    Image.fromarray(gradient).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("half")
    (tmp_path / "b.png").write_bytes(b"\x89PNG\r\n")
    (tmp_path / "b.txt").write_text("broken")
    from utils.data.media import IMAGES

    images = Images(find_media(tmp_path, IMAGES), Size(1, 16, 16))
    sample = images.read(0, 0)
    assert sample.pixels.shape == (1, 3, 16, 16)
    assert sample.caption == "half"
    assert (sample.pixels[..., :6] < 0.05).all()
    assert (sample.pixels[..., 10:] > 0.95).all()
    with pytest.raises(CorruptSample, match="b.png cannot be decoded"):
        images.read(1, 0)
