"""Sparse attention inside the network: masks, cache, replay, weights, ramp. The kernels have tests/model/attention/test_vsa.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from generation.export import export, export_args
from generation.generator import Generator
from model.attention.checkpointing import Checkpointing
from model.attention.kv_cache import CacheSpec
from model.attention.masks import block_causal_mask, teacher_forcing_mask
from model.attention.sparse import SparseConfig
from model.network import NetworkConfig
from model.wan.formats import GATE
from model.wan.transformer import WanTransformer
from tests.nets import gradients, latents, random_net, relative, texts
from tests.pipeline.test_rollout import assert_same_gradients, blocks_of, brute_force, run, setup
from tests.small import BRIEF, DISTILLATION, NETWORK, config, merged, save_networks, trainer, with_weights
from tests.trainer.test_trainer import curve
from trainer.network_factory import NetworkSpec, build_network, zeros_of
from utils.errors import ConfigError

CPU = torch.device("cpu")
SPARSE = SparseConfig(0.5, [1, 8, 8], "reference")  # a frame here is a tile
BLOCKS = (2, 2, 2)


def pair(sparsity: float, gates: float) -> tuple[WanTransformer, WanTransformer]:
    """A sparse network, and the dense one of the same weights; gates: by what the sparse one's are multiplied."""
    sparse = random_net(1, sparse=replace(SPARSE, sparsity=sparsity))
    with torch.no_grad():
        for name, p in sparse.named_parameters():
            if GATE.match(name):
                p.mul_(gates)
    dense = random_net(2)
    dense.load_state_dict({k: v for k, v in sparse.state_dict().items() if not GATE.match(k)})
    return sparse, dense


@torch.no_grad()
@pytest.mark.parametrize("mask", [None, block_causal_mask(BLOCKS), block_causal_mask(BLOCKS, 4, 1)])
def test_nothing_left_out_and_a_closed_gate_is_dense_attention(mask: Any) -> None:
    sparse, dense = pair(0.0, 0.0)
    x, sigma, text = latents(3, 2, 6), torch.tensor([0.3, 0.8]), texts(4, 2)
    torch.testing.assert_close(
        sparse(x, sigma, text, mask=mask), dense(x, sigma, text, mask=mask), rtol=1e-4, atol=1e-5
    )
    chosen, _ = pair(0.6, 0.0)  # the first block sees two frames and chooses one
    assert float((chosen(x, sigma, text, mask=mask) - dense(x, sigma, text, mask=mask)).abs().max()) > 1e-3
    opened, _ = pair(0.0, 1.0)
    assert float((opened(x, sigma, text, mask=mask) - dense(x, sigma, text, mask=mask)).abs().max()) > 1e-3


def test_cached_blocks_are_the_masked_pass() -> None:
    """The query tiles of a block choose among the tiles of all that they see, whether or not these come from a cache."""
    net, _ = pair(0.5, 1.0)
    x, sigma, text = latents(3, 1, 6), torch.zeros(1), texts(4, 1)
    whole = net(x, sigma, text, mask=block_causal_mask(BLOCKS))
    cache = net.new_cache(CacheSpec(1, 6, 4, 6, block_frames=2), dtype=torch.float32, device="cpu")
    with torch.no_grad():
        parts = [net(x[:, i : i + 2], sigma, text, cache=cache, write_cache=True) for i in range(0, 6, 2)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)


def test_teacher_forcing_sees_clean_blocks_sparsely() -> None:
    net, dense = pair(0.0, 0.0)
    x, sigma, text = latents(3, 1, 12), torch.rand(1, 12), texts(4, 1)
    mask, positions = teacher_forcing_mask(BLOCKS), [*range(6), *range(6)]
    out = [network(x, sigma, text, mask=mask, positions=positions) for network in (net, dense)]
    torch.testing.assert_close(*out, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "cube", "through_context"),
    [  # each kind of cache with either cube, each cube with and without gradients through the context
        ("context_noise", [1, 2, 2], False),
        ("context_noise", [2, 2, 2], True),
        ("image_to_video", [1, 2, 2], True),
        ("image_to_video", [2, 2, 2], False),
        ("window", [1, 2, 2], False),
        ("window", [2, 2, 2], True),
        ("window_sinks", [1, 2, 2], True),
        ("window_sinks", [2, 2, 2], False),
    ],
    ids=str,
)
def test_a_sparse_rollout_is_brute_force_and_its_replay_has_its_gradient(
    name: str, cube: list[int], through_context: bool
) -> None:
    """Against masked passes over the whole video: cached keys form tiles like all others, also in a rolling cache, and
    recomputed blocks choose the same tiles again."""
    sparse = SparseConfig(0.6, cube, "reference")  # two tiles a frame or two frames, of four tokens a frame and of two
    _, noise, condition = case = setup(name)
    exits = [(0, 2, 1, 2, 0)[i] for i in range(len(blocks_of(name)))]
    weight = latents(6, 2, noise.shape[1])
    net = random_net(1, sparse=sparse)
    expected = torch.cat(brute_force(net, case, exits, context_gradient=through_context), 1)
    (expected * weight).sum().backward()
    wanted = gradients(net)

    net = random_net(1, checkpointing=Checkpointing.full, sparse=sparse)
    x0 = run(net, case, exits, context_gradient=through_context).x0
    assert relative(x0[:, condition.initial_frames :], expected) < 5e-6
    (x0[:, condition.initial_frames :] * weight).sum().backward()
    assert_same_gradients(gradients(net), wanted)


def student(**sparse: Any) -> dict[str, Any]:
    return {**NETWORK, "sparse": {"sparsity": 0.5, "cube": [1, 8, 8], "backend": "reference", **sparse}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    save_networks(folder)
    return folder


def test_only_the_student_is_sparse_and_its_gates_learn(folder: Path, tmp_path: Path) -> None:
    """Losses are the same with and without checkpointing; after two steps no gate's weight is zero any more."""
    runs = []
    for kind in ("none", "full"):
        base = with_weights(merged(BRIEF, {"student": {**student(), "checkpointing": kind}}), folder)
        run = trainer(tmp_path / kind, base)
        assert run.networks["student"].net.sparse is not None
        assert run.networks["critic"].net.sparse is None
        assert run.teacher.net.sparse is None  # type: ignore[attr-defined]
        runs.append((run, [run.training_step() for _ in range(2)]))
    for plain, recomputed in zip(runs[0][1], runs[1][1], strict=True):
        assert plain == pytest.approx(recomputed, rel=1e-5)
    gates = {k: p for k, p in runs[0][0].networks["student"].net.named_parameters() if GATE.match(k)}
    assert len(gates) == 4
    assert all(float(p.detach().abs().max()) > 0 for k, p in gates.items() if k.endswith("weight"))


def test_gates_begin_at_zero_and_come_back_through_an_export(folder: Path, tmp_path: Path) -> None:
    network = NetworkConfig(**{**NETWORK, "init": str(folder / "student.safetensors"), "sparse": SPARSE})
    net = build_network(NetworkSpec(network, "student", 0), CPU)
    state = net.state_dict()
    assert all(not value.any() for name, value in state.items() if GATE.match(name))
    dense = load_file(folder / "student.safetensors")
    assert all(torch.equal(value, state[name]) for name, value in dense.items())

    base = with_weights(merged(BRIEF, {"student": student()}), folder)
    run = trainer(tmp_path / "run", base)
    for run.step in range(2):
        run.training_step()
    run.step = 2
    run.save_checkpoint()
    run.finish_saving()
    for form in ("diffusers", "native"):
        argv = ["--run", str(tmp_path / "run"), "--format", form, "--weights", "raw", "--out", str(tmp_path / form)]
        export(export_args(argv))
        if form == "diffusers":  # as FastWan's files have them
            files = (tmp_path / form).rglob("*.safetensors")
            names = {name for file in files for name in load_file(file)}
            assert {f"blocks.{b}.to_gate_compress.{leaf}" for b in (0, 1) for leaf in ("weight", "bias")} <= names
        again = build_network(NetworkSpec(replace(network, init=str(tmp_path / form)), "student", 0), CPU).state_dict()
        trained = run.networks["student"].net.state_dict()
        assert any(value.any() for name, value in again.items() if GATE.match(name))
        assert all(torch.equal(value, again[name]) for name, value in trained.items())


def test_sparsity_grows_as_told(folder: Path, tmp_path: Path) -> None:
    ramp = SparseConfig(0.8, ramp_step=0.03, ramp_every=30)
    assert [ramp.at(step) for step in (0, 29, 30, 60, 10_000)] == pytest.approx([0, 0, 0.03, 0.06, 0.8])
    base = with_weights(merged(BRIEF, {"student": student(ramp_step=0.2, ramp_every=1)}), folder)
    run, levels = trainer(tmp_path, base, max_steps=4), []
    step = run.training_step

    def noted() -> dict[str, float]:
        sparse = run.networks["student"].net.sparse
        assert sparse is not None
        levels.append(sparse.level)
        return step()

    run.training_step = noted  # type: ignore[method-assign]
    run.train()
    assert levels == pytest.approx([0.0, 0.2, 0.4, 0.5])
    assert [line["student/sparsity"] for line in curve(tmp_path)] == pytest.approx(levels)


def test_a_run_stopped_on_its_way_up_is_sampled_as_it_was_trained(folder: Path, tmp_path: Path) -> None:
    base = with_weights(merged(BRIEF, {"student": student(ramp_step=0.2, ramp_every=1)}), folder)
    trainer(tmp_path, base, max_steps=2).train()
    net = Generator.load(tmp_path, CPU).score.net
    assert isinstance(net, WanTransformer)
    assert net.sparse is not None
    assert net.sparse.level == pytest.approx(0.2)


def test_roles_on_one_copy_of_the_weights_have_one_sparsity() -> None:
    """One copy of the weights has one sparsity, so student and teacher must ask for the same."""
    adapted = {"lora": {"rank": 2, "targets": ["q"]}}
    both = {"student": {**student(), **adapted}, "teacher": student(), "critic": NETWORK}
    assert config(merged(DISTILLATION, both)).student.lora is not None
    for teacher in (student(sparsity=0.1), NETWORK):
        with pytest.raises(ValueError, match="student has sparse .* and the teacher"):
            config(merged(DISTILLATION, {**both, "teacher": {"sparse": None, **teacher}}))
    with pytest.raises(ValueError, match="teacher.sparse.ramp_step: a teacher does not change"):
        config(merged(DISTILLATION, {"teacher": student(ramp_step=0.1)}))


def test_what_cannot_run_or_learn_is_refused_at_load(folder: Path, tmp_path: Path) -> None:
    """FlexAttention has no backward here; an adapter over dense weights would leave the gates at zero for good."""
    flex = merged(BRIEF, {"student": student(cube=[4, 4, 4], backend="flex")})
    with pytest.raises(ConfigError, match="student.sparse: .*'flex' has no backward on a CPU"):
        trainer(tmp_path, flex)
    adapted = {**student(), "lora": {"rank": 2, "targets": ["q"], "share": False}}
    with pytest.raises(ConfigError, match="student.safetensors has no gates of sparse attention, and an adapter would"):
        trainer(tmp_path, with_weights(merged(BRIEF, {"student": adapted}), folder))


def test_gates_of_a_partitioned_network_have_their_whole_shape() -> None:
    """Under ZeRO-3 a parameter is empty, and says in `ds_shape` what it stands for."""
    net = torch.nn.Linear(3, 3)
    net.weight.ds_shape = net.weight.shape  # type: ignore[attr-defined]
    net.weight.data = torch.empty(0)
    assert [(name, tuple(value.shape)) for name, value in zeros_of(net, ["weight", "bias"])] == [
        ("weight", (3, 3)), ("bias", (3,))
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("sparse", "words"),
    [
        ({"sparsity": 1.0}, r"sparsity must be in \[0, 1\)"),
        ({"cube": [3, 3, 3], "backend": None}, "cube \\[3, 3, 3\\] is not supported: .*with backend reference"),
        ({"cube": [3, 3]}, "cube \\[3, 3\\] is not supported"),
        ({"cube": [3, 3, 0]}, "cube \\[3, 3, 0\\] is not supported"),
        ({"backend": "magic"}, "sparse.backend: 'magic' is not allowed: give one of reference, triton, flex or null"),
        ({"ramp_step": 0.0}, "ramp_step must be positive"),
    ],
)
def test_nonsense_is_refused(sparse: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        config(DISTILLATION, student=student(**sparse))
