"""Adapters (LoRA, arXiv 2106.09685; PEFT's layers) beside the weights of one network, which then plays several roles:
itself, or itself with any one of them. Which one is an argument of the pass, never a state that somebody has to set.

y = W x + alpha / rank * B A x, with A [rank, in] drawn as a linear layer's weights and B [out, rank] zero at first.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from model.network import LoraConfig

_FACTOR = re.compile(r"(?P<module>.+)\.(?P<part>lora_[AB])\.(?P<adapter>\w+)\.weight")
_BASE = ".base_layer."


class Adaptable(Protocol):
    """What adapters ask of a network: its blocks, all alike; they go beside the matrices of these."""

    def fsdp_units(self) -> list[nn.Module]: ...

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...


def add_adapter(net: Adaptable, adapter: str, config: LoraConfig) -> None:
    """Puts an adapter into the blocks of `net`, beside those that are there. Its factors are fp32, their values are
    nothing yet: `adapter_weights` draws them. Weights that are no adapter's are frozen.

    Raises ValueError for targets that the blocks do not have.
    """
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    legal = linear_layers(net)
    if unknown := [target for target in config.layers if target not in legal]:
        raise ValueError(f"lora.targets: {', '.join(unknown)}: no layer of a block; choose among {', '.join(legal)}")
    inside = set(net.fsdp_units())
    units = "|".join(re.escape(name) for name, module in net.named_modules() if module in inside)
    ends = "|".join(re.escape(target) for target in config.layers)
    peft = PeftConfig(
        r=config.rank, lora_alpha=config.scale * config.rank, bias="none",  # type: ignore[arg-type]
        target_modules=rf"({units})\.(\w+\.)?({ends})", init_lora_weights=False,
    )  # fmt: skip
    device = next(p.device for _, p in net.named_parameters())
    with torch.device(device), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # a second adapter is what is wanted
        inject_adapter_in_model(peft, net, adapter)  # type: ignore[arg-type]
    for block in net.fsdp_units():
        layers = [module for module in block.modules() if isinstance(module, LoraLayer)]
        block.adapted = layers  # type: ignore[assignment]
        for layer in layers:
            layer.cast_input_dtype_enabled = False  # autocast has the say
    for name, p in net.named_parameters():
        is_factor = _FACTOR.fullmatch(name) is not None
        p.requires_grad_(is_factor)
        if is_factor:
            p.data = p.data.float()


def linear_layers(net: Adaptable) -> list[str]:
    """What targets may be: the linear layers of a block by the ends of their names, `q` for both attentions'."""
    names = [name for name, module in net.fsdp_units()[0].named_modules() if isinstance(module, nn.Linear)]
    names = [name.removesuffix(".base_layer") for name in names if ".lora_" not in name]
    ends = [name.rpartition(".")[2] for name in names]
    short = [end for end in ends if not end.isdigit()]  # a number in a Sequential says nothing alone
    return list(dict.fromkeys([*short, *names]))


@torch.compiler.disable
def use_adapter(layers: Sequence[Any], adapter: str | None) -> None:
    """The coming passes through these layers add this adapter, or none. PEFT's own switches also change which weights
    need a gradient, and refuse an adapter for some layers only: a pass must do neither."""
    for layer in layers:
        layer._disable_adapters = adapter is None
        layer._active_adapter = [] if adapter is None else [adapter]


def base_names(net: nn.Module) -> dict[str, str]:
    """The names of all weights but the adapters', without and with adapters in place."""
    names = [name for name, _ in net.named_parameters() if _FACTOR.fullmatch(name) is None]
    return {name.replace(_BASE, "."): name for name in names}


def adapter_names(net: nn.Module, adapter: str) -> dict[str, str]:
    """An adapter's names as they are stored, `blocks.0.self_attn.q.lora_A.weight`, and as they are in `net`."""
    found = [match for name, _ in net.named_parameters() if (match := _FACTOR.fullmatch(name)) is not None]
    return {f"{m['module']}.{m['part']}.weight": m.group() for m in found if m["adapter"] == adapter}


def adapter_weights(net: nn.Module, adapter: str) -> Iterator[tuple[str, Tensor]]:
    """(name in `net`, value) of a new adapter, one at a time, by torch's default generator. Under
    `torch.device("meta")` it gives names and shapes in the same order."""
    shapes = {name: p.shape for name, p in net.named_parameters()}
    for name in adapter_names(net, adapter).values():
        if ".lora_B." in name:
            yield name, torch.zeros(shapes[name])
        else:
            yield name, nn.init.kaiming_uniform_(torch.empty(shapes[name]), a=math.sqrt(5))
