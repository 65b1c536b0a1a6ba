"""Adapters in training: three roles on one copy of the weights are three separate copies, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from generation.export import export, export_args
from generation.generator import Generator
from generation.sampling import Sampling, StudentChoice
from model.export import Dtype, Format
from model.lora import adapter_names, add_adapter, base_names, linear_layers
from model.network import LoraConfig
from model.score import ScoreNet
from model.wan.save import save_model
from model.wan.weights import LazyWeights
from tests.nets import random_net, with_loras
from tests.small import DIFFUSION, DISTILLATION, NETWORKS, ODE, config, merged, save_networks, trainer, with_weights
from trainer.base import Trainer
from trainer.origin import adapter_origin
from trainer.run_networks import build_for_inference
from trainer.weight_sources import open_run
from utils import checkpoint
from utils.config import to_plain
from utils.errors import ConfigError, UserError
from utils.random import Noise

CPU = torch.device("cpu")
LORA: dict[str, Any] = {"rank": 4, "alpha": 2.0, "targets": ["q", "v", "o", "ffn.0", "ffn.2"]}
# B begins at zero: rates at which two updates make three roles of one network
FAST = {"optimizer": {"lr": 0.05, "eps": 1e-6, "clip_norm": None}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    save_networks(folder)
    return folder


def made(folder: Path, path: Path, *, share: bool = True, **changes: Any) -> Trainer:
    """All three networks begin as the teacher; student and critic train adapters, on its copy or on their own."""
    adapted = {"init": str(folder / "teacher.safetensors"), "lora": {**LORA, "share": share}}
    base = merged(
        with_weights(DISTILLATION, folder),
        {
            "student": adapted, "critic": adapted, "generator_training": FAST, "critic_training": FAST,
            "training": {
                "max_steps": 4, "critic_warmup_steps": 0, "generator_update_interval": 1, "global_batch_size": 2,
                "micro_batch_size": 2,
            },
            "data": {"toy": {"frames": 6}}, "schedule": {"denoising_step_list": [1000, 500]},
        },
    )  # fmt: skip
    return trainer(path, base, **changes)


def adapters(run: Trainer) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": value.clone()
        for name, network in run.networks.items()
        for key, value in network.state_dict().items()
    }


WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "full": dict.fromkeys(("student", "critic"), {"checkpointing": "full"}),
    "selective": dict.fromkeys(NETWORKS, {"checkpointing": "selective", "attention": "sdpa"}),
    # its gradient goes through teacher and critic: backward visits all roles
    "sid": {"objective": {"kind": "sid"}, **dict.fromkeys(("student", "critic"), {"checkpointing": "full"})},
    "bidirectional": {"rollout": {"kind": "backward_simulation"}},
    "bf16": {"training": {"precision": "bf16"}},
}


@pytest.mark.parametrize("way", WAYS)
def test_three_roles_on_one_copy_are_three_copies(folder: Path, tmp_path: Path, way: str) -> None:
    """Losses, gradient norms, weights and averages after three iterations, bit for bit."""
    shared, separate = (made(folder, tmp_path / str(share), share=share, **WAYS[way]) for share in (True, False))
    nets = [shared.networks["student"].net, shared.networks["critic"].net, shared.teacher.net]  # type: ignore[attr-defined]
    assert nets[0] is nets[1] is nets[2]
    assert separate.networks["student"].net is not separate.networks["critic"].net
    for _ in range(3):
        together, apart = shared.training_step(), separate.training_step()
        assert together == apart
        assert together["student/grad_norm"] > 0 < together["critic/grad_norm"]
    mine, theirs = adapters(shared), adapters(separate)
    assert mine.keys() == theirs.keys()
    assert all(bool((mine[key] == theirs[key]).all()) for key in mine)
    averages = [run.networks["student"].ema.shadow for run in (shared, separate)]  # type: ignore[union-attr]
    assert all(bool((averages[0][key] == averages[1][key]).all()) for key in averages[0])
    roles = [mine[f"{name}.blocks.0.ffn.0.lora_B.weight"] for name in ("student", "critic")]
    assert not torch.equal(*roles)
    assert all(float(role.abs().max()) > 0.01 for role in roles)


def test_a_role_is_its_merged_weights_and_the_teacher_none(folder: Path, tmp_path: Path) -> None:
    """In fp32, where adding before or after the product rounds differently."""
    run = trained(folder, tmp_path)
    x, sigma = torch.randn(2, *run.task.latent_shape), torch.tensor([0.9, 0.4])
    text = run.task.conditioning(run.task.prompts(range(2))).prompt["text"]
    shared: ScoreNet = run.teacher  # type: ignore[attr-defined]
    with torch.no_grad():
        alone = random_net(NETWORKS.index("teacher"), run.config.student.geometry()).eval()
        base = shared.velocity(x, sigma, text)
        torch.testing.assert_close(base, alone(x, sigma, text), rtol=0, atol=0)
        for name, which in (("student", "raw"), ("critic", "critic")):
            seen = run.networks[name].score.velocity(x, sigma, text)
            network = replace(run.config.student, init=str(tmp_path), init_weights=which, lora=None)
            whole = build_for_inference(network, name, CPU, None)
            torch.testing.assert_close(seen, whole(x, sigma, text), rtol=1e-5, atol=1e-5)
            assert float((seen - base).abs().max()) > 1e-2


def trained(folder: Path, path: Path, **changes: Any) -> Trainer:
    """After two iterations, saved."""
    run = made(folder, path, **changes)
    for run.step in range(2):
        run.training_step()
    run.step = 2
    run.save_checkpoint()
    run.finish_saving()
    return run


def test_a_checkpoint_holds_adapters_alone_and_goes_on_exactly(folder: Path, tmp_path: Path) -> None:
    run = trained(folder, tmp_path)
    (path,) = checkpoint.list_checkpoints(tmp_path / "checkpoints")
    for group, entries in checkpoint.layout(path).items():
        assert entries and all(".lora_" in name for name in entries), group
    again = made(folder, tmp_path)
    assert again.step == 2
    assert adapters(again).keys() == adapters(run).keys()
    assert run.training_step() == again.training_step()
    mine, theirs = adapters(run), adapters(again)
    assert all(bool((mine[key] == theirs[key]).all()) for key in mine)


def test_a_run_generates_and_goes_on_from_its_merged_weights(folder: Path, tmp_path: Path) -> None:
    run = trained(folder, tmp_path / "run")
    raw = Generator.load(tmp_path / "run", CPU, student=StudentChoice("raw"))
    prompts = run.task.prompts(range(2))
    frames = raw(prompts, Sampling(seed=3), [0, 1])
    noise = Noise(3, 0, [0, 1], CPU)
    with torch.no_grad():
        live = run.sample(run.task.conditioning(prompts), run.task.negative(2), noise)
    torch.testing.assert_close(frames, live, rtol=1e-4, atol=1e-4)
    averaged = Generator.load(tmp_path / "run", CPU)(prompts, Sampling(seed=3), [0, 1])
    assert float((averaged - frames).abs().max()) > 1e-4
    # the next stage trains all weights, from the sum
    whole = made(
        folder, tmp_path / "next", student={"init": str(tmp_path / "run"), "init_weights": "raw", "lora": None}
    )
    up, down = (run.networks["student"].state_dict()[f"blocks.1.ffn.0.lora_{part}.weight"] for part in "BA")
    base = load_file(folder / "teacher.safetensors")["blocks.1.ffn.0.weight"]
    weight = whole.networks["student"].net.get_parameter("blocks.1.ffn.0.weight")
    assert torch.equal(weight, (base + 0.5 * (up @ down)).detach())


def test_an_exported_adapter_is_the_runs_sum(folder: Path, tmp_path: Path) -> None:
    """Alone, under Diffusers' names, over the same base; and merged: both are what the run itself would load."""
    run = trained(folder, tmp_path / "run", critic={"lora": {"alpha": 3.0}})
    base = LazyWeights(str(folder / "teacher.safetensors"))
    for network in ("student", "critic"):
        options = ["--run", str(tmp_path / "run"), "--network", network]
        alone, whole = tmp_path / f"{network}_lora", tmp_path / f"{network}_whole"
        export(export_args([*options, "--format", "lora", "--out", str(alone)]))
        export(export_args([*options, "--format", "native", "--out", str(whole)]))
        added = dict(with_loras(base, [(alone, 1.0)]).read(base.shapes))
        merged_file = LazyWeights(str(whole))
        stored = dict(open_run(tmp_path / "run", "critic" if network == "critic" else "ema").read(base.shapes))
        for name, value in merged_file.read(base.shapes):
            assert torch.equal(value, stored[name])
            torch.testing.assert_close(added[name], value, rtol=1e-6, atol=1e-7)
        assert not torch.equal(stored["blocks.0.ffn.0.weight"], dict(base.read(base.shapes))["blocks.0.ffn.0.weight"])
    assert run.config.critic is not None
    with pytest.raises(UserError, match="--dtype fp8 is for whole weights"):
        export(export_args([*options, "--format", "lora", "--dtype", "fp8", "--out", str(tmp_path / "no")]))


def test_stock_libraries_load_an_exported_adapter(folder: Path, tmp_path: Path) -> None:
    """Diffusers' transformer over the base's weights, with the adapter by its own loader and by PEFT's."""
    diffusers, peft = pytest.importorskip("diffusers"), pytest.importorskip("peft")
    run = trained(folder, tmp_path / "run")
    options = ["--run", str(tmp_path / "run"), "--format", "lora", "--weights", "raw", "--out", str(tmp_path / "lora")]
    export(export_args(options))
    save_model(
        tmp_path / "base", LazyWeights(str(folder / "teacher.safetensors")), run.config.student.geometry(),
        Format.DIFFUSERS, Dtype.fp32, None,
    )  # fmt: skip
    x, sigma = torch.randn(1, *run.task.latent_shape), torch.tensor([0.7])
    text = run.task.conditioning(run.task.prompts(range(1))).prompt["text"]
    with torch.no_grad():
        ours = run.networks["student"].score.velocity(x, sigma, text)
        plain = diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "base")
        theirs = diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "base")
        theirs.load_lora_adapter(
            tmp_path / "lora", weight_name="pytorch_lora_weights.safetensors", prefix="transformer"
        )
        for net in (theirs, peft.PeftModel.from_pretrained(plain, tmp_path / "lora/peft")):
            out = net(x.transpose(1, 2), 1000 * sigma, text, return_dict=False)[0].transpose(1, 2)
            torch.testing.assert_close(out, ours, rtol=1e-4, atol=1e-5)
            assert float((out - run.teacher.velocity(x, sigma, text)).abs().max()) > 1e-2  # type: ignore[attr-defined]


def test_a_base_that_is_gone_is_named(folder: Path, tmp_path: Path) -> None:
    save_networks(tmp_path / "weights")
    trained(tmp_path / "weights", tmp_path / "run")
    (tmp_path / "weights/teacher.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"is an adapter on student.init .*teacher.safetensors.*: .*"):
        Generator.load(tmp_path / "run", CPU)


ANOTHER = [
    ({"lora": {"alpha": 3.0}}, r"student.lora is another \(alpha 2.0 there, 3.0 here\): use its config, or --resume n"),
    ({"lora": {"rank": 2}}, r"student.lora is another \(rank 4 there, 2 here\)"),
    ({"lora": {"targets": ["q"]}}, r"student.lora is another \(targets \[.*\] there, \['q'\] here\)"),
    ({"lora": None}, "student was trained as an adapter there, and is all weights here: use its config"),
    ({"lora": {"share": False}, "init": "critic"}, "the adapter of student was trained on other weights than student.init"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "words"), ANOTHER)
def test_an_adapter_does_not_go_on_as_another(
    folder: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    trained(folder, tmp_path)
    changes = changes | ({"init": str(folder / "critic.safetensors")} if "init" in changes else {})
    with pytest.raises(UserError, match=words) as refused:
        made(folder, tmp_path, student=changes)
    assert "\n" not in str(refused.value)


def test_a_base_that_has_changed_is_refused(folder: Path, tmp_path: Path) -> None:
    """The file's own values, and those of a LoRA that is added to it: by resume, by inference and by export."""
    save_networks(tmp_path / "weights")
    base, loras = tmp_path / "weights/teacher.safetensors", [{"path": str(tmp_path / "lora"), "scale": 1.0}]
    trained(folder, tmp_path / "first")
    options = ["--format", "lora", "--weights", "raw"]
    export(export_args(["--run", str(tmp_path / "first"), *options, "--out", str(tmp_path / "lora")]))
    merges = dict.fromkeys(NETWORKS, {"loras": loras})
    trained(tmp_path / "weights", tmp_path / "run", **merges)
    Generator.load(tmp_path / "run", CPU)
    made(tmp_path / "weights", tmp_path / "run", **merges)

    def rewrite(file: Path, values: dict[str, Tensor]) -> None:
        file.unlink()  # else what others have mapped would change under them
        save_file(values, file)

    def refused() -> None:
        with pytest.raises(UserError, match=r"is an adapter on student.init .*: other weights lie there now"):
            Generator.load(tmp_path / "run", CPU)
        with pytest.raises(UserError, match="other weights lie there now"):
            arguments = ["--run", str(tmp_path / "run"), "--format", "native", "--out", str(tmp_path / "no")]
            export(export_args(arguments))
        with pytest.raises(UserError, match="was trained on other weights than"):
            made(tmp_path / "weights", tmp_path / "run", **merges)

    weights, file = load_file(base), tmp_path / "lora/pytorch_lora_weights.safetensors"
    rewrite(base, {**weights, "head.head.bias": weights["head.head.bias"] + 1})
    refused()
    rewrite(base, weights)
    Generator.load(tmp_path / "run", CPU)
    rewrite(file, {name: value * 1.5 for name, value in load_file(file).items()})
    refused()


def test_only_one_copy_is_in_memory(folder: Path, tmp_path: Path) -> None:
    """Weights held by all networks of the run: the teacher's, and rank * (in + out) an adapted layer and role."""
    run = made(folder, tmp_path)
    nets = [run.teacher.net, *(network.net for network in run.networks.values())]  # type: ignore[attr-defined]
    held = {id(p): p.numel() for net in nets for p in net.parameters()}
    plain = random_net(0, run.config.student.geometry())
    shapes = [
        p.shape for name, p in plain.named_parameters() if any(f".{end}.weight" in name for end in LORA["targets"])
    ]
    expected = sum(p.numel() for p in plain.parameters()) + 2 * LORA["rank"] * sum(sum(shape) for shape in shapes)
    assert sum(held.values()) == expected
    optimized = sum(p.numel() for network in run.networks.values() for p in network.optimizer.parameters)
    assert optimized == 2 * LORA["rank"] * sum(sum(shape) for shape in shapes)


@pytest.mark.parametrize("kind", ["diffusion", "ode"])
def test_other_trainers_train_adapters(folder: Path, tmp_path: Path, kind: str) -> None:
    base = {"diffusion": DIFFUSION, "ode": ODE}[kind]
    init = {"init": str(folder / "teacher.safetensors")}
    base = merged(base, {"student": {**init, "lora": LORA}, "generator_training": FAST})
    if kind == "ode":
        base = merged(base, {"teacher": init})
    run = trainer(tmp_path, base)
    before = {name: p.clone() for name, p in run.networks["student"].net.named_parameters()}
    run.training_step()
    changed = {name for name, p in run.networks["student"].net.named_parameters() if not torch.equal(p, before[name])}
    assert changed
    assert changed <= set(adapter_names(run.networks["student"].net, "student").values())
    if kind == "ode":
        assert run.teacher.net is run.networks["student"].net  # type: ignore[attr-defined]


def test_names_and_layers() -> None:
    net = random_net(0)
    before = [name for name, _ in net.named_parameters()]
    assert linear_layers(net)[:4] == ["q", "k", "v", "o"]
    assert "ffn.2" in linear_layers(net)
    add_adapter(net, "a", LoraConfig(2, targets=["cross_attn.q", "ffn.0"]))
    add_adapter(net, "b", LoraConfig(2, targets=["k"]))
    assert [*base_names(net)] == before
    layers = {name.removesuffix(".lora_A.weight") for name in adapter_names(net, "a") if "lora_A" in name}
    assert layers == {f"blocks.{i}.{end}" for i in range(len(net.blocks)) for end in ("cross_attn.q", "ffn.0")}
    assert {name.split(".")[2] for name in adapter_names(net, "b")} == {"self_attn", "cross_attn"}
    assert "k" in linear_layers(net)
    assert not any("lora" in name for name in linear_layers(net))


def test_without_targets_a_run_has_those_of_its_family_and_says_so() -> None:
    """So a saved run holds a list, as runs of earlier versions do, and other lists are kept as they are."""
    default = to_plain(config(DISTILLATION, student={"lora": {}}))
    assert default["student"]["lora"]["targets"] == ["q", "k", "v", "o", "ffn.0", "ffn.2"]
    named = to_plain(config(DISTILLATION, student={"lora": {"targets": ["v", "q"]}}))
    assert named["student"]["lora"]["targets"] == ["v", "q"]
    assert adapter_origin(config(default).student.lora, "base")["targets"] == ["ffn.0", "ffn.2", "k", "o", "q", "v"]  # type: ignore[arg-type]


REFUSED = [
    ({"student": {"lora": {"rank": 0}}}, "rank must be at least 1, got 0"),
    ({"student": {"lora": {"targets": []}}}, "targets is empty"),
    ({"student": {"lora": {"targets": ["w1"]}}}, r"student.lora.targets: w1: no layer of a block; choose among q, k, "),
    (
        {"student": {"lora": {}, "init": "elsewhere"}},
        "student.lora.share puts the adapter on the teacher's weights, but student has init elsewhere and the teacher None",
    ),
    ({"critic": {"lora": {}, "checkpointing": "full"}, "student": {"lora": {}}}, "give them one attention"),
    ({"teacher": {"lora": {}}}, "teacher.lora: a teacher is never trained"),
    ({"student": {"lora": {}, "expert": "low"}}, "student has expert low and the teacher None"),
    ({"student": {"lora": {}}, "parallel": {"engine": "deepspeed"}}, "student.lora is not for engine deepspeed"),
]


@pytest.mark.parametrize(("changes", "words"), REFUSED)
def test_refused_in_one_line(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises((ValueError, ConfigError), match=words) as refused:
        trainer(tmp_path, **changes)
    assert "\n" not in str(refused.value)
