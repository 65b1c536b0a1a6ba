"""Starting weights of a WanTransformer without ever holding the whole of them."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from model.attention.sparse import SparseConfig
from model.wan.config import WanConfig
from model.wan.transformer import WanTransformer, layer_weights

LAYERS = (nn.Linear, nn.Conv3d)


def random_weights(config: WanConfig, sparse: SparseConfig | None = None) -> Iterator[tuple[str, Tensor]]:
    """(name, value) of all that `WanTransformer(config, sparse=sparse)` would hold, one layer in memory at a time, by
    the same draws from torch's default generator. A name that comes again replaces what came before.

    Under `torch.device("meta")` it gives names and shapes in the same order and draws nothing.
    """
    # a layer draws when it is made; what it drew is dropped as soon as it joins the network, for Wan draws it anew
    hook = register_module_module_registration_hook(_without_memory)  # type: ignore[arg-type]
    try:
        net = WanTransformer(config, sparse=sparse)
    finally:
        hook.remove()
    for name, value in net.named_parameters():
        if not isinstance(net.get_submodule(name.rpartition(".")[0]), LAYERS):
            yield name, value.detach()
    yield from layer_weights(net)


def _without_memory(_parent: nn.Module, _name: str, module: nn.Module) -> nn.Module | None:
    return module.to("meta") if isinstance(module, LAYERS) else None
