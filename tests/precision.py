"""What a function does with the dtypes and the graphs of its inputs: the checks of tests/*/test_precision.py."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from model.score import ScoreNet

Outputs = Mapping[str, Tensor]
SHAPE = (3, 2, 2, 5, 4)  # [B, F, C, H, W]


@dataclass(frozen=True)
class Case:
    """A function and inputs that bf16 holds exactly.

    run: the function, called with the inputs by name; what it gives by name.
    inputs: fp32.
    like: outputs that come back in the dtype of an input, and that input's name; the others are fp32 always.
    widens: inputs that make the outputs fp64 where they are it.
    leaves: inputs that require gradient when graphs are looked at.
    reaches: the leaves that the output `loss` has a gradient in.
    live: outputs that may hold a graph.
    """

    run: Callable[..., Outputs]
    inputs: dict[str, Tensor]
    like: dict[str, str] = field(default_factory=dict)
    widens: Collection[str] = ()
    leaves: Collection[str] = ()
    reaches: Collection[str] = ()
    live: Collection[str] = ("loss",)


def check_precision(case: Case) -> None:
    """Each input in bf16, then all of them, then each in fp64: the outputs are those of fp32, cast at most."""
    exact = case.run(**case.inputs)
    assert {x.dtype for x in exact.values()} == {torch.float32}
    names = list(case.inputs)
    wide = [[name] for name in names if name not in case.widens]
    trials = [(torch.bfloat16, [name]) for name in names] + [(torch.bfloat16, names)]
    for dtype, changed in trials + [(torch.float64, name) for name in wide]:
        inputs = {name: x.to(dtype) if name in changed else x for name, x in case.inputs.items()}
        for name, actual in case.run(**inputs).items():
            expected = exact[name].to(inputs[case.like[name]].dtype) if name in case.like else exact[name]
            what = f"{name} for {', '.join(changed)} in {dtype}"
            assert actual.dtype is expected.dtype, f"{what} is {actual.dtype}"
            assert torch.equal(actual, expected), what


def check_graphs(case: Case) -> None:
    """The loss has gradients in what it trains alone, and what is logged or judged holds no graph."""
    inputs = {name: x.clone().requires_grad_(name in case.leaves) for name, x in case.inputs.items()}
    outputs = case.run(**inputs)
    held = {name for name, x in outputs.items() if x.requires_grad}
    assert held <= set(case.live), f"{held - set(case.live)} hold a graph"
    leaves = {name: inputs[name] for name in case.leaves}
    found = torch.autograd.grad(outputs["loss"], list(leaves.values()), allow_unused=True)
    reached = {name for name, g in zip(leaves, found, strict=True) if g is not None}
    assert reached == set(case.reaches)


def rough(seed: int, *shape: int) -> Tensor:
    """Standard normal numbers as bf16 holds them: products and sums of them do not fit into bf16."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16().float()


def whole(seed: int, *shape: int) -> Tensor:
    """Whole numbers in [-4, 4]: bf16 holds their mixtures at sigma 1/4, 1/2 and 3/4."""
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)).float()


class Answer(nn.Module):
    """A network that says `answer` + x / 2 + the prompt's first number, or `answer` alone where it is told `flat`.

    seen: each x that it was shown, with its graph.
    """

    def __init__(self, answer: Tensor, *, flat: bool = False) -> None:
        super().__init__()
        self.answer, self.flat = answer, flat
        self.slope = nn.Parameter(torch.tensor([0.5]), requires_grad=False)  # 1-d, so that bf16 x becomes fp32
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor, sigma: Tensor, text: Tensor, **mode: object) -> Tensor | list[Tensor]:
        self.seen.append(x)
        if self.flat:
            return self.answer
        answer = torch.cat([self.answer] * (len(x) // len(self.answer)))
        out = answer + self.slope * x + text[:, :1, :1, None, None]
        return [out] if "features" in mode else out


def answering(answer: Tensor, *, flat: bool = False) -> tuple[ScoreNet, Answer]:
    net = Answer(answer, flat=flat)
    return ScoreNet(net, "answer"), net
