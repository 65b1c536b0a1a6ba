"""The mesh's arithmetic and messages, and how weights reach a network without ever being whole twice."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

from model.attention.backends import Backend
from model.attention.checkpointing import Checkpointing
from model.wan.init import random_weights
from model.wan.transformer import WanTransformer
from model.wan.weights import LazyWeights, check_fit, shapes_of, to_diffusers_key
from tests.nets import MICRO, gradients, latents, random_net, relative, texts
from tests.small import config
from trainer.network_factory import NetworkSpec, build_network
from utils.errors import ConfigError
from utils.parallel.mesh import Mesh, ParallelConfig, build_mesh, legal_splits, split
from utils.parallel.parallelize import Sharding, parallelize
from utils.random import keyed_seed

CPU = torch.device("cpu")


def test_splits() -> None:
    assert split(ParallelConfig(), 8) == (1, 8, 1)
    assert split(ParallelConfig(replicate=2, sequence=2), 8) == (2, 2, 2)
    assert split(ParallelConfig(replicate=8), 8) == (8, 1, 1)
    assert sorted(legal_splits(4)) == [(1, 1, 4), (1, 2, 2), (1, 4, 1), (2, 1, 2), (2, 2, 1), (4, 1, 1)]
    for world in (1, 6, 64):
        assert all(r * s * q == world for r, s, q in legal_splits(world))


@pytest.mark.parametrize(
    ("parallel", "world", "message"),
    [
        (ParallelConfig(replicate=3), 4, "= 3 x 1 x 1 is not the world of 4 processes: choose 1x4x1, 2x2x1, 4x1x1"),
        (ParallelConfig(sequence=2, shard=3), 4, "= 1 x 3 x 2 is not the world of 4 processes: choose 1x2x2, 2x1x2"),
        (ParallelConfig(sequence=3), 4, "= 1 x 1 x 3 is not the world of 4 processes: choose 1x4x1, 1x2x2, 1x1x4"),
        (ParallelConfig(replicate=2), 1, "= 2 x 1 x 1 is not the world of 1 process: choose 1x1x1"),
    ],
)
def test_a_split_that_is_not_the_world_names_those_that_are(parallel: ParallelConfig, world: int, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        build_mesh(parallel, world)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_sequence_must_divide_the_heads() -> None:
    config(parallel={"sequence": 2})
    with pytest.raises(
        ConfigError, match=r"parallel.sequence 3 does not divide the heads .* \(2, 2, 2\): choose 1, 2$"
    ):
        config(parallel={"sequence": 3})
    with pytest.raises(ConfigError, match="parallel.engine: 'ddp' is not allowed: give one of fsdp2, deepspeed"):
        config(parallel={"engine": "ddp"})


def test_ranks_of_a_sequence_group_share_a_batch() -> None:
    meshes = [Mesh(replicate=2, shard=2, sequence=3, rank=rank) for rank in range(12)]
    assert [mesh.dp_rank for mesh in meshes] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert [mesh.sequence_rank for mesh in meshes] == [0, 1, 2] * 4
    assert {mesh.dp_size for mesh in meshes} == {4}
    assert {mesh.world for mesh in meshes} == {12}


class Largest(TorchDispatchMode):
    """Most elements in tensors that were made inside and are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.device.type == "cpu":
            storage = out.untyped_storage()
            key, elements = storage._cdata, storage.nbytes() // out.element_size()
            if key not in self.alive:
                self.alive[key] = elements
                self.most = max(self.most, sum(self.alive.values()))
                weakref.finalize(out, self.alive.pop, key, None)
        return out


def test_random_weights_come_one_by_one_and_are_the_constructors() -> None:
    torch.manual_seed(3)
    whole = dict(WanTransformer(MICRO, Backend.PLAIN).named_parameters())
    torch.manual_seed(3)
    with Largest() as memory:
        found = {}
        for name, value in random_weights(MICRO):
            found[name] = float(value.double().sum()), tuple(value.shape)
            del value
    small = sum(p.numel() for p in whole.values() if p.ndim == 1 or p.shape[0] == 1)
    largest = max(p.numel() for p in whole.values())
    assert memory.most <= small + 3 * largest < sum(p.numel() for p in whole.values())
    assert found == {name: (float(p.detach().double().sum()), tuple(p.shape)) for name, p in whole.items()}
    with torch.device("meta"):
        order = [name for name, _ in random_weights(MICRO)]
    assert order == [name for name, _ in random_weights(MICRO)]


def test_a_network_is_drawn_by_seed_and_name() -> None:
    small = config().student
    network = build_network(NetworkSpec(small, "student", 1), CPU)
    with torch.random.fork_rng():
        torch.manual_seed(keyed_seed(1, "weights", "student"))
        torch.default_generator.manual_seed(keyed_seed(1, "weights", "student"))
        made = WanTransformer(small.geometry(), Backend.PLAIN)
    assert all(torch.equal(p, network.get_parameter(name)) for name, p in made.named_parameters())


def test_lazy_weights_read_either_format_and_say_what_does_not_fit(tmp_path: Path) -> None:
    net = random_net(4)
    state = {key: value.detach() for key, value in net.state_dict().items()}
    for number, tensors in enumerate((state, {to_diffusers_key(key): value for key, value in state.items()})):
        path = tmp_path / f"{number}.safetensors"
        save_file(tensors, path)
        weights = LazyWeights(path)
        check_fit(shapes_of(state), weights.shapes)
        assert all(torch.equal(value, state[name]) for name, value in weights.read(state))
    state["head.head.bias"] = torch.zeros(7)
    save_file(state, tmp_path / "odd.safetensors")
    with pytest.raises(ValueError, match=r"1 of another shape \(head.head.bias \[7\] instead of \[12\]\)"):
        check_fit(shapes_of(net.state_dict()), LazyWeights(tmp_path / "odd.safetensors").shapes)
    (tmp_path / "torn.safetensors").write_bytes((tmp_path / "odd.safetensors").read_bytes()[:200])
    with pytest.raises(ValueError, match="torn.safetensors: .*"):
        LazyWeights(tmp_path / "torn.safetensors")


@pytest.mark.slow
def test_compiled_blocks_are_the_blocks() -> None:
    found = []
    for compiled in (False, True):
        net = random_net(5, backend=Backend.SDPA, checkpointing=Checkpointing.full)
        parallelize(net, Mesh(), ParallelConfig(), Sharding(compile=compiled))
        assert net.state_dict().keys() == random_net(5).state_dict().keys()
        torch._dynamo.utils.counters.clear()  # of other tests
        velocity = net(latents(6, 2, 3), torch.tensor([0.3, 0.8]), texts(7, 2))
        velocity.square().mean().backward()
        found.append(torch.cat([velocity.detach().flatten(), *(g.flatten() for g in gradients(net).values())]))
        calls = torch._dynamo.utils.counters["stats"]["calls_captured"]
        assert (calls > 0) == compiled
    assert relative(found[1], found[0]) < 1e-5
