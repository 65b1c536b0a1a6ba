"""Files that are broken, hostile or enormous, one of each kind; tests/fuzz has many of them."""

from __future__ import annotations

import math
import struct
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from configs.load import load_run, run_from_plain
from generation.command import inference_args
from model.wan.lora_files import LoraFile
from model.wan.weights import LazyWeights
from tests import ROOT, small
from utils.data.buckets import Size
from utils.data.clips import decode_image
from utils.data.media import Media, Part
from utils.data.prompts import load_prompts
from utils.data.stream import CorruptSample
from utils.errors import ConfigError, UserError
from utils.reading import reading
from utils.video import write_video

NAMES = [f"blocks.0.self_attn.q.lora_{part}.weight" for part in "AB"]


def refused(match: str, kind: type[Exception] = UserError):
    return pytest.raises(kind, match=match)


def test_whatever_is_raised_becomes_one_line_and_an_interrupt_does_not() -> None:
    for problem in (
        RecursionError(),
        MemoryError(),
        KeyError("x"),
        OSError(5, "no"),
        Exception("a\nb"),
        AssertionError(),
    ):
        with pytest.raises(UserError, match=r"^LoRA: f cannot be read \(.+\): fetch") as caught, reading("LoRA", "f"):
            raise problem
        assert "\n" not in str(caught.value)
    with pytest.raises(KeyboardInterrupt), reading("LoRA", "f"):
        raise KeyboardInterrupt
    with pytest.raises(CorruptSample, match="^as it is$"), reading("LoRA", "f", error=CorruptSample):
        raise UserError("as it is")


BOMB = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{below}'] * 10)}]\n" for below, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (BOMB, "line 6 asks for .* values and the limit is"),
        ("a: &a [*a]", r"\*a stands for what it lies in"),
        ("name: !!binary aGVsbG8=", "line 2: !!binary is neither text nor a number"),
        ("name: !!set {a, b}", "line 2: !!set"),
        ("name: !!timestamp 2024-01-01", "line 2: !!timestamp"),
        ("seed: " + "9" * 5000, "cannot be read .*4300 digits"),
        ("ema: {decay: 1" + "0" * 400 + "}", "ema.decay: a number of .* bits is not allowed"),
        ("name: " + "[" * 100_000, "nest"),
        ("name: " + "a" * 10_000_000, "asks for 10000.* bytes and the limit is 262144"),
        ("name: ${oc.env:HOME}", "name: .* calls oc.env: HOME is of this machine's environment: write its value"),
        ("data: {prompts: '${${name}:HOME}'}", "calls"),
    ],
    ids=lambda text: text[:20],
)
def test_hostile_recipes(tmp_path: Path, text: str, match: str) -> None:
    (tmp_path / "r.yaml").write_text(f"base: {ROOT / 'configs/toy/teacher.yaml'}\n{text}")
    with refused(match, ConfigError) as caught:
        load_run(tmp_path / "r.yaml")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_a_long_chain_of_recipes(tmp_path: Path) -> None:
    for number in range(1, 1200):
        (tmp_path / f"{number}.yaml").write_text(f"base: {number - 1}.yaml\n")
    (tmp_path / "0.yaml").write_text("seed: 1\n")
    with refused("more than 32 files lie below", ConfigError):
        load_run(tmp_path / "1199.yaml")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_of_configs_made_in_python_are_finite(bad: float) -> None:
    config = small.config()
    config.critic_training.optimizer.clip_norm = bad
    from configs.checks import check_run

    with refused("critic_training.optimizer.clip_norm must be finite", ValueError):
        check_run(config)
    with refused("give", ConfigError):
        run_from_plain({"generator_training": {"optimizer": {"lr": bad}}})


def png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    rows = zlib.compress((b"\0" * (1 + 3 * width)) * height if width * height < 100_000 else b"")
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("width", "height"), [(30_000, 30_000), (2**31 - 1, 2**31 - 1), (1, 30_000)])
def test_a_small_image_that_would_be_enormous_is_a_corrupt_sample(tmp_path: Path, width: int, height: int) -> None:
    (tmp_path / "a.png").write_bytes(png(width, height))
    with refused(r"a\.png .*asks for \d+ pixels and the limit is", CorruptSample):
        decode_image(Media("a.png", Part(tmp_path / "a.png"), ""), Size(1, 480, 832))


def test_sparse_and_odd_prompt_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "p.txt").open("wb") as file:
        file.truncate(1 << 30)
    with refused("asks for 1073741824 bytes and the limit is"):
        load_prompts(tmp_path / "p.txt")
    for name, text in [
        ("p.csv", 'prompt\n"' + "a" * 2_000_000 + '"\n'),
        ("a.jsonl", '{"prompt": "\\ud800"}'),
        ("b.jsonl", "[" * 100_000),
    ]:
        (tmp_path / name).write_text(text)
        with refused(f"prompts: .*{name}"):
            load_prompts(tmp_path / name)
    (tmp_path / "q.txt").write_text("a" * 50)
    monkeypatch.setenv("FEWSTEP_LIMITS", "line=40")
    with refused("FEWSTEP_LIMITS=line=50"):
        load_prompts(tmp_path / "q.txt")
    monkeypatch.setenv("FEWSTEP_LIMITS", "lines=40")
    with refused("'lines=40' is no limit"):
        load_prompts(tmp_path / "q.txt")


@pytest.mark.parametrize(
    "option",
    ["--frames 1000000000", "--steps 1000000", "--fps 100000", "--guidance nan", "--size 999999x8", f"--seed {10**30}"],
)
def test_options_that_no_video_has(option: str) -> None:
    with refused(option.split()[0]):
        inference_args(["--run", "x", "--prompt", "a", *option.split()])


def test_pixels_of_a_scale_are_counted_before_they_are_made(tmp_path: Path) -> None:
    with refused("scale 100000 asks for"):
        write_video(tmp_path / "a.mp4", torch.zeros(1, 3, 8, 8), 8, scale=100_000)
    with refused("NaN or infinity"):
        write_video(tmp_path / "a.mp4", torch.full((1, 3, 8, 8), math.nan), 8)


def read_all(path: Path) -> None:
    weights = LazyWeights(path)
    list(weights.read(weights.shapes))


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (torch.full((4, 4), math.nan), "norm_k.weight holds NaN or infinity"),
        (torch.ones(4, 4, dtype=torch.int32), "norm_k.weight is of torch.int32"),
        (torch.ones(4, 4, dtype=torch.complex64), "norm_k.weight is of torch.complex64"),
        (torch.ones(4, 4).to_sparse(), "norm_k.weight is sparse"),
        (torch.ones(4, 4, device="meta"), "norm_k.weight is without numbers"),
        (torch.quantize_per_tensor(torch.ones(4, 4), 0.1, 0, torch.qint8), "norm_k.weight is quantised"),
    ],
)  # fmt: skip
def test_weights_that_are_no_real_numbers(tmp_path: Path, value: torch.Tensor, match: str) -> None:
    torch.save({"blocks.0.self_attn.norm_k.weight": value}, tmp_path / "x.pt")
    with refused(match, ValueError) as caught:
        read_all(tmp_path / "x.pt")
    assert "x.pt" in str(caught.value)


def test_a_packed_torch_file_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", b"\0" * 1_000_000)
    with refused("data.pkl is packed and asks for 1000000 bytes", ValueError):
        read_all(tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("down", "up", "config", "match"),
    [
        (torch.ones(0, 4), torch.ones(4, 0), "{}", "has rank 0"),
        (torch.ones(4), torch.ones(4), "{}", "are no matrices"),
        (torch.ones(1, 4), torch.ones(4, 1), '{"lora_alpha": "x"}', "alpha 'x' is no finite number"),
        (torch.ones(1, 4), torch.ones(4, 1), '{"lora_alpha": NaN}', "alpha nan is no finite number"),
        (torch.ones(1, 4), torch.ones(4, 1), '{"lora_alpha": 1, "alpha_pattern": {"(": 1}}', "regular expressions"),
        (torch.ones(1, 4), torch.ones(4, 1), "[" * 100_000, "nested too deep"),
        (torch.full((1, 4), math.inf), torch.ones(4, 1), "{}", "lora_A.weight holds NaN or infinity"),
        (torch.ones(1, 4).bool(), torch.ones(4, 1), "{}", "lora_A.weight is of torch.bool"),
    ],
)
def test_hostile_adapters(tmp_path: Path, down: torch.Tensor, up: torch.Tensor, config: str, match: str) -> None:
    save_file(dict(zip(NAMES, (down, up), strict=True)), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(config)
    with refused(match, ValueError) as caught:
        for change in LoraFile(tmp_path, {"blocks.0.self_attn.q.weight": (4, 4)}).changes.values():
            assert change.down is not None
            change.down.read()
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_a_short_lmdb_is_refused_and_not_mapped(tmp_path: Path) -> None:
    lmdb = pytest.importorskip("lmdb")
    from utils.data.lmdb_store import LMDBFolder

    def made(shape: bytes) -> Path:
        with lmdb.open(str(tmp_path), map_size=1 << 20) as opened, opened.begin(write=True) as view:
            view.put(b"latents_shape", shape)
            view.put(b"latents_0_data", b"\0" * 20_000)
        return tmp_path

    with refused("asks for 1000000000000 rows", ValueError):
        LMDBFolder(made(b"1000000000000 2 3 4 4"))
    with refused("rows of 2400000000 bytes, and holds 2 values", ValueError):
        LMDBFolder(made(b"1 2 3 50000000 4"))
    with (tmp_path / "data.mdb").open("r+b") as file:
        file.truncate(8192 + 100)
    with refused("data.mdb is cut short: 8292 bytes of", ValueError):
        LMDBFolder(tmp_path)
