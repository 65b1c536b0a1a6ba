"""A run's network as others load it: stock Diffusers, Wan's own names, atomic folders, adapters."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from configs.schema import RunConfig
from generation import export
from generation.adapters import Adapter, save_lora
from model.attention.backends import Backend
from model.export import Dtype, NoExporter
from model.wan.export import WanExporter
from model.wan.family import FAMILY
from model.wan.transformer import WanTransformer
from model.wan.weights import LazyWeights
from tests.small import DIFFUSION, DISTILLATION, config
from trainer.network_factory import NetworkSpec, build_network
from utils import checkpoint
from utils.config import to_plain
from utils.errors import UserError

CPU = torch.device("cpu")
NETWORKS = {"student": 1, "student_ema": 2, "critic": 3}
BIDIRECTIONAL = {
    "rollout": {"kind": "backward_simulation"},
    "schedule": {"denoising_step_list": [1000, 600, 300], "timestep_shift": 3.0},
}


def network(run: RunConfig, seed: int) -> WanTransformer:
    """Random weights, none of them zero."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = WanTransformer(run.student.geometry(), Backend.PLAIN)
        with torch.no_grad():
            net.head.head.weight.normal_(std=0.1)
    return net.eval()


def make_run(folder: Path, run: RunConfig) -> Path:
    tensors = {name: dict(network(run, seed).state_dict()) for name, seed in NETWORKS.items()}
    checkpoint.save(folder / "checkpoints", 5, tensors, {"config": to_plain(run)})
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"), config(DISTILLATION, **BIDIRECTIONAL))


@pytest.fixture
def stock(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Diffusers. Without accelerate it loads no model that keeps some modules in fp32, as Wan's does whatever it loads:
    then that wish, which says nothing at fp32, is taken back."""
    diffusers = pytest.importorskip("diffusers")
    if importlib.util.find_spec("accelerate") is None:
        monkeypatch.setattr(diffusers.WanTransformer3DModel, "_keep_in_fp32_modules", None)
    return diffusers


def exported(run: Path, out: Path, *options: str, format: str = "diffusers") -> Path:
    return export.export(export.export_args(["--run", str(run), "--format", format, "--out", str(out), *options]))


def parts(latent_channels: int, text_dim: int) -> dict[str, Any]:
    """A VAE and a text encoder of the real classes, small and random."""
    from diffusers import AutoencoderKLWan
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    statistics = {"latents_mean": [0.0] * latent_channels, "latents_std": [1.0] * latent_channels}
    vae = AutoencoderKLWan(**statistics, base_dim=3, z_dim=latent_channels, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True])  # fmt: skip
    text = UMT5Config(vocab_size=8, d_model=text_dim, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return {"vae": vae.eval(), "text_encoder": UMT5EncoderModel(text).eval(), "tokenizer": None}


@pytest.mark.parametrize(("dtype", "weights"), [("fp32", "ema"), ("bf16", "raw"), ("fp8", "ema")])
def test_stock_diffusers_loads_it_and_computes_the_same(
    run: Path, tmp_path: Path, stock: Any, dtype: str, weights: str
) -> None:
    exported(run, tmp_path / "out", "--dtype", dtype, "--weights", weights)
    theirs = stock.WanTransformer3DModel.from_pretrained(tmp_path / "out", subfolder="transformer")
    settings = config(DISTILLATION, **BIDIRECTIONAL)
    ours = network(settings, NETWORKS["student_ema" if weights == "ema" else "student"])
    with torch.no_grad():
        for name, p in ours.named_parameters():  # what rounding to the stored precision makes of them
            big = name.startswith("blocks.") and p.ndim == 2 and name.endswith(".weight")
            kind = {
                "fp32": torch.float32,
                "bf16": torch.bfloat16,
                "fp8": torch.float8_e4m3fn if big else torch.bfloat16,
            }
            p.copy_(p.to(kind[dtype]).float())
    geometry = settings.student.geometry()
    x = torch.randn(2, 3, geometry.in_dim, 4, 6)
    text = torch.randn(2, geometry.text_len, geometry.text_dim)
    sigma = torch.tensor([0.3, 0.9])
    with torch.no_grad():
        expected = theirs(x.transpose(1, 2), 1000 * sigma, text, return_dict=False)[0].transpose(1, 2)
        torch.testing.assert_close(ours(x, sigma, text), expected, rtol=1e-4, atol=1e-5)
    assert expected.std() > 0.1


def test_the_exported_pipeline_samples_as_the_student_does(run: Path, tmp_path: Path, stock: Any) -> None:
    """WanPipeline on the exported folder, with the lines of its README, is our few-step sampler on the same noise."""
    from functools import partial

    settings = config(DISTILLATION, **BIDIRECTIONAL)
    geometry, folder = settings.student.geometry(), exported(run, tmp_path / "out")
    pipe = stock.WanPipeline.from_pretrained(folder, **parts(geometry.in_dim, geometry.text_dim))
    steps = json.loads((folder / "README.md").read_text().split("steps = ")[1].split("\n")[0])
    assert steps == pytest.approx([1.0, 0.6, 0.3])
    assert "block by block" not in (folder / "README.md").read_text()
    pipe.scheduler.set_timesteps = partial(pipe.scheduler.set_timesteps, sigmas=steps)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(1, geometry.in_dim, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    text = torch.randn(1, geometry.text_len, geometry.text_dim, generator=torch.Generator().manual_seed(2))
    torch.manual_seed(3)  # the pipeline does not hand its generator to the scheduler
    video = pipe(
        prompt_embeds=text, latents=noise, num_inference_steps=3, guidance_scale=1.0, num_frames=9, height=32, width=32,
        output_type="latent",
    ).frames  # fmt: skip

    net, draws, sigmas = (
        network(settings, NETWORKS["student_ema"]),
        torch.Generator().manual_seed(3),
        settings.schedule.sigmas(),
    )
    x = noise.transpose(1, 2)
    with torch.no_grad():
        for sigma, following in zip(sigmas, (*sigmas[1:], 0.0), strict=True):
            x0 = x - sigma * net(x, torch.tensor([sigma]), text)
            again = torch.randn(noise.shape, generator=draws).transpose(1, 2)
            x = (1 - following) * x0 + following * again
    torch.testing.assert_close(video.transpose(1, 2), x, rtol=1e-3, atol=1e-4)


def test_a_teacher_gets_wans_own_solver_and_a_causal_student_a_warning(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    teacher = exported(make_run(tmp_path / "teacher", config(DIFFUSION)), tmp_path / "t")
    scheduler = diffusers.UniPCMultistepScheduler.from_pretrained(teacher, subfolder="scheduler")
    scheduler.set_timesteps(4)
    assert scheduler.config.flow_shift == 3.0
    assert scheduler.config.prediction_type == "flow_prediction"
    assert float(scheduler.sigmas[0]) > float(scheduler.sigmas[1]) > 0.7
    causal = exported(make_run(tmp_path / "causal", config(DISTILLATION)), tmp_path / "c")
    assert "block by block" in (causal / "README.md").read_text()


def test_native_export_is_the_run_bit_for_bit_and_starts_another(run: Path, tmp_path: Path) -> None:
    settings = config(DISTILLATION, **BIDIRECTIONAL)
    for options, seed in (((), 2), (("--weights", "raw"), 1), (("--network", "critic"), 3)):
        out = exported(run, tmp_path / str(seed), *options, format="native")
        state = network(settings, seed).state_dict()
        weights = LazyWeights(out)
        assert all(torch.equal(value, state[name]) for name, value in weights.read(state))
        assert weights.geometry() == settings.student.geometry()
        from dataclasses import replace

        net = build_network(NetworkSpec(replace(settings.student, init=str(out)), "student", 0), CPU)
        assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    many = exported(run, tmp_path / "many", "--shard_gb", "0.0001", format="native")
    assert len(list(many.glob("*.safetensors"))) > 1
    assert (many / "diffusion_pytorch_model.safetensors.index.json").is_file()


def test_out_is_whole_or_not_there(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    exported(run, taken, format="native")  # empty: fine
    before = {file.name: file.read_bytes() for file in taken.iterdir()}
    with pytest.raises(UserError, match="it is there already: give a new folder"):
        exported(run, taken, format="native")
    assert before == {file.name: file.read_bytes() for file in taken.iterdir()}

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("model.wan.export.save_model", full)
    with pytest.raises(UserError, match="No space left on device: free some space"):
        exported(run, tmp_path / "new", format="native")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--network", "teacher"], "has none of that name: choose student or critic"),
        (["--network", "critic", "--weights", "ema"], "has no average of the critic: use --weights raw"),
        (["--shard_gb", "-1"], "give a size in GB"),
        (["--dtype", "int4"], "invalid choice: 'int4'"),
        (["--format", "lora"], "has no adapter: use --format diffusers or native"),
    ],
)
def test_what_cannot_be_exported_is_one_line(run: Path, tmp_path: Path, options: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        exported(run, tmp_path / "out", *options)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", ["diffusers", "native"])
def test_weights_that_are_not_finite_are_not_exported(tmp_path: Path, format: str) -> None:
    made = config(DISTILLATION, **BIDIRECTIONAL)
    tensors = {name: dict(network(made, seed).state_dict()) for name, seed in NETWORKS.items()}
    tensors["student_ema"]["blocks.1.ffn.0.weight"][3, 2] = torch.nan
    checkpoint.save(tmp_path / "run" / "checkpoints", 5, tensors, {"config": to_plain(made)})
    with pytest.raises(UserError, match=r"blocks\.1\.ffn\.0\.weight of student_ema holds NaN or infinity") as error:
        exported(tmp_path / "run", tmp_path / "out", format=format)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
    assert exported(tmp_path / "run", tmp_path / "out", "--weights", "raw", format=format).is_dir()


def test_a_family_that_nothing_reads_is_refused_before_its_weights_are_read(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FAMILY, "exporter", NoExporter())
    for kind in ("diffusers", "native", "lora"):
        with pytest.raises(UserError, match=f"--format {kind}: for networks of preset toy there is nothing yet"):
            exported(run, tmp_path / "out", format=kind)
    assert list(tmp_path.iterdir()) == []


def test_no_run_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint in"):
        exported(tmp_path / "nothing", tmp_path / "out")


def test_the_command(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["export", "--run", str(run), "--format", "native", "--out", str(tmp_path / "out"), "--dtype", "bf16"]
    monkeypatch.setattr(sys, "argv", argv)
    assert export.main() == 0
    assert "native in bf16" in capsys.readouterr().out


def test_an_adapter_is_written_for_diffusers_and_peft(tmp_path: Path) -> None:
    state: dict[str, Tensor] = {
        "blocks.0.self_attn.q.lora_A.weight": torch.randn(2, 6), "blocks.0.self_attn.q.lora_B.weight": torch.randn(6, 2),
    }  # fmt: skip
    adapter = Adapter(state, 4.0)
    folder = export.written(tmp_path / "lora", lambda folder: save_lora(folder, WanExporter(), adapter, Dtype.fp32))
    assert {str(file.relative_to(folder)) for file in folder.rglob("*.*")} == {
        "pytorch_lora_weights.safetensors", "peft/adapter_model.safetensors", "peft/adapter_config.json",
    }  # fmt: skip
