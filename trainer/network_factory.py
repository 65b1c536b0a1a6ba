"""One network as a run needs it: made without memory, sharded, then filled from files or with random weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor, nn

from model.attention.backends import Backend, available
from model.attention.vsa import attention as vsa
from model.family import Network
from model.lora import adapter_weights, add_adapter, base_names
from model.network import LoraConfig, NetworkConfig
from model.weights import Weights
from trainer.weight_sources import open_init
from utils import distributed
from utils.errors import ConfigError
from utils.parallel.mesh import Mesh, ParallelConfig
from utils.parallel.parallelize import Sharding, fill, materialise, parallelize
from utils.random import keyed_seed


@dataclass(frozen=True)
class Placement:
    """Where a network goes: the mesh, the run's parallelism, and how this network takes part in it."""

    mesh: Mesh
    config: ParallelConfig
    sharding: Sharding


@dataclass(frozen=True)
class NetworkSpec:
    """What `build_network` makes.

    config: geometry, source of the weights, attention.
    name: of the network, in messages; (seed, name) key its random weights, the same for any number of ranks.
    seed: of the run.
    dtype: in which the weights are stored.
    trained: whether the weights take gradients.
    adapters: by name, put beside the weights, which are then frozen; (seed, adapter name) key their values.
    random_head: gives random weights a small random output layer in place of their zero one, with which networks agree
        and every loss and gradient is 0.
    empty: leaves the weights without values, for a network that is about to get others.
    """

    config: NetworkConfig
    name: str
    seed: int
    dtype: torch.dtype = torch.float32
    trained: bool = True
    adapters: Mapping[str, LoraConfig] = field(default_factory=dict)
    random_head: bool = False
    empty: bool = False


HEAD_STD = 0.02  # of a random head's weights


def build_network(spec: NetworkSpec, device: torch.device, place: Placement | None = None) -> Network:
    """A network with its starting weights; place: sharded, each rank with its part. All ranks call it together.

    The network is made without memory and sharded. Then rank 0 reads or draws the weights one by one and sends each
    rank its part. Raises ConfigError, on every rank, for a missing backend or weights that do not fit.
    """
    config = spec.config
    backend = Backend(config.attention)
    if problem := available(backend):
        raise ConfigError(f"{spec.name}.attention: {problem}")
    learns = spec.trained or bool(spec.adapters)
    if config.sparse is not None and (problem := vsa.refused(config.sparse.backend, device, backward=learns)):
        raise ConfigError(f"{spec.name}.sparse: {problem}")
    try:
        with torch.device("meta"):
            net = config.family.network(config.geometry(), backend, config.checkpointing, config.sparse).to(spec.dtype)
    except ValueError as problem:
        raise ConfigError(f"{spec.name}.{problem}") from None
    net.requires_grad_(spec.trained)
    source = None if config.init is None or spec.empty else open_init(net, config, spec.name)
    _add_adapters(net, spec, source)
    if place is not None:
        parallelize(net, place.mesh, place.config, place.sharding)
    materialise(net, device, offload=place is not None and place.sharding.offload)
    if not spec.empty:
        _fill(net, spec, source, shared=place is not None)
    return net


def _add_adapters(net: Network, spec: NetworkSpec, source: Weights | None) -> None:
    if spec.adapters and source is not None and _missing_gates(net, source):
        raise ConfigError(
            f"{spec.name}.sparse: {spec.config.init} has no gates of sparse attention, and an adapter would leave them "
            f"at zero: set {next(iter(spec.adapters))}.lora null, or start from weights that have them"
        )
    for adapter, lora in spec.adapters.items():
        try:
            add_adapter(net, adapter, lora)
        except ValueError as problem:
            raise ConfigError(f"{adapter}.{problem}") from None


def _missing_gates(net: Network, source: Weights) -> list[str]:
    """Weights that `source` lacks, by their names in files: gates of sparse attention, if it is of a dense model."""
    return [key for key in base_names(net) if key not in source.shapes]


def _fill(net: Network, spec: NetworkSpec, source: Weights | None, *, shared: bool) -> None:
    """Gives the weights and the adapters their starting values. shared: rank 0 has them, the others get parts."""
    reads, parameters = not shared or distributed.is_main(), base_names(net)
    if source is not None:
        bare = _missing_gates(net, source)
        stored = [key for key in parameters if key not in bare]
        weights = source.read(stored) if reads else _without_values(net, [parameters[key] for key in stored])
        named = ((parameters.get(key, key), value) for key, value in weights)
        fill(net, chain(named, zeros_of(net, [parameters[key] for key in bare])), shared=shared)
    else:
        with _drawn(spec.seed, "weights", spec.name, reads):
            drawn = spec.config.family.random_weights(spec.config.geometry(), spec.config.sparse)
            if spec.random_head:
                drawn = _with_head(drawn, spec)
            fill(net, ((parameters[key], value) for key, value in drawn), shared=shared)
    for adapter in spec.adapters:
        with _drawn(spec.seed, "adapter", adapter, reads):
            fill(net, adapter_weights(net, adapter), shared=shared)


def _with_head(drawn: Iterable[tuple[str, Tensor]], spec: NetworkSpec) -> Iterator[tuple[str, Tensor]]:
    """The same weights with random values for the head, by a generator of its own: all others stay as they are."""
    for key, value in drawn:
        if key == spec.config.family.head and not value.is_meta:
            generator = torch.Generator().manual_seed(keyed_seed(spec.seed, "head", spec.name))
            yield key, HEAD_STD * torch.randn(value.shape, generator=generator)
        else:
            yield key, value


@contextlib.contextmanager
def _drawn(seed: int, kind: str, name: str, reads: bool) -> Iterator[None]:
    """Inside, torch's default generator draws what (seed, kind, name) say; nothing on a rank that does not read."""
    with torch.random.fork_rng(devices=[]), contextlib.nullcontext() if reads else torch.device("meta"):
        torch.default_generator.manual_seed(keyed_seed(seed, kind, name))
        yield


def zeros_of(net: nn.Module, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Zeros for these parameters: gates of sparse attention, which the weights of a dense model do not have."""
    shapes = {name: getattr(p, "ds_shape", p.shape) for name, p in net.named_parameters()}  # whole, under ZeRO-3 too
    for name in names:
        yield name, torch.zeros(shapes[name])


def _without_values(net: nn.Module, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Names and shapes of these parameters of `net`, in this order: what ranks give that have nothing to send."""
    shapes = {name: p.shape for name, p in net.named_parameters()}
    for name in names:
        yield name, torch.empty(shapes[name], device="meta")
