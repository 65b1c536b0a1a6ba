"""What the ranks of tests/distributed/test_sequence.py run: each case on one rank and on a group, and how far they differ."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from model.attention.backends import Backend
from model.attention.checkpointing import Checkpointing
from model.attention.kv_cache import KVCache
from model.attention.masks import FrameMask
from model.attention.sparse import SparseConfig
from model.dmd import critic_loss, dmd_loss
from model.query import Guidance, ScoreQuery
from model.score import ScoreNet
from model.sid import sid_loss
from model.types import LossOutput, Rollout
from model.wan.transformer import WanTransformer
from pipeline.causal import CausalConfig, VideoShape
from pipeline.causal_inference import generate
from pipeline.diffusion_forcing import CleanContext, teacher_forced_velocity
from pipeline.self_forcing_training import RolloutPlan, self_forcing_rollout
from tests.nets import MICRO, KeyedNoise, conditioning, gradients, latents, random_net, relative, texts
from utils import distributed
from utils.parallel.sequence import apply_sequence_parallel

CONFIG = dataclasses.replace(MICRO, num_heads=4)
IMAGE_CONFIG = dataclasses.replace(CONFIG, in_dim=6, model_type="i2v", image_dim=10)
CAUSAL = CausalConfig(2, window_frames=4, sink_frames=1, context_noise=100)  # the cache rolls
SIGMAS = (1.0, 0.8, 0.5)
FRAMES = 8
SPARSE = SparseConfig(0.5, [2, 2, 2], "reference")  # two frames of 3 x 3 tokens have four tiles, three of them ragged
Group = dist.ProcessGroup | None
Result = dict[str, Tensor]  # "whole ...": the same on all ranks of the group; "sum ...": to be summed over them


def network(
    seed: int,
    group: Group,
    checkpointing: Checkpointing = Checkpointing.none,
    backend: Backend = Backend.PLAIN,
    sparse: SparseConfig | None = None,
) -> WanTransformer:
    net = random_net(seed, CONFIG, checkpointing=checkpointing, backend=backend, sparse=sparse)
    if group is not None:
        apply_sequence_parallel(net, group)
    return net


def parameters(net: WanTransformer) -> Result:
    return {f"sum {name}": gradient for name, gradient in gradients(net).items()}


def per_frame_sigma(frames: int) -> Tensor:
    return torch.rand(2, frames, generator=torch.Generator().manual_seed(4))


def masked(
    group: Group,
    mask: FrameMask | None = None,
    size: tuple[int, int] = (6, 6),
    checkpointing: Checkpointing = Checkpointing.none,
    backend: Backend = Backend.PLAIN,
    sparse: SparseConfig | None = None,
) -> Result:
    net = network(1, group, checkpointing, backend, sparse)
    x, weight = (latents(seed, 2, FRAMES, CONFIG, *size) for seed in (2, 6))
    x.requires_grad_()
    out = net(x, per_frame_sigma(FRAMES), texts(3, 2, CONFIG), mask=mask)
    (out * weight).sum().backward()
    assert x.grad is not None
    return {"whole output": out, "whole input gradient": x.grad, **parameters(net)}


def teacher_forcing(group: Group, checkpointing: Checkpointing = Checkpointing.none) -> Result:
    net = network(1, group, checkpointing)
    x, clean, weight = (latents(seed, 2, FRAMES, CONFIG, 6, 6) for seed in (2, 9, 6))
    x.requires_grad_()
    sigma, clean_sigma = per_frame_sigma(FRAMES), 0.1 * per_frame_sigma(FRAMES).flip(1)
    out = teacher_forced_velocity(
        ScoreNet(net, "student"), x, sigma, CleanContext(clean, clean_sigma), texts(3, 2, CONFIG), CAUSAL
    )
    (out * weight).sum().backward()
    assert x.grad is not None
    return {"whole output": out, "whole input gradient": x.grad, **parameters(net)}


def with_image(group: Group, checkpointing: Checkpointing = Checkpointing.none) -> Result:
    """Channels of each frame are split like latents; a rank's image tokens serve its own tokens only."""
    net = random_net(1, IMAGE_CONFIG, checkpointing=checkpointing)
    if group is not None:
        apply_sequence_parallel(net, group)
    x, channels, weight = (latents(seed, 2, FRAMES, CONFIG, 6, 6) for seed in (2, 9, 6))
    channels.requires_grad_()
    image = torch.randn(2, 5, 10, generator=torch.Generator().manual_seed(3))
    out = net(x, per_frame_sigma(FRAMES), texts(3, 2, CONFIG), channels=channels, image=image)
    (out * weight).sum().backward()
    assert channels.grad is not None
    return {"whole output": out, "whole gradient of channels": channels.grad, **parameters(net)}


def tapped(group: Group, checkpointing: Checkpointing = Checkpointing.none) -> Result:
    """What a discriminator's heads see: the tokens of blocks, whole on every rank."""
    net = network(1, group, checkpointing)
    x = latents(2, 2, FRAMES, CONFIG, 6, 6).requires_grad_()
    features = net(x, per_frame_sigma(FRAMES), texts(3, 2, CONFIG), features=(0, 1))
    weight = torch.randn(features[0].shape, generator=torch.Generator().manual_seed(6))
    sum((feature * weight).sum() for feature in features).backward()
    assert x.grad is not None
    outputs = {f"whole feature {i}": feature for i, feature in enumerate(features)}
    return {**outputs, "whole input gradient": x.grad, **parameters(net)}


def new_cache(net: WanTransformer) -> KVCache:
    return CAUSAL.new_cache(net, VideoShape(2, FRAMES, 6, 6), torch.float32, torch.device("cpu"))


def rollout(net: WanTransformer, with_gradient: bool) -> Rollout:
    noise, plan = latents(2, 2, FRAMES, CONFIG, 6, 6), RolloutPlan(CAUSAL, SIGMAS, (1, 0, 2, 1), FRAMES)
    return self_forcing_rollout(
        ScoreNet(net, "student"), noise, conditioning(3, 2), plan, KeyedNoise(5, 2), new_cache(net),
        with_gradient=with_gradient,
    )  # fmt: skip


def generator_step(
    group: Group,
    objective: Callable[[ScoreQuery], LossOutput],
    checkpointing: Checkpointing = Checkpointing.none,
    sparse: SparseConfig | None = None,
) -> Result:
    student = network(1, group, checkpointing, sparse=sparse)
    teacher, critic = (network(seed, group, checkpointing) for seed in (11, 12))
    teacher.requires_grad_(False)
    critic.requires_grad_(False)
    made = rollout(student, with_gradient=True)
    query = ScoreQuery(
        made, ScoreNet(teacher, "teacher"), ScoreNet(critic, "critic"), conditioning(3, 2),
        Guidance(texts(13, 2, CONFIG), real=3.0, fake=1.5), torch.tensor([0.3, 0.7]), latents(14, 2, FRAMES, CONFIG, 6, 6),
    )  # fmt: skip
    out = objective(query)
    out.loss.backward()
    return {"whole loss": out.loss, "whole video": made.x0, **parameters(student)}


def critic_step(group: Group, checkpointing: Checkpointing = Checkpointing.none) -> Result:
    student, critic = network(1, group), network(12, group, checkpointing)
    made = rollout(student, with_gradient=False)
    noise = latents(15, 2, FRAMES, CONFIG, 6, 6)
    out = critic_loss(made, ScoreNet(critic, "critic"), conditioning(3, 2), per_frame_sigma(FRAMES), noise)
    out.loss.backward()
    return {"whole loss": out.loss, "whole video": made.x0, **parameters(critic)}


@torch.no_grad()
def streaming(group: Group) -> Result:
    """Inference, and what lies in the cache after it: all tokens of this rank's heads."""
    net = network(1, group)
    cache, noise = new_cache(net), latents(2, 2, FRAMES, CONFIG, 6, 6)
    out = generate(ScoreNet(net, "student"), noise, conditioning(3, 2), SIGMAS, CAUSAL, KeyedNoise(5, 2), cache)
    result = {"whole video": out}
    for layer in range(CONFIG.num_layers):
        held = cache.context(layer)
        assert held is not None
        result[f"heads of layer {layer}"] = torch.stack(held)
    return result


@torch.no_grad()
def bf16(group: Group) -> Result:
    net = ScoreNet(network(1, group), "student", compute_dtype=torch.bfloat16)
    x = latents(2, 2, FRAMES, CONFIG, 6, 6)
    return {"whole output": net.velocity(x, per_frame_sigma(FRAMES), texts(3, 2, CONFIG))}


CASES: dict[str, Callable[[Group], Result]] = {
    "streaming": streaming,
    "bidirectional": masked,
    "bidirectional_sdpa": partial(masked, backend=Backend.SDPA),
    "no_padding": partial(masked, size=(4, 8)),
    "fewer_tokens_than_ranks": partial(masked, size=(2, 2)),
    "bf16": bf16,
}
TRAINED: dict[str, Callable[..., Result]] = {  # some with checkpointing, too: one reference serves both
    "block_causal": partial(masked, mask=CAUSAL.mask(FRAMES)),
    "teacher_forcing": teacher_forcing,
    "with_image": with_image,
    "features": tapped,
    "generator_dmd": partial(generator_step, objective=dmd_loss),
    "sparse": partial(masked, mask=CAUSAL.mask(FRAMES), sparse=SPARSE),
    "generator_sparse": partial(generator_step, objective=dmd_loss, sparse=SPARSE),
    "generator_sid": partial(generator_step, objective=sid_loss),
    "critic": critic_step,
}
CHECKPOINTED = {  # one pass of each kind
    f"{name}_checkpointed": partial(TRAINED[name], checkpointing=Checkpointing.full)
    for name in ("block_causal", "teacher_forcing", "generator_dmd", "generator_sparse", "critic")
}
CASES |= TRAINED | CHECKPOINTED


def differences(actual: Result, expected: Result, group: dist.ProcessGroup) -> dict[str, float]:
    """Relative errors of a group's result, the worst over all ranks; and how far the worst rank is alone from a sum."""
    assert actual.keys() == expected.keys()
    parts = {name: value for name, value in actual.items() if name.startswith("sum")}
    out = {"one rank alone": max(relative(value, expected[name]) for name, value in parts.items())} if parts else {}
    actual |= zip(parts, summed(list(parts.values()), group), strict=True)
    for name, value in actual.items():
        reference = expected[name]
        if name.startswith("heads"):
            reference = reference.chunk(group.size(), dim=3)[group.rank()]
        assert value.shape == reference.shape, name
        out[name] = relative(value, reference)
    worst = torch.tensor(list(out.values()), dtype=torch.float64).nan_to_num(nan=torch.inf)  # a maximum may lose a NaN
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return dict(zip(out, worst.tolist(), strict=True))


def summed(parts: list[Tensor], group: dist.ProcessGroup) -> list[Tensor]:
    flat = torch.cat([part.flatten() for part in parts] or [torch.empty(0)])
    dist.all_reduce(flat, group=group)
    sizes = [part.numel() for part in parts]
    return [value.view_as(part) for value, part in zip(flat.split(sizes), parts, strict=True)]


class Sent(TorchDispatchMode):
    """Counts collectives by name, and the bytes that this rank puts into them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::")
            self.calls[name] += 1
            self.bytes[name] += args[1].nbytes  # (output, input, ...)
        return func(*args, **(kwargs or {}))


def collectives(group: dist.ProcessGroup, checkpointing: Checkpointing) -> dict[str, Any]:
    """Collectives of a forward and of a backward pass of the whole network."""
    net = network(1, group, checkpointing)
    x = latents(2, 2, FRAMES, CONFIG, 6, 6).requires_grad_()
    with Sent() as forward:
        out = net(x, torch.full((2,), 0.5), texts(3, 2, CONFIG))
    with Sent() as backward:
        out.sum().backward()
    return {"forward": forward.calls, "forward bytes": forward.bytes, "backward": backward.calls}


def refusal(group: dist.ProcessGroup) -> str:
    net = random_net(1, dataclasses.replace(CONFIG, num_heads=3))
    try:
        apply_sequence_parallel(net, group)
    except ValueError as error:
        return str(error)
    return ""


def main(rank: int, world: int, store: str, report: str) -> None:
    torch.set_num_threads(1)
    place = {"init_method": f"file://{store}", "rank": rank, "world_size": world}
    dist.init_process_group("gloo", **place, timeout=timedelta(seconds=120))
    pairs = [dist.new_group([first, first + 1]) for first in range(0, world, 2)]
    alone = [dist.new_group([member]) for member in range(world)][rank]
    assert dist.group.WORLD is not None
    groups = {2: pairs[rank // 2], 4: dist.group.WORLD}
    found: dict[str, Any] = {"refusal": refusal(groups[4]), "alone": network(1, alone).sequence is None}
    found["union"] = [sorted(distributed.union(range(rank))), sorted(distributed.union([]))]
    expected: dict[str, Result] = {}
    for name, case in CASES.items():
        reference = name.removesuffix("_checkpointed")
        if reference not in expected:
            expected[reference] = CASES[reference](None)
        for degree, group in groups.items():
            found[f"{name} {degree}"] = differences(case(group), expected[reference], group)
    for on in (False, True):
        found[f"collectives{'_checkpointed' * on}"] = collectives(
            groups[2], Checkpointing.full if on else Checkpointing.none
        )
    if rank == 0:
        Path(report).write_text(json.dumps(found))
    distributed.leave(0)
