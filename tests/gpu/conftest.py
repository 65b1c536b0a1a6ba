"""Everything in this folder needs CUDA, and computes fp32 in fp32."""

from __future__ import annotations

import pytest
import torch

from model.attention.backends import Backend
from model.attention.vsa.attention import SparseBackend


# of session scope, so that it skips before any other fixture touches the device
@pytest.fixture(scope="session", autouse=True)
def _needs_cuda() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")


@pytest.fixture(autouse=True)
def exact_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """TF32 rounds operands to 10 bits, 5e-4 relative, and no tolerance here allows for that. cuDNN's convolutions use it
    by default; what Inductor compiles, FlexAttention too, does as matrix products do."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With pytest-xdist's `--dist loadgroup`, tests that share what is compiled run in one process, one after another."""
    for item in items if config.pluginmanager.hasplugin("xdist") else ():
        group = compiled_group(item)
        if group is not None:
            item.add_marker(pytest.mark.xdist_group(group))


def compiled_group(item: pytest.Item) -> str | None:
    """The tests of FlexAttention: dense in any shape, sparse by dtype and width of a head. None for all others."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    if Backend.FLEX in parameters.values():
        return "flex"
    if SparseBackend.FLEX in parameters.values():
        _, _, width, *_ = item.module.CASES[parameters["name"]]  # type: ignore[attr-defined]
        return f"sparse_flex_{parameters['dtype']}_{width}".replace("torch.", "")
    return None
