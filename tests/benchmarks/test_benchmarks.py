"""The training-step benchmark: it runs, counts what the algorithm needs, and says what it cannot do. No time is judged."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import attention, common, streaming, train_step
from model.attention.backends import Backend
from model.attention.checkpointing import Checkpointing
from planning.meter import FLOPS, Meter


@pytest.mark.slow
def test_one_configuration_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In a process of its own: table, JSON, one thread, tokens at the minimum."""
    out = tmp_path / "new" / "result.json"
    flags = ["--size", "smoke", "--precision", "bf16", "--checkpointing", "full", "--repeats", "1", "--out", str(out)]
    assert train_step.main(flags) == 0
    assert "bf16, checkpointing full, plain" in capsys.readouterr().out
    written = json.loads(out.read_text())
    (result,) = written["results"]
    assert result["tokens"] == result["tokens_minimum"]
    assert len(result["tokens"]) == 8
    assert result["machine"]["threads"] == 1
    assert result["machine"]["torch"] == torch.__version__
    assert len(result["generator"]) == len(result["critic"]) == 4
    assert result["peak_gb"] > 0
    assert result["forward_seconds"] > 0
    assert written["public"] is None  # measured at another size


def test_tokens_are_the_algorithms_minimum() -> None:
    """By hand, for 2 blocks of 3 frames of 4 tokens: exit e costs 6 (e + 1) frames, a cache pass 3, three scores 18."""
    result = train_step.measure(train_step.SIZES["smoke"], "fp32", Checkpointing.none, Backend.PLAIN, 1)
    generator = [4 * (6 * (e + 1) + 3 + 18) for e in range(4)]
    critic = [4 * (6 * (e + 1) + 3 + 6) for e in range(4)]
    assert result["tokens"] == result["tokens_minimum"] == generator + critic


def test_steps_train_what_they_should() -> None:
    work = train_step.Workload(train_step.SIZES["smoke"], "fp32", Checkpointing.full, Backend.PLAIN)
    assert len(work.optimizers["student"].state) == len(list(work.student.net.parameters()))
    found: dict[str, set[str]] = {}
    for name, step in (("student", work.generator_step), ("critic", work.critic_step)):
        seen = found.setdefault(name, set())
        hooks = [
            p.register_post_accumulate_grad_hook(lambda p, n=score.name, seen=seen: seen.add(n))  # type: ignore[misc]
            for score in (work.student, work.critic)
            for p in score.net.parameters()
        ]
        step(2)
        for hook in hooks:
            hook.remove()
    assert found == {"student": {"student"}, "critic": {"critic"}}
    assert not any(p.requires_grad for p in work.teacher.net.parameters())


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the GPU")
def test_true_geometry_without_a_gpu_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert train_step.main(["--size", "1.3b"]) == 2
    error = capsys.readouterr().err
    assert "--size 1.3b needs a CUDA GPU" in error
    assert error.count("\n") == 1


def test_baseline_workload_is_the_published_one() -> None:
    """BASELINE's units: 1344 tokens, 8 layers of 512, blocks of 3, text 64 x 256."""
    size = train_step.SIZES["cpu"]
    c = size.config
    assert (c.dim, c.num_heads, c.num_layers, c.ffn_dim, c.text_len, c.text_dim) == (512, 8, 8, 2048, 64, 256)
    assert size.frames * c.tokens_per_frame(size.height, size.width) == 1344
    assert train_step.SIZES["1.3b"].frames * train_step.PRESETS["1.3b"].tokens_per_frame(60, 104) == 32760


def test_report_puts_the_public_figures_below_ours() -> None:
    units = [8.0, 9.0, 10.0, 11.0]
    ours = {"precision": "fp32", "checkpointing": "full", "backend": "sdpa", "forward_seconds": 1.0, "generator": units}
    ours |= {"critic": units, "tokens": [10], "tokens_minimum": [10], "peak_gb": 1.5}
    counted = {"generator": [8e12] * 4, "critic": [4e12] * 4}
    on_gpu = ours | {"machine": {"gpu": "NVIDIA H200"}, "precision": "bf16"}
    assert train_step.iteration(on_gpu, counted) == {
        "seconds": pytest.approx(9.5 * 1.2), "flops": 5.6e12, "mfu": pytest.approx(5.6 / 9.5 / 1.2 / 989)
    }  # fmt: skip
    on_cpu = train_step.iteration(ours | {"machine": {}}, counted)
    assert on_cpu["mfu"] is None
    ours["iteration"] = on_cpu
    lines = train_step.report([ours], public=True).splitlines()
    assert "9.50" in lines[2]
    assert "1.000 x min" in lines[2]
    assert lines[3].split()[:2] == ["public", "Self-Forcing"]
    assert "9.80" in lines[3]
    assert "1.77" in lines[3]
    assert len(train_step.report([ours], public=False).splitlines()) == 3


def test_operations_are_those_of_every_layer_and_step() -> None:
    """What is counted layer by layer and step by step is what the whole networks compute; the teacher is another one."""
    train_step.PRESETS["other"] = replace(train_step.PRESETS["tiny"], num_layers=3, ffn_dim=128)
    try:
        size = train_step.Size("tiny", 6, 4, 4, "cpu", "other")
        found, meter = train_step.operations(size), Meter()
        with meter.running():
            work = train_step.Workload(size, "fp32", Checkpointing.none, Backend.SDPA)
            for kind, step in (("generator", work.generator_step), ("critic", work.critic_step)):
                for exit_step in range(4):
                    meter.enter((kind, exit_step))
                    step(exit_step)
                    assert found[kind][exit_step] == meter.phases[kind, exit_step].cost[FLOPS]
    finally:
        train_step.PRESETS.pop("other", None)


def test_streaming_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Forwards a block are counted: four steps and a pass for the cache, without that in noisy context."""
    out = tmp_path / "streaming.json"
    assert streaming.main(["--size", "smoke", "--only", "3 sinks", "--out", str(out)]) == 0
    (result,) = json.loads(out.read_text())["results"]
    assert result["forwards_a_block"] == 5
    assert result["frames_per_second"] > 0
    assert result["first_seconds"] > 0
    assert "window 9, 3 sinks" in capsys.readouterr().out
    noisy = streaming.measure(streaming.SIZES["smoke"], streaming.Option("", 9, 3, noisy=True, decoder="tiny"))
    assert noisy["forwards_a_block"] == 4
    assert noisy["cache_gb"] == result["cache_gb"]
    assert streaming.main(["--size", "smoke", "--only", "nothing"]) == 2
    assert streaming.main(["--size", "1.3b"]) == 2
    assert "--size 1.3b needs a CUDA GPU" in capsys.readouterr().err


def test_an_option_that_lacks_a_package_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming.importlib.util, "find_spec", lambda name: None)
    option, out = streaming.Option("all", decoder="vae", fp8=True), tmp_path / "streaming.json"
    assert streaming.lacks(option) == "needs diffusers and torchao: pip install diffusers torchao"
    assert streaming.lacks(streaming.Option("plain", decoder="tiny", compiled=True)) is None
    monkeypatch.setattr(streaming, "CPU_OPTIONS", (option,))
    assert streaming.main(["--size", "smoke", "--out", str(out)]) == 1
    assert json.loads(out.read_text())["results"][0]["refused"].startswith("needs diffusers")


def test_attention_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """42 tokens in 4 tiles of 16: at 0.9 one is kept, at 0.5 two."""
    out = tmp_path / "new" / "attention.json"
    flags = ["--size", "smoke", "--cube", "1", "4", "4", "--sparsity", "0.5", "0.9", "--out", str(out)]
    assert attention.main([*flags, "--repeats", "1", "--only", "sdpa", "reference"]) == 0
    assert "42 tokens, cube (1, 4, 4), 52.4% padding" in capsys.readouterr().out
    written = json.loads(out.read_text())
    names = ["sdpa", "vsa 0.5 reference", "vsa 0.9 reference"]
    assert [r["name"] for r in written["results"]] == names
    assert [r["share"] for r in written["results"]] == [
        1,
        0.5,
        0.25,
    ]
    for r in written["results"]:
        assert r["forward_speedup"] == pytest.approx(written["results"][0]["forward"] / r["forward"])
        flops = 4 * 42 * 42 * 16 * r["share"]
        assert r["forward_tflops"] == pytest.approx(flops / r["forward"] / 1e12)
        assert r["forward_backward_tflops"] == pytest.approx(3.5 * flops / r["forward_backward"] / 1e12)
        assert r["forward_of_roofline"] == pytest.approx(r["forward_tflops"] / written["matmul_tflops"])


def test_attention_that_cannot_run_says_why() -> None:
    size = attention.SIZES["smoke"]
    content = attention.benchmark(size, [], (1, 4, 4), 1, ["sdpa"])
    content["results"].append({"name": "flash", "sparsity": None, "share": 1.0, "forward_refused": "needs flash_attn"})
    assert "flash, forward: needs flash_attn" in attention.report(content)


def test_attention_sizes_are_the_true_ones() -> None:
    tokens = {name: math.prod(size.grid) for name, size in attention.SIZES.items()}
    assert (tokens["480p"], tokens["720p"]) == (32760, 75600)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the GPU")
def test_attention_at_true_size_without_a_gpu_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert attention.main(["--size", "720p"]) == 2
    error = capsys.readouterr().err
    assert "--size 720p needs a CUDA GPU" in error
    assert error.count("\n") == 1


def test_a_worker_that_fails_is_told_in_one_line() -> None:
    with pytest.raises(RuntimeError, match="ended with 2: .*invalid choice") as error:
        common.fresh_process("benchmarks.train_step", ["--precision", "fp8"], 1)
    assert "\n" not in str(error.value)


def test_what_is_not_done_in_time_is_left_out_and_stops_nothing(tmp_path: Path) -> None:
    """A benchmark that has no time to begin says so, and so does one that is cut off or fails."""
    out = tmp_path / "streaming.json"
    assert streaming.main(["--size", "smoke", "--only", "noisy", "--seconds", "0", "--out", str(out)]) == 1
    (result,) = json.loads(out.read_text())["results"]
    assert result["option"]["noisy"]
    assert result["refused"] == "left out: the 0 s of --seconds were over"
    assert "window 9, noisy context: left out" in streaming.report([result])
    cut = common.attempt("benchmarks.streaming", ["--worker", "x"], 1, common.Clock(0.05))
    assert cut == {"refused": "left out: the 0.05 s of --seconds were over"}
    failed = common.attempt("benchmarks.streaming", ["--size", "none"], 1, common.Clock(None))
    assert "invalid choice" in failed["refused"]
    refused = {"precision": "bf16", "checkpointing": "full", "backend": "sdpa", "refused": "no room"}
    assert train_step.report([refused], public=True).endswith("bf16, checkpointing full, sdpa: no room")
    content = attention.benchmark(attention.SIZES["smoke"], [0.5], (1, 4, 4), 1, ["sdpa"], common.Clock(0))
    assert "sdpa, forward: left out" in attention.report(content)


def test_table_aligns() -> None:
    assert common.table(["a", "bb"], [["xyz", "1"]]) == "a    bb\n---  --\nxyz   1"
