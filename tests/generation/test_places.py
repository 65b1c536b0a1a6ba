"""Names of videos: of every script, one for each prompt; and folders that go on with more prompts."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from generation.command import inference_args
from generation.generator import Generator
from generation.places import places, slug
from generation.sampling import Sampling
from generation.videos import check_out, generate_videos
from tests.small import DISTILLATION, trainer
from utils.errors import UserError

PROMPTS = ["the digit three moving left", "the digit seven moving up"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("student")
    trainer(path, DISTILLATION, max_steps=1).train()
    return path


def name_of(prompt: str, out: Path = Path("videos")) -> str:
    (path,), _ = places(inference_args(["--run", "x", "--prompt", prompt, "--out", str(out)]))
    return path.name


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("A red fox, at 5 p.m.!", "a-red-fox-at-5-p-m"),
        ("-" * 9 + "x" * 47 + " yz", "x" * 47),
        ("一只红色的狐狸，在雪地里", "一只红色的狐狸-在雪地里"),
        ("Ein Füchschen läuft", "ein-füchschen-läuft"),
        ("Лиса бежит по снегу", "лиса-бежит-по-снегу"),
        ("एक लाल लोमड़ी", "एक-लाल-लोमड़ी"),  # vowel signs are marks
        ("\u0301 ثعلب أحمر", "ثعلب-أحمر"),
        ("狐" * 40, "狐" * 32),
        ("a" + "狐" * 40, "a" + "狐" * 31),  # no half of a character
        ("🦊 ?!", "empty"),
    ],
)
def test_names_keep_letters_of_every_script(prompt: str, name: str) -> None:
    assert slug(prompt) == slug(unicodedata.normalize("NFD", prompt)) == unicodedata.normalize("NFC", name)
    assert len(slug(prompt).encode()) <= 96


def test_plain_names_are_as_ever() -> None:
    for prompt in ("A cat_with 3 dogs", "  Ends-with: ", "x" * 60, "--", "a" * 47 + "--b"):
        assert slug(prompt) == (re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:48].rstrip("-") or "empty")


def test_no_two_prompts_have_one_name() -> None:
    long = "the digit three moving left and then it turns around to go "
    prompts = [
        *("a cat", "A cat", "a cat.", "a-cat", "a  cat", "🦊", "🐱", "?", "empty", "一只猫", "一只狗", "一只狗。"),
        *("café", unicodedata.normalize("NFD", "café"), long + "up", long + "down", "狐" * 40, "狐" * 41),
    ]
    names = [name_of(prompt) for prompt in prompts]
    assert len({unicodedata.normalize("NFC", name.lower()) for name in names}) == len(prompts)
    assert names[0] == "0000_a-cat.mp4"  # which nothing but these words has
    assert names[9] == "0000_一只猫.mp4"
    assert re.fullmatch(r"0000_a-cat_[0-9a-f]{12}\.mp4", names[1])
    assert max(len(name.encode()) for name in names) <= 143


def test_prompts_in_one_folder_replace_nothing(
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    generator = Generator.load(run, torch.device("cpu"))
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS))
    common = ["--run", str(run), "--format", "safetensors", "--out"]
    singles, numbered = str(tmp_path / "one"), str(tmp_path / "many")
    for prompt in (PROMPTS[0], PROMPTS[0].replace("the", "The"), PROMPTS[0]):
        generate_videos(generator, inference_args([*common, singles, "--prompt", prompt]))
    assert capsys.readouterr().out.count("it is made again, and replaced") == 1
    assert len(list(Path(singles).glob("*.safetensors"))) == 2
    with pytest.raises(UserError, match=rf"0000_{slug(PROMPTS[0])}\.safetensors was made from no file of prompts"):
        generate_videos(generator, inference_args([*common, singles, "--prompts", str(tmp_path / "p.txt")]))
    generate_videos(generator, inference_args([*common, numbered, "--prompts", str(tmp_path / "p.txt")]))
    with pytest.raises(UserError, match="is there already, of a file of prompts: give another folder"):
        check_out(inference_args([*common, numbered, "--prompt", PROMPTS[0]]))


def test_prompts_that_are_added_extend_a_folder(
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file, out, generator = tmp_path / "p.txt", tmp_path / "out", Generator.load(run, torch.device("cpu"))
    command = ["--run", str(run), "--prompts", str(file), "--format", "safetensors", "--out", str(out)]

    def make(*prompts: str) -> str:
        file.write_text("\n".join(prompts))
        generate_videos(generator, inference_args(command))
        return capsys.readouterr().out

    make(PROMPTS[0])
    (first,) = out.glob("*.safetensors")
    stamp = first.stat().st_mtime_ns
    said = make(*PROMPTS)
    assert "is of the first 1 of 2 prompts: the others are added" in said
    assert "1 of 2 videos are there already" in said
    assert first.stat().st_mtime_ns == stamp
    found = torch.stack([load_file(path)["latents"] for path in sorted(out.glob("*.safetensors"))])
    torch.testing.assert_close(found, generator(PROMPTS, Sampling(), [0, 1]), rtol=1e-4, atol=1e-5)
    assert "are added" not in make(*PROMPTS)
    for others in ([PROMPTS[0]], PROMPTS[::-1], [*PROMPTS[::-1], "x"], [PROMPTS[0], "x", PROMPTS[1]]):
        with pytest.raises(UserError, match=r"made with other settings \(prompts\)"):
            make(*others)
