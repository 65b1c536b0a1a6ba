"""Files of prompts as people have them: separators of Unicode, encodings, CSV cells, folders of parquet."""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from evaluation.command import evaluation_parser
from evaluation.fid_suite import FidArgs, _prompts
from generation.command import inference_args
from generation.preprocess_text import preprocess_text
from tasks.text_cache import TextCache
from utils.cli import text_encoding
from utils.data.media import IMAGES, find_media
from utils.data.prompts import load_prompts

SEPARATORS = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e\r"  # what str.splitlines takes for ends of lines, but not \n
ODD = [f"a{separator}b" for separator in SEPARATORS]


def one_line(message: str) -> pytest.RaisesExc[ValueError]:
    return pytest.RaisesExc(ValueError, match=message, check=lambda error: "\n" not in str(error))


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_only_line_feeds_end_a_line(tmp_path: Path, end: str) -> None:
    (tmp_path / "a.txt").write_bytes(end.join(ODD).encode())
    rows = [json.dumps({"prompt": text}, ensure_ascii=False).replace("\r", "\\r") for text in ODD]
    (tmp_path / "a.jsonl").write_bytes(end.join(rows).encode())
    (tmp_path / "a.csv").write_bytes(end.join(["prompt", *(f'"{text}"' for text in ODD)]).encode())
    for name in ("a.txt", "a.jsonl", "a.csv"):
        assert load_prompts(tmp_path / name) == ODD


def test_captions_of_tables_keep_their_rows(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"file": "a.png", "caption": "one\u2028two"}\n{"file": "b.png", "caption": "x"}')
    (tmp_path / "t.csv").write_text('file,caption\na.png,"one\u2028two"\nb.png,x\n')
    for name in ("t.jsonl", "t.csv"):
        (found,) = find_media(tmp_path, IMAGES, tmp_path / name)
        assert [media.caption for media in found] == ["one two", "x"]
    (tmp_path / "t.csv").write_text('file,caption\na.png,"one\nb.png,x\n')
    with one_line(r"t\.csv, line 2 begins a row with a quote"):
        find_media(tmp_path, IMAGES, tmp_path / "t.csv")


def test_a_file_without_line_feeds_is_no_single_prompt(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"a cat\ra dog\r")
    with one_line(r"a\.txt ends its lines by \\r alone"):
        load_prompts(tmp_path / "a.txt")
    (tmp_path / "a.csv").write_bytes(b"prompt\ra cat\ra dog\r")
    with one_line(r"a\.csv, line 1 has a \\r outside of quotes"):
        load_prompts(tmp_path / "a.csv")


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.jsonl"])
def test_encodings(tmp_path: Path, name: str) -> None:
    """The line that is not in the encoding is named; named by hand, the encoding is read."""
    lines = {"a.txt": "café", "a.csv": "café", "a.jsonl": '{"caption": "café"}'}
    text = "\n".join([{"a.csv": "caption"}.get(name, ""), lines[name], lines[name]])
    for encoding in ("cp1252", "utf-16", "utf-8", "utf-8-sig"):
        (tmp_path / name).write_bytes(text.encode(encoding))
        assert load_prompts(tmp_path / name, text_encoding(encoding)) == ["café", "café"]
    (tmp_path / name).write_bytes(text.encode("cp1252"))
    with one_line(rf"{name}, line 2 is not in UTF-8 \(byte 0xe9\): .*--encoding"):
        load_prompts(tmp_path / name)
    (tmp_path / name).write_bytes(text.encode())
    with one_line(rf"{name}, line 2 is not in ascii \(byte 0xc3\)"):
        load_prompts(tmp_path / name, "ascii")


def test_programs_take_an_encoding(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes("чайка\n".encode("koi8-r"))
    command = ["--run", "x", "--prompts", str(file), "--encoding", "koi8-r"]
    assert inference_args(command).prompts == ("чайка",)
    args = evaluation_parser().parse_args(command)
    asked = FidArgs(None, None, args.prompts, 2, "test", tmp_path, 1, args.encoding)
    assert _prompts(None, asked, None) == ["чайка"] * 2  # type: ignore[arg-type]
    with one_line("--encoding: 'hex' is no encoding of text"):
        inference_args([*command[:-1], "hex"])
    with one_line("--encoding is of a file"):
        inference_args(["--run", "x", "--prompt", "a", "--encoding", "koi8-r"])
    for wrong in ("rot13", "no-such", "a\0b"):
        with pytest.raises(argparse.ArgumentTypeError):
            text_encoding(wrong)


def test_text_is_encoded_from_files_of_another_encoding(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("чайка\n".encode("koi8-r"))
    (tmp_path / "rows").mkdir()
    pq.write_table(pa.table({"prompt": ["волна"]}), tmp_path / "rows/0.parquet")
    (tmp_path / "validation.txt").write_text("лодка", encoding="utf-8")  # which the run reads itself
    command = [
        *("--config_path", "configs/wan2.2_5b/dmd_3step.yaml", "teacher=null", "critic=null", "trainer=diffusion"),
        *("data.real=true", "student.overrides={text_len: 3, text_dim: 4}", "data.kind=synthetic"),
        *("data.prompts=null", f"validation.prompts={tmp_path / 'validation.txt'}"),
        *("--prompts", str(tmp_path / "a.txt"), "--prompts", str(tmp_path / "rows"), "--out", str(tmp_path / "out")),
    ]
    with one_line(r"a\.txt, line 1 is not in UTF-8"):
        preprocess_text(command)
    preprocess_text([*command, "--encoding", "koi8-r"])
    assert TextCache(tmp_path / "out", {"text": (3, 4)}).missing(["чайка", "волна", "лодка"]) == []


def test_csv_cells_of_any_length(tmp_path: Path) -> None:
    long = "word " * 40_000 + "end"
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["id", "prompt"], [1, long], [2, 'a "red", big\ncat']])
    assert load_prompts(tmp_path / "a.csv") == [long, 'a "red", big\ncat']


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('prompt\na cat\n\n"a dog\na fox\n', r"line 4 begins a row with a quote .*\(found in line 5\)"),
        ('prompt\n"a cat\n"a dog"\n', r"line 2 begins a row with a quote .*\(found in line 3\)"),
        ('prompt\n"two\nlines"\n"a "red" cat"\n', "line 4 begins a row with a quote"),
        ("prompt\na cat, a dog\n", r"line 2 has 2 cells and the table 1 columns"),
    ],
)
def test_csv_that_would_lose_text_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.csv").write_text(text)
    with one_line(rf"prompts: .*a\.csv, {message}"):
        load_prompts(tmp_path / "a.csv")


def test_csv_as_people_write_it(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('\n"prompt",id\na 5" disk,1\n"a ""red"" cat"\n\na fox,2,,\n')
    assert load_prompts(tmp_path / "a.csv") == ['a 5" disk', 'a "red" cat', "a fox"]


def test_prompts_of_a_folder_of_parquet_files(tmp_path: Path) -> None:
    folder = tmp_path / "train.v1"
    (folder / "b").mkdir(parents=True)
    for name, column, texts in [("b/0.parquet", "caption", ["four"]), ("a_1.parquet", "prompt", ["two", " ", "three"]),
                                ("a_0.parquet", "prompt", ["one"])]:  # fmt: skip
        pq.write_table(pa.table({column: texts}), folder / name)
    assert load_prompts(folder) == ["one", "two", "three", "four"]
    pq.write_table(pa.table({"text": ["x"]}), folder / "c.parquet")
    with one_line(r"c\.parquet needs a column 'prompt' or 'caption'"):
        load_prompts(folder)
    (tmp_path / "none").mkdir()
    with one_line(r"none holds no \.parquet file"):
        load_prompts(tmp_path / "none")
    pq.write_table(pa.table({"prompt": ["x"]}), tmp_path / "none/p_00001_of_00002.parquet")
    with one_line(r"lacks 1 of 2 files"):
        load_prompts(tmp_path / "none")
