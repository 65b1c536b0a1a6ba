"""Faster passes of the same student: what is compiled, what is multiplied in fp8."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from generation.acceleration import compile_blocks, fp8_linears
from model.attention.backends import Backend
from model.attention.sparse import SparseConfig
from tests.nets import conditioning, latents, random_net, relative, texts
from tests.pipeline.test_streaming import made, opened


def test_compiled_blocks_are_the_blocks_and_a_full_window_compiles_nothing_more() -> None:
    """Traced, and not made into code, which a GPU's tests do: each number of frames held is a shape of its own."""
    condition, plain, compiled = (
        conditioning(3, 1),
        random_net(1, backend=Backend.SDPA),
        random_net(1, backend=Backend.SDPA),
    )
    torch._dynamo.reset()
    compile_blocks(compiled, backend="aot_eager")
    expected, video = opened(plain, condition), opened(compiled, condition)
    stats, counts = torch._dynamo.utils.counters["stats"], []
    for a, b in ((made(expected, 1)[0], made(video, 1)[0]) for _ in range(7)):
        assert relative(b, a) < 1e-5
        counts.append(stats["unique_graphs"])
    assert counts[-1] == counts[-2] == counts[-3] > counts[0]
    assert dict(torch._dynamo.utils.counters["graph_break"]) == {}


@pytest.mark.parametrize("sparse", [None, SparseConfig(0.5, [1, 2, 2], "reference")])
def test_fp8_is_for_the_matrices_of_blocks_alone(sparse: SparseConfig | None) -> None:
    """By torchao's weights in fp8, which a CPU can do; on a GPU the inputs are fp8, too."""
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is in requirements-gpu.txt alone")
    net, x, sigma, text = random_net(1, sparse=sparse), latents(2, 1, 4), torch.full((1,), 0.5), texts(3, 1)
    with torch.no_grad():
        before = net(x, sigma, text)
        fp8_linears(net, torchao.Float8WeightOnlyConfig())
        after = net(x, sigma, text)
    in_fp8 = {name for name, module in net.named_modules() if has_fp8(module, torchao.Float8Tensor)}
    attention = [f"{kind}_attn.{layer}" for kind in ("self", "cross") for layer in "qkvo"]
    assert in_fp8 == {f"blocks.{i}.{name}" for i in range(2) for name in [*attention, "ffn.0", "ffn.2"]}
    assert 1e-3 < relative(after, before) < 0.1


def has_fp8(module: nn.Module, kind: type) -> bool:
    return isinstance(module, nn.Linear) and isinstance(module.weight, kind)
