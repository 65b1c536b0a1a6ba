"""The EDM family's network through its path, in closed forms, and what its family refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from configs.load import run_from_plain
from model.attention.backends import Backend
from model.edm.config import EDMConfig
from model.edm.family import FAMILY
from model.edm.network import EDMNetwork
from model.network import NetworkConfig
from model.path import EDM
from model.score import ScoreNet
from model.types import Conditioning
from tests.small import DIFFUSION, DISTILLATION, merged
from trainer.base import RunOptions
from trainer.build import build_trainer
from trainer.network_factory import NetworkSpec, build_network
from utils.errors import ConfigError

SMALL = EDMConfig(dim=16, num_layers=3, in_dim=3, out_dim=3, labels=4, sigma_data=0.7)
B, F, H, W = 2, 3, 4, 6


def random_net(seed: int = 0) -> EDMNetwork:
    """A network with every parameter random and none zero."""
    generator = torch.Generator().manual_seed(seed)
    net = EDMNetwork(SMALL)
    with torch.no_grad():
        for p in net.parameters():
            scale = 0.3 if p.ndim == 1 else p[0].numel() ** -0.5
            p.copy_(scale * torch.randn(p.shape, generator=generator))
    return net


def images(seed: int = 1) -> Tensor:
    return torch.randn(B, F, SMALL.in_dim, H, W, generator=torch.Generator().manual_seed(seed))


def labels(*classes: int | None) -> Tensor:
    """One-hot rows; zeros for None."""
    rows = [torch.zeros(SMALL.labels) if c is None else torch.eye(SMALL.labels)[c] for c in classes]
    return torch.stack(rows)


TIME = torch.tensor([-0.4, 0.9])


def test_a_new_network_is_the_skip_of_the_preconditioning() -> None:
    """F = 0, so D(x_q; q) = c_skip x_q = d^2 / (q^2 + d^2) x_q, with x_q = x_s / (1 - s) and q = s / (1 - s)."""
    path = FAMILY.path(SMALL)
    assert path == EDM(sigma_data=0.7)
    score = ScoreNet(EDMNetwork(SMALL), "net", path=path)
    x, sigma = images(), torch.tensor([[0.1, 0.5, 0.9], [80 / 81, 0.3, 0.002 / 1.002]])
    d = score.x0(x, sigma, Conditioning({"label": labels(0, None)}))
    q = (sigma / (1 - sigma))[..., None, None, None]
    x_q = x / (1 - sigma)[..., None, None, None]
    torch.testing.assert_close(d, 0.7**2 / (q**2 + 0.7**2) * x_q, rtol=1e-4, atol=1e-5)


def test_the_label_matters_and_zeros_use_none() -> None:
    net, x = random_net(), images()
    first, second, none = (net(x, TIME, labels(c, c)) for c in (0, 1, None))
    assert (first - second).abs().max() > 0.01
    assert (first - none).abs().max() > 0.01
    mixed = net(x, TIME, labels(0, None))
    torch.testing.assert_close(mixed, torch.cat([first[:1], none[1:]]), rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        net.label_embedding.weight.copy_(torch.randn(SMALL.dim, SMALL.labels))
    torch.testing.assert_close(net(x, TIME, labels(None, None)), none, rtol=0, atol=0)


def test_one_time_for_all_frames_is_the_same_time_for_each() -> None:
    net, x, label = random_net(), images(), labels(2, 3)
    torch.testing.assert_close(net(x, TIME, label), net(x, TIME[:, None].expand(B, F), label), rtol=1e-5, atol=1e-6)
    assert (net(x, TIME, label) - net(x, TIME.flip(0), label)).abs().max() > 0.01


def test_a_frame_sees_no_other_frame_and_no_other_sample() -> None:
    net, x, label = random_net(), images().requires_grad_(), labels(2, 3)
    time = torch.tensor([[-0.4, 0.1, 0.9], [0.2, -1.0, 0.5]])
    net(x, time, label)[0, 1].square().sum().backward()
    assert x.grad is not None
    reached = x.grad.abs().sum((2, 3, 4)) > 0
    assert reached.tolist() == [[False, True, False], [False, False, False]]
    alone = net(x[:1, 1:2], time[:1, 1:2], label[:1])
    torch.testing.assert_close(alone, net(x, time, label)[:1, 1:2], rtol=1e-5, atol=1e-6)


def test_gradients_reach_every_parameter() -> None:
    net = random_net()
    net(images(), TIME, labels(0, 3)).square().sum().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().max() > 0] == []


def test_features_are_what_the_blocks_put_out() -> None:
    net, x, label = random_net(), images(), labels(0, 1)
    seen: dict[int, Tensor] = {}
    for number, block in enumerate(net.fsdp_units()):
        block.register_forward_hook(lambda _m, _a, out, number=number: seen.__setitem__(number, out))
    tapped = net(x, TIME, label, features=[0, 1])
    assert sorted(seen) == [0, 1]  # what comes later did not run
    for number, feature in enumerate(tapped):
        assert feature.shape == (B, F, SMALL.dim, H // 2, W // 2)
        assert torch.equal(feature.flatten(0, 1), seen[number])
    assert net(x, TIME, label).shape == x.shape
    assert sorted(seen) == [0, 1, 2]


def test_random_weights_are_those_of_a_new_network_and_meta_draws_none() -> None:
    torch.manual_seed(3)
    net = EDMNetwork(SMALL)
    torch.manual_seed(3)
    drawn = dict(FAMILY.random_weights(SMALL, None))
    assert drawn.keys() == net.state_dict().keys()  # no buffers: a network made without memory gets all its values
    assert all(torch.equal(value, drawn[name]) for name, value in net.state_dict().items())
    assert set(FAMILY.telling) <= drawn.keys()
    before = torch.get_rng_state()
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in FAMILY.random_weights(SMALL, None)}
    assert list(shapes.items()) == [(name, value.shape) for name, value in drawn.items()]
    assert torch.equal(before, torch.get_rng_state())


def test_under_autocast_time_and_label_stay_exact() -> None:
    net, label = random_net(), labels(0, 1)
    exact = net._embedded(TIME, label, F)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(net._embedded(TIME, label, F), exact)
        out = net(images(), TIME, label)
        torch.testing.assert_close(net.bfloat16()(images(), TIME, label).float(), out.float(), rtol=0.1, atol=0.1)
    assert exact.dtype is torch.float32


def test_prompts_are_classes_in_the_order_of_the_alphabet() -> None:
    encode = FAMILY.toy_prompts(["d", "b", "a", "c", "a"], SMALL, 0, torch.device("cpu"))
    assert torch.equal(encode(["c", "", " A "])["label"], labels(2, None, 0))
    with pytest.raises(ValueError, match="prompt 'e' is no class of this network, which knows: a, b, c, d"):
        encode(["a", "e"])
    with pytest.raises(
        ValueError, match=r"3 different captions, and the network has 4 labels: set overrides.labels to 3"
    ):
        FAMILY.toy_prompts(["a", "b", "c"], SMALL, 0, torch.device("cpu"))


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        (lambda net: net(images()[:, 0], TIME, labels(0, 1)), r"x must be \[B, F, 3, H, W\], got \[2, 3, 4, 6\]"),
        (lambda net: net(images()[..., :5], TIME, labels(0, 1)), "latent size 4x5 is not a multiple of the patch 2x2"),
        (lambda net: net(images(), TIME[:1], labels(0, 1)), r"time must be \[2\] or \[2, 3\], got \[1\]"),
        (lambda net: net(images(), TIME, labels(0)), r"label must be \[2, 4\], one-hot or zeros, got \[1, 4\]"),
        (lambda net: net(images(), TIME, labels(0, 1), features=[1, 0]), r"features must rise .*, got \[1, 0\]"),
        (lambda net: net(images(), TIME, labels(0, 1), features=[3]), r"within the 3 blocks from 0, got \[3\]"),
        (lambda net: EDMConfig(dim=20, num_layers=1), "dim 20 must be a multiple of 8"),
        (lambda net: EDMConfig(dim=16, num_layers=0), "num_layers must be a whole number of at least 1, got 0"),
        (lambda net: FAMILY.geometry("edm-digits", {"heads": 2}), "unknown geometry field 'heads': choose among dim, "),
        (lambda net: FAMILY.open_weights("x.pt", "ema", None), "x.pt is no run's folder, and this family reads no other"),
        (lambda net: FAMILY.open_lora("x.pt", [], None), "x.pt: this family reads no LoRA files"),
        (lambda net: FAMILY.released(Path("x")), "x: this family reads no released models yet"),
        (lambda net: FAMILY.exporter.pipeline(SMALL, None), "nothing writes this family for other programs yet"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_one_line(call: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=problem) as error:
        call(EDMNetwork(SMALL))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("mode", ["text", "cache", "mask", "adapter", "channels"])
def test_what_it_does_not_know_is_never_ignored(mode: str) -> None:
    with pytest.raises(TypeError, match=mode):
        EDMNetwork(SMALL)(images(), TIME, labels(0, 1), **{mode: None})


NET = {"preset": "edm-digits", "overrides": {"dim": 16, "num_layers": 2}}
RUN: dict[str, Any] = {
    **DISTILLATION,
    "data": {"kind": "digits"},
    "schedule": {"denoising_step_list": [987.65], "timestep_shift": 1.0},
    "rollout": {"kind": "backward_simulation"},
    **dict.fromkeys(("student", "teacher", "critic"), NET),
}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"rollout": {"kind": "self_forcing"}}, "edm-digits: its family has no cache, which a causal run needs"),
        ({"student": {"lora": {"rank": 2}}}, "its family has no lora, which lora needs"),
        ({"teacher": {"sparse": {"sparsity": 0.5}}}, "its family has no sparse, which sparse needs"),
        ({"parallel": {"sequence": 2}}, "its family has no sequence, which parallel.sequence needs"),
        ({"critic": {"checkpointing": "full"}}, "its family has no replay, which checkpointing needs"),
        ({"teacher": {"attention": "flash"}}, "teacher.attention flash: this network has none: leave it out"),
        ({"schedule": {"denoising_step_list": [1000]}}, "denoising_step_list: .* begin at 0.9876 or below"),
        ({"teacher": {"preset": "toy"}}, "teacher.preset toy and student.preset edm-digits are of two families"),
        ({"critic": {"overrides": {"labels": 9}}}, "critic has labels 9 and student 10"),
    ],
)  # fmt: skip
def test_a_run_that_the_family_cannot_make_is_refused_at_load(changes: dict[str, Any], problem: str) -> None:
    run_from_plain(RUN)
    with pytest.raises(ConfigError, match=problem):
        run_from_plain(merged(RUN, changes))


def test_an_attention_that_it_does_not_have_is_refused_when_it_is_built() -> None:
    student = NetworkConfig("edm-digits", attention=Backend.PLAIN)
    with pytest.raises(ConfigError, match="student.attention plain: this network has none: leave it out"):
        build_network(NetworkSpec(student, "student", 0), torch.device("cpu"))


def test_muon_is_refused_where_the_blocks_have_no_matrices(tmp_path: Path) -> None:
    config = run_from_plain(merged(RUN, {"generator_training": {"optimizer": {"kind": "muon"}}}))
    with pytest.raises(
        ConfigError, match="generator_training.optimizer: kind muon updates matrices, and the blocks of"
    ):
        build_trainer(config, RunOptions(tmp_path, resume="never", wandb=False, save=False, visualize=False))


def test_a_many_step_run_has_no_use_for_the_step_list() -> None:
    """Its default begins at 1000, above this family's start."""
    config = run_from_plain(
        {
            **DIFFUSION,
            "student": NET,
            "data": {"kind": "digits"},
            "schedule": {},
            "diffusion": {"mode": "bidirectional"},
        }
    )
    assert config.schedule.sigmas()[0] == 1.0
    assert not config.few_steps
