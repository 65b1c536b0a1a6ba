"""`python -m benchmarks.gpu_check` where there is no GPU: its budget, what it keeps of a part that is cut off, its table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import attention, failures, gpu_check, streaming, train_step
from benchmarks.common import left_table
from benchmarks.gpu_check import DONE, OUT_OF_TIME, RESERVE, Part, Row, granted
from tests import ROOT

FAILING = """
import time
import pytest

@pytest.fixture
def broken():
    raise RuntimeError("no such device")

@pytest.fixture
def left_behind():
    yield
    raise RuntimeError("still open")

def test_good(): pass
def test_bad(): assert 1 + 1 == 3, "the text of it"
def test_of_a_broken_fixture(broken): pass
def test_torn_down_badly(left_behind): pass
@pytest.mark.skip(reason="not here")
def test_skipped(): pass
"""
HANGING = FAILING + "\ndef test_that_hangs(): time.sleep(600)\n"


def json_rows(path: Path) -> list[Row]:
    content = json.loads(path.read_text()) if path.is_file() else {"results": []}
    return [Row(name, "1 s") for name in content["results"]]


def program(folder: Path, body: str) -> str:
    """Writes a module with this body, which reports results by `write([...])`, and returns the module's name."""
    (folder / "made_up.py").write_text(
        "import json, subprocess, sys, time\nfrom pathlib import Path\n"
        "def write(results): Path(sys.argv[sys.argv.index('--out') + 1]).write_text(json.dumps({'results': results}))\n"
        + body
    )
    return "made_up"


def part(folder: Path, body: str, *, most: float = 60, needs: tuple[str, ...] = ()) -> Part:
    environment = {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    return Part(
        name="some",
        group="train",
        what="some part",
        module=program(folder, body),
        arguments=(),
        least=1,
        most=most,
        rows=json_rows,
        needs=needs,
        environment=environment,
    )


def ran(made: Part, folder: Path, left: float = 600) -> list[Row]:
    return gpu_check.run_part(made, folder, left, log=folder / "log")


def pytest_command(folder: Path, text: str, *options: str) -> list[str]:
    """The command that runs these tests with the plugin, which writes folder/record."""
    file = folder / "test_made_up.py"
    file.write_text(text)
    flags = ["-q", "-p", "no:cacheprovider", "-p", "benchmarks.failures", "--record", str(folder / "record")]
    return [sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", str(folder), str(file), *flags, *options]


def record_of(folder: Path, text: str, *options: str) -> Path:
    """Runs `pytest_command` to its end, which must be a failure, and returns the folder that the plugin wrote."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    assert gpu_check.execute(pytest_command(folder, text, *options), 120, folder / "log", environment) not in (0, None)
    return folder / "record"


# ------------------------------------------------------------------------------------------------------------ failures


@pytest.mark.parametrize("workers", [(), pytest.param(("-n", "2"), marks=pytest.mark.slow)], ids=["plain", "xdist"])
def test_each_failure_is_written_with_its_text(workers: tuple[str, ...], tmp_path: Path) -> None:
    if workers:
        pytest.importorskip("xdist")
    out = record_of(tmp_path, FAILING, *workers)
    text = (out / failures.FAILURES).read_text()
    assert text.count("####") == 3
    for seen in ("test_bad (call)", "the text of it", "test_of_a_broken_fixture (setup)", "no such device"):
        assert seen in text
    assert "test_torn_down_badly (teardown)" in text
    assert "still open" in text
    assert failures.counts(out) == {"passed": 1, "failed": 1, "error": 2, "skipped": 1}


def test_a_failure_is_there_before_the_run_ends(tmp_path: Path) -> None:
    """The last test hangs, and the run is killed: nothing of what ran before is lost."""
    out, command = tmp_path / "record", pytest_command(tmp_path, HANGING)
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while failures.counts(out).get("skipped", 0) == 0 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()
    assert sum(failures.counts(out).values()) == 5
    first = failures.first_failure(out)
    assert first is not None
    assert "test_bad (call): AssertionError: the text of it" in first
    (row,) = gpu_check.test_rows(out)
    assert row.measured == "2 error, 1 failed, 1 passed, 1 skipped"
    assert row.status == f"failed: {first}"


def test_a_file_that_cannot_be_imported_is_a_failure(tmp_path: Path) -> None:
    out = record_of(tmp_path, "import a_package_that_is_not_there\n")
    assert "a_package_that_is_not_there" in (out / failures.FAILURES).read_text()
    assert failures.counts(out) == {"error": 1}


def test_a_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    (tmp_path / failures.TESTS).write_text('{"test": "a", "outcome": "passed", "seconds": 1}\n{"test": "b", "outc')
    assert failures.counts(tmp_path) == {"passed": 1}
    assert failures.counts(tmp_path / "nowhere") == {}
    assert failures.first_failure(tmp_path) is None
    assert gpu_check.test_rows(tmp_path / "nowhere") == []


# -------------------------------------------------------------------------------------------------------------- budget


def test_a_part_gets_its_share_or_is_not_begun(tmp_path: Path) -> None:
    made = Part("a", "train", "", "", (), least=30, most=100, rows=json_rows)
    assert granted(made, 500) == 100
    assert granted(made, 60) == 60 - RESERVE
    assert granted(made, 30 + RESERVE) == 30
    assert granted(made, 29 + RESERVE) is None
    assert granted(made, -10) is None


def test_parts_run_in_the_order_of_their_worth(tmp_path: Path) -> None:
    """All begin within the default time, even if each takes all that it may but the last ones."""
    made = gpu_check.parts(tmp_path)
    groups = [p.group for p in made]
    assert list(dict.fromkeys(groups)) == list(gpu_check.GROUPS)
    assert sorted(groups, key=gpu_check.GROUPS.index) == groups
    assert len({p.name for p in made}) == len(made)
    left = 540.0
    for p in made[:4]:
        seconds = granted(p, left)
        assert seconds is not None
        assert seconds >= p.least
        left -= seconds


def test_parts_are_programs_that_there_are(tmp_path: Path) -> None:
    parsers = {m.__name__: m.parse for m in (train_step, streaming, attention)}
    for p in gpu_check.parts(tmp_path):
        command = gpu_check.command(p, tmp_path, 100.0)
        assert command[:3] == [sys.executable, "-m", p.module]
        if p.group != "tests":
            options = parsers[p.module](command[3:])
            assert options.seconds == 95
            assert options.out == tmp_path / f"{p.name}.json"
        else:
            assert command[-2:] == ["--record", str(tmp_path / "tests")]


@pytest.mark.parametrize("only", ["train,tests", "tests train", " tests, train"])
def test_only_some_parts(only: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(gpu_check.parse(["--only", only]).groups) == {"tests", "train"}
    monkeypatch.setenv("ONLY", only)
    monkeypatch.setenv("OUT", "somewhere")
    options = gpu_check.parse(["300"])
    assert set(options.groups) == {"tests", "train"}
    assert options.seconds == 300
    assert options.out == Path("somewhere")


def test_a_part_that_there_is_not(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ONLY", raising=False)
    assert gpu_check.parse([]).groups == list(gpu_check.GROUPS)
    assert gpu_check.parse([]).seconds == 540
    with pytest.raises(SystemExit):
        gpu_check.parse(["--only", "trian"])
    assert "'trian' is no part: choose from tests, train, streaming, attention" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------- running a part


def test_a_part_that_is_done(tmp_path: Path) -> None:
    assert ran(part(tmp_path, "write(['a', 'b'])"), tmp_path) == [Row("a", "1 s"), Row("b", "1 s")]


def test_a_part_that_is_cut_off_keeps_what_it_wrote(tmp_path: Path) -> None:
    """And what it started ends with it: a process that stayed would keep the GPU's memory."""
    started = "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    body = f"{started}print(child.pid, flush=True)\nwrite(['a'])\ntime.sleep(600)"
    assert ran(part(tmp_path, body, most=3), tmp_path) == [Row("a", "1 s"), Row("some part", status=OUT_OF_TIME)]
    child = Path("/proc") / (tmp_path / "log").read_text().split()[0] / "stat"
    deadline = time.monotonic() + 10
    while child.is_file() and child.read_text().split()[2] != "Z" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not child.is_file() or child.read_text().split()[2] == "Z"


def test_a_part_that_fails_says_why_and_keeps_what_it_wrote(tmp_path: Path) -> None:
    rows = ran(part(tmp_path, "write(['a'])\nraise RuntimeError('CUDA out of memory')"), tmp_path)
    assert rows == [Row("a", "1 s"), Row("some part", status="failed: RuntimeError: CUDA out of memory")]
    assert gpu_check.has_failed(rows)
    assert not gpu_check.has_failed(rows[:1])
    assert ran(part(tmp_path, "sys.exit(3)"), tmp_path) == [Row("some part", status="failed: exit code 3")]


def test_results_of_an_earlier_check_are_not_taken_for_this_ones(tmp_path: Path) -> None:
    ran(part(tmp_path, "write(['old'])"), tmp_path)
    assert ran(part(tmp_path, ""), tmp_path) == [Row("some part", status="failed: it wrote no result")]


def test_a_part_that_is_not_begun_says_why(tmp_path: Path) -> None:
    lacking = part(tmp_path, "write(['a'])", needs=("json", "a_package_that_is_not_there"))
    assert ran(lacking, tmp_path) == [Row("some part", status="skipped: needs a_package_that_is_not_there")]
    late = ran(part(tmp_path, "write(['a'])"), tmp_path, left=1)
    assert late == [Row("some part", status=OUT_OF_TIME)]
    assert not gpu_check.has_failed(late)
    assert not (tmp_path / "some.json").is_file()


def test_a_part_that_fails_stops_no_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """summary.json is written after each part, with the machine."""
    bad, good = tmp_path / "bad", tmp_path / "good"
    for folder in (bad, good):
        folder.mkdir()
    chosen = [part(bad, "raise RuntimeError('no')"), part(good, "write(['a'])")]
    rows = gpu_check.check(chosen, tmp_path, 60, {"gpu": "none"})
    assert [row.status for row in rows] == ["failed: RuntimeError: no", DONE]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["machine"] == {"gpu": "none"}
    assert [Row(**row) for row in summary["rows"]] == rows
    assert "failed: RuntimeError: no" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------ the table


def written(folder: Path, content: dict[str, Any]) -> Path:
    path = folder / "result.json"
    path.write_text(json.dumps(content))
    return path


def test_rows_of_training(tmp_path: Path) -> None:
    done = {"iteration": {"seconds": 6.301, "mfu": 0.409, "flops": 1.0}, "peak_gb": 69.31}
    over = "left out: the 100 s of --seconds were over"
    path = written(tmp_path, {"results": [done, {"compiled": True, "refused": over}, {"refused": "no room\nat all"}]})
    first, second, third = gpu_check.train_rows(path)
    assert first.measured == "6.30 s, MFU 40.9%, 69.3 GB"
    assert first.status == DONE
    assert "12 s" in first.published
    assert second.what.endswith("compiled")
    assert second.status == OUT_OF_TIME
    assert third.status == "failed: no room"
    assert gpu_check.train_rows(tmp_path / "nowhere") == []


def test_rows_of_streaming_have_the_figures_of_their_decoder_beside_them(tmp_path: Path) -> None:
    done = {"frames_per_second": 49.04, "first_seconds": 0.1324}
    results = [
        {"option": {"name": "compiled", "decoder": "none"}} | done,
        {"option": {"name": "compiled, VAE", "decoder": "vae"}, "refused": "needs diffusers: pip install diffusers"},
        {"option": {"name": "compiled, tiny", "decoder": "tiny"}} | done,
    ]
    bare, vae, tiny = gpu_check.stream_rows(written(tmp_path, {"results": results}))
    assert bare.measured == "49.0 FPS, first 0.132 s"
    assert bare.what.endswith("no decoder")
    assert not bare.published
    assert vae.status.startswith("skipped: needs diffusers")
    assert "17.0 FPS" in vae.published
    assert "29.5 FPS" in tiny.published
    assert tiny.status == DONE


def test_rows_of_attention(tmp_path: Path) -> None:
    """Kernels of others that refuse are skipped; ours fail. Published figures stand beside ours at their sparsity."""
    numbers = {"forward": 0.0112, "forward_speedup": 3.04, "forward_backward": 0.0379, "forward_backward_speedup": None}
    results = [
        {"name": "sdpa flash", "sparsity": None, "forward_refused": "No available kernel"},
        {"name": "vsa 0.9 triton", "sparsity": 0.9} | numbers,
        {"name": "vsa 0.8 triton", "sparsity": 0.8, "forward": 0.02, "forward_backward_refused": "out of resource"},
    ]
    path = written(tmp_path, {"tokens": 75600, "heads": 12, "results": results})
    flash, ours, broken = gpu_check.attention_rows(path)
    assert flash.status == "skipped: No available kernel"
    assert not flash.published
    assert ours.measured == "forward 11.20 ms (3.0x), with backward 37.90 ms"
    assert "8.1x" in ours.published
    assert ours.what == "vsa 0.9 triton, 75,600 tokens, 12 heads"
    assert broken.status == "failed: out of resource"
    assert broken.measured == "forward 20.00 ms"


def test_results_of_the_benchmarks_have_what_the_rows_read(tmp_path: Path) -> None:
    """Each benchmark's own JSON, at the tests' size."""
    out = tmp_path / "result.json"
    flags = ["--size", "smoke", "--out", str(out)]
    assert (
        attention.main([*flags, "--cube", "1", "4", "4", "--sparsity", "0.9", "--repeats", "1", "--only", "ref"]) == 0
    )
    assert gpu_check.attention_rows(out)[0].measured.startswith("forward ")
    assert streaming.main([*flags, "--only", "3 sinks"]) == 0
    assert "FPS, first" in gpu_check.stream_rows(out)[0].measured
    assert train_step.main([*flags, "--precision", "fp32", "--checkpointing", "full", "--seconds", "0"]) == 1
    assert gpu_check.train_rows(out)[0].status == OUT_OF_TIME


def test_table() -> None:
    rows = [Row("a", "1 s", "2 s"), Row("long name", status="failed: no room")]
    assert gpu_check.report(rows, {"gpu": "H200", "driver": None}).splitlines() == [
        "what       measured  published  status",
        "---------  --------  ---------  ---------------",
        "a          1 s       2 s        done",
        "long name  -         -          failed: no room",
        "",
        "gpu: H200",
        "driver: None",
    ]
    assert left_table(["a"], []) == "a\n-"


def test_the_machine_and_the_revision_are_recorded() -> None:
    about = gpu_check.describe()
    assert {"gpu", "driver", "torch", "triton", "python", "revision"} - {"gpu"} <= about.keys()
    assert about["torch"] == torch.__version__


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the GPU")
def test_without_a_gpu_it_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main(["--out", str(tmp_path / "new")]) == 2
    error = capsys.readouterr().err
    assert error == "benchmarks.gpu_check: needs a CUDA GPU, and torch sees none\n"
    assert not (tmp_path / "new").exists()


def test_all_of_it_with_parts_that_need_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The exit code says whether anything failed; table.txt is what was printed."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check, "describe", lambda: {"gpu": "none"})
    body = {"text": "write(['a'])"}
    monkeypatch.setattr(gpu_check, "parts", lambda out: [part(tmp_path, body["text"])])
    arguments = ["60", "--only", "train", "--out", str(tmp_path / "out")]
    assert gpu_check.main(arguments) == 0
    assert "gpu: none" in (tmp_path / "out" / "table.txt").read_text()
    body["text"] = "sys.exit('no such file')"
    assert gpu_check.main(arguments) == 1
    assert "failed: no such file" in (tmp_path / "out" / "table.txt").read_text()
    assert gpu_check.main([*arguments[:1], "--only", "attention", *arguments[3:]]) == 0  # this command has no such part
