"""ZeRO by DeepSpeed: another way to spread a trained network over processes (arXiv 1910.02054; offload 2104.07857).

Stage 2 cuts up optimizer states and gradients, stage 3 the weights too. Everything is kept in fp32 and computed under
the caller's autocast, so the numbers are those of the other engines; stage 3 therefore gathers fp32. The package is
imported where it is needed: this module loads without it.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from utils import distributed
from utils.errors import ConfigError
from utils.fields import check_modes


class Offload(StrEnum):
    none = "none"
    cpu = "cpu"
    nvme = "nvme"  # with stage 3


class Units(Protocol):
    """What stage 3 asks of a network, beside being a module."""

    def fsdp_units(self) -> list[nn.Module]: ...


@dataclass
class DeepSpeedConfig:
    """What engine deepspeed does beyond fsdp2's keys.

    zero_stage: 2 cuts up optimizer states and gradients, 3 the weights too.
    offload_optimizer: where the optimizer's states live, whose update is then made on the CPU.
    nvme_path: a folder for nvme.
    """

    zero_stage: int = 3
    offload_optimizer: Offload = Offload.none
    nvme_path: str | None = None

    def __post_init__(self) -> None:
        if self.zero_stage not in (2, 3):
            raise ValueError(f"zero_stage must be 2 or 3, got {self.zero_stage}")
        check_modes(self)
        if (self.offload_optimizer is Offload.nvme) != (self.nvme_path is not None):
            raise ValueError("offload_optimizer nvme and nvme_path go together: set both, or neither")
        if self.offload_optimizer is Offload.nvme and self.zero_stage != 3:
            raise ValueError("offload_optimizer nvme needs zero_stage 3: with stage 2 choose cpu or none")

    def settings(self, clip_norm: float | None) -> dict[str, Any]:
        """For `deepspeed.initialize`. Batches are the caller's business: DeepSpeed is told of one at a time."""
        zero: dict[str, Any] = {
            "stage": self.zero_stage,
            "reduce_bucket_size": 50_000_000,
            # a released weight must not be believed gathered after it was written, so none is kept for its size
            "stage3_param_persistence_threshold": 0,
            # it would replace torch's linear layer for every network of the process
            "memory_efficient_linear": False,
            "override_module_apply": False,
        }
        if self.offload_optimizer is not Offload.none:
            pin = torch.cuda.is_available()
            zero["offload_optimizer"] = {"device": self.offload_optimizer.value, "pin_memory": pin}
        if self.nvme_path is not None:
            zero["offload_optimizer"]["nvme_path"] = self.nvme_path
        return {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": clip_norm or 0.0,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": None,
        }


def package() -> Any:
    """The deepspeed module, quiet, on this process's kind of device. Raises ConfigError when it is not installed."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    os.environ.setdefault("LOCAL_RANK", "0")
    try:
        import deepspeed
    except ImportError as problem:
        raise ConfigError(
            f"parallel.engine: deepspeed cannot be imported ({problem}): pip install deepspeed==0.19.8, or choose fsdp2"
        ) from None
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # torch's newer names for collectives that DeepSpeed calls by the older ones
    warnings.filterwarnings("ignore", "`torch.distributed.*` is deprecated", FutureWarning)
    # a CPU kernel that would be compiled at the first start: gloo does as well
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def start() -> None:
    """Makes the process group that DeepSpeed wants even of a process that is alone, where offload is most useful.

    Raises ConfigError when the package is missing.
    """
    package()
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


# ------------------------------------------------------------------------------------------- stage 3: cut-up weights


def is_partitioned(net: nn.Module) -> bool:
    """Whether stage 3 has cut up the weights of `net`."""
    return any(hasattr(p, "ds_tensor") for p in net.parameters())


def partition(net: nn.Module, config: DeepSpeedConfig) -> None:
    """Gives a network on the meta device memory, unit by unit, and cuts each up before the next: no process ever holds
    it whole. Values come later, by `write`."""
    deepspeed = package()
    units = cast(Units, net).fsdp_units()
    for module in (*units, net):
        _materialise(module, distributed.device())
        deepspeed.zero.Init(module=module, config_dict_or_path=config.settings(None), dtype=torch.float32)
    taken: set[nn.Parameter] = set()
    for module in (*units, net):
        for p in module.parameters():
            if p not in taken:
                # gathered as the unit begins, in one go: some layers are used without being called
                deepspeed.zero.register_external_parameter(module, p)
        taken |= set(module.parameters())


def _materialise(module: nn.Module, device: torch.device) -> None:
    for owner in module.modules():
        for name, p in owner.named_parameters(recurse=False):
            if p.is_meta:
                empty = torch.empty_like(p, device=device)
                setattr(owner, name, nn.Parameter(empty, requires_grad=p.requires_grad))


@torch.no_grad()
def write(parameter: Tensor, value: Tensor) -> None:
    """Rank 0's `value` into a cut-up parameter; the other ranks give any. A collective."""
    with package().zero.GatheredParameters([parameter], modifier_rank=0):
        if distributed.is_main():
            parameter.copy_(value)


def release(net: nn.Module) -> None:
    """Frees what is gathered of a cut-up network."""
    offload = getattr(net, "zero_offload", None)
    if offload is not None:
        offload.release_backward_leftovers()
        offload.partition_all_parameters()


def part_of(value: Tensor, parameter: Tensor) -> Tensor:
    """The flat part of a whole `value` that this rank keeps of a cut-up parameter, padded as DeepSpeed pads."""
    kept = cast(Any, parameter).ds_tensor
    piece = value.flatten()[distributed.rank() * kept.numel() :][: kept.numel()].to(kept.device, kept.dtype)
    return torch.cat([piece, piece.new_zeros(kept.numel() - piece.numel())])


def whole_of(part: Tensor, parameter: Tensor) -> Tensor:
    """The inverse, on every rank: a collective."""
    p = cast(Any, parameter)
    flat = part.new_empty(part.numel() * distributed.world_size())
    dist.all_gather(list(flat.chunk(distributed.world_size())), part.contiguous())
    return flat[: p.ds_numel].view(p.ds_shape)


# ------------------------------------------------------------------------------------------------------- the training


class Zero:
    """DeepSpeed around one trained network and its torch optimizer. Passes go through the network itself, as often and
    in whatever order; only the update is DeepSpeed's.

    clip_norm: the global norm that gradients are clipped to within `step`, None for no clipping.
    """

    def __init__(
        self, net: nn.Module, optimizer: torch.optim.Optimizer, config: DeepSpeedConfig, clip_norm: float | None
    ) -> None:
        deepspeed = package()
        self.net, self.optimizer, self.stage = net, optimizer, config.zero_stage
        self.engine, self.zero, *_ = deepspeed.initialize(
            model=net, optimizer=optimizer, config=config.settings(clip_norm)
        )
        self.unspent = False
        if self.stage == 3:
            cast(Any, net).zero_offload = self.zero.parameter_offload  # for `release`; it is no module

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Adds the gradient of `loss`, summed over the ranks: DeepSpeed would take the mean."""
        self.zero.clear_backward_seen_flag()  # what its own forward would do: the gradients so far are kept
        self.engine.set_gradient_accumulation_boundary(last)
        self.zero.backward_prologue()
        with _balanced():
            self.engine.backward(loss * distributed.world_size(), scale_wrt_gas=False)
        self.unspent = True

    def norm(self) -> Tensor:
        """The gradient's global norm, nan where an element is not finite. After the last `backward` of an update."""
        norms = self.zero._get_norm_groups() if self.stage == 3 else [self.zero.scaled_global_norm()]
        each = torch.stack([torch.as_tensor(norm, dtype=torch.float32).cpu() for norm in norms])
        return torch.where((each < 0).any(), torch.nan, each.norm())  # DeepSpeed says -1 for not finite

    def step(self) -> None:
        """One update with the optimizer's options as they are now; clips first."""
        self.engine.step()
        self.unspent = False

    def discard(self) -> None:
        """Forgets gradients that no update used. DeepSpeed forgets in a step: it makes one in which nothing moves."""
        if self.unspent:
            with _inert(self.optimizer):
                self.step()

    # ------------------------------------------------------------------------ whole tensors, for what outlives the run

    @torch.no_grad()
    def read(self, parameter: nn.Parameter, key: str | None = None) -> Tensor:
        """The fp32 weight, or its optimizer state `key`, whole on every rank: a collective."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        found = safe_get_full_fp32_param(parameter) if key is None else safe_get_full_optimizer_state(parameter, key)
        assert found is not None, "not a parameter that DeepSpeed trains"
        return cast(Tensor, found)

    @torch.no_grad()
    def put(self, parameter: nn.Parameter, value: Tensor, key: str | None = None) -> None:
        """Sets what `read` gives, from a value whole on every rank. States must be there: `prime`."""
        from deepspeed import utils

        if self.stage == 3:
            part = part_of(value, parameter)
            if key is not None:
                utils.safe_set_local_optimizer_state(parameter, part, key)
                return
            cast(Any, parameter).ds_tensor.copy_(part)
            utils.safe_set_local_fp32_param(parameter, part)
        elif key is not None:
            utils.safe_set_full_optimizer_state(parameter, value.to(parameter.device), key)
        else:
            parameter.copy_(value)
            utils.safe_set_full_fp32_param(parameter, parameter.detach())

    def keys(self) -> tuple[list[str], Tensor | None]:
        """Names of the optimizer's states that are like their parameters, and its step count; none before a step."""
        for state in self.optimizer.state.values():
            return [key for key, value in state.items() if key != "step"], state["step"]
        return [], None

    @torch.no_grad()
    def prime(self, keys: list[str], step: Tensor) -> None:
        """States of zeros for every parameter, as if `step` updates had been made."""
        flats = self.zero.fp32_partitioned_groups_flat if self.stage == 3 else self.zero.single_partition_of_fp32_groups
        for flat in flats:
            self.optimizer.state[flat] = {"step": step.clone(), **{key: torch.zeros_like(flat) for key in keys}}
        if self.stage == 2:
            self.zero._lazy_init_hp_params_optimizer_state()


@contextmanager
def _balanced() -> Iterator[None]:
    """Recomputation stops before a block's end, and DeepSpeed's list of running modules would grow by it each time."""
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

    depth = len(FWD_MODULE_STACK)
    yield
    del FWD_MODULE_STACK[depth:]


@contextmanager
def _inert(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """The optimizer's steps do nothing inside."""
    cast(Any, optimizer).step = lambda *_: None
    try:
        yield
    finally:
        del cast(Any, optimizer).step
