"""Features of a network's blocks, and the heads of discriminators on them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from model.attention.checkpointing import Checkpointing
from model.attention.kv_cache import CacheSpec
from model.discriminator import (
    Discriminator,
    ImageHead,
    ImageHeads,
    RegisterHead,
    VideoHead,
    VideoHeads,
    group_norm,
    tapped_blocks,
)
from model.experts import Experts
from model.lora import adapter_names, add_adapter
from model.network import LoraConfig
from model.score import ScoreNet
from model.types import Conditioning, Evaluations
from model.wan.config import PRESETS
from tests.nets import MICRO, conditioning, gradients, latents, random_net, relative, texts

DEEP = replace(MICRO, num_layers=4)
SIGMA = torch.tensor([0.3, 0.8])


def test_depths_become_blocks() -> None:
    assert tapped_blocks(30) == (15, 22, 29)
    assert tapped_blocks(40) == (20, 30, 39)
    assert tapped_blocks(4) == (2, 3)  # 75 and 99 % are one block
    with pytest.raises(ValueError, match="shares in \\[0, 1\\)"):
        tapped_blocks(30, (0.5, 1.0))


def hooked(net: nn.Module, blocks: tuple[int, ...], x: Tensor) -> list[Tensor]:
    """What the blocks put out in an ordinary pass, where the tokens lie."""
    seen: dict[int, Tensor] = {}
    handles = [
        net.blocks[i].register_forward_hook(lambda _m, _a, out, i=i: seen.__setitem__(i, out[0])) for i in blocks
    ]
    net(x, SIGMA, texts(2, 2))
    for handle in handles:
        handle.remove()
    return [seen[i].reshape(2, x.shape[1], 2, 3, -1).permute(0, 1, 4, 2, 3) for i in blocks]


def test_features_are_what_the_blocks_put_out_and_later_blocks_do_not_run() -> None:
    net, x, ran = random_net(0, DEEP), latents(1, 2, 3), []
    expected = hooked(net, (0, 2), x)
    for i, block in enumerate(net.blocks):
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
    features = net(x, SIGMA, texts(2, 2), features=(0, 2))
    assert [list(f.shape) for f in features] == [[2, 3, 48, 2, 3]] * 2
    assert all(torch.equal(a, b) for a, b in zip(features, expected, strict=True))
    assert ran == [0, 1, 2]


def features_gradient(kind: Checkpointing) -> tuple[Tensor, dict[str, Tensor]]:
    net, x = random_net(0, DEEP, checkpointing=kind), latents(1, 2, 3).requires_grad_()
    sum(f.square().sum() for f in net(x, SIGMA, texts(2, 2), features=(1, 2))).backward()
    assert x.grad is not None
    return x.grad, gradients(net)


@pytest.mark.parametrize("kind", [Checkpointing.full, Checkpointing.selective])
def test_features_have_one_gradient_whatever_is_checkpointed(kind: Checkpointing) -> None:
    (x_plain, plain), (x_again, again) = features_gradient(Checkpointing.none), features_gradient(kind)
    assert relative(x_again, x_plain) < 1e-5
    assert plain.keys() == again.keys()
    assert all(relative(again[name], plain[name]) < 1e-4 for name in plain if float(plain[name].norm()) > 1e-3)
    assert not any(name.startswith(("blocks.3.", "head.")) for name in plain)  # nothing behind the last feature


def test_features_that_cannot_be_are_refused_in_one_line() -> None:
    net, x = random_net(0, DEEP), latents(1, 2, 3)
    for wrong in ((), (2, 1), (1, 1), (3, 4), (-1,)):
        with pytest.raises(ValueError, match="features must be blocks of 0..3, rising"):
            net(x, SIGMA, texts(2, 2), features=wrong)
    cache = net.new_cache(CacheSpec(2, 3, 4, 6), dtype=torch.float32, device="cpu")
    with pytest.raises(ValueError, match="neither write a cache"):
        net(x, SIGMA, texts(2, 2), features=(1,), cache=cache, write_cache=True)


def test_a_score_gives_features_of_what_it_would_see_and_counts_them() -> None:
    """With its conditioning; given frames pinned, at sigma 0, as for its velocity."""
    net, x, evaluations = random_net(0, DEEP), latents(1, 2, 3), Evaluations()
    initial = latents(5, 2, 1)
    plain = ScoreNet(net, "teacher", evaluations).features(x, SIGMA, conditioning(2, 2), (1, 3))
    assert all(torch.equal(a, b) for a, b in zip(plain, net(x, SIGMA, text=texts(2, 2), features=(1, 3)), strict=True))
    pinned = ScoreNet(net, "teacher", evaluations, pins_initial=True).features(
        x, SIGMA, conditioning(2, 2, initial), (1, 3)
    )
    times = torch.stack([torch.zeros(2), SIGMA, SIGMA], 1)
    by_hand = net(torch.cat([initial, x[:, 1:]], 1), times, texts(2, 2), features=(1, 3))
    assert all(torch.equal(a, b) for a, b in zip(pinned, by_hand, strict=True))
    assert not torch.equal(plain[0], pinned[0])
    assert evaluations.calls == {"teacher": 2}
    assert evaluations.frames == {"teacher": 12}


def test_experts_give_each_samples_features_from_its_own_side() -> None:
    high, low, x = random_net(0, DEEP), random_net(1, DEEP), latents(1, 2, 3)
    together = Experts(high, low, 0.5)(x, SIGMA, text=texts(2, 2), features=(1, 3))
    for i, net in enumerate((low, high)):
        alone = net(x[i : i + 1], SIGMA[i : i + 1], texts(2, 2)[i : i + 1], features=(1, 3))
        assert all(torch.allclose(a[i], b[0], atol=1e-6) for a, b in zip(together, alone, strict=True))


def all_learn(heads: nn.Module, features: list[Tensor], logits: tuple[int, int]) -> None:
    """Logits have this shape, and every parameter a gradient that is not zero (nor rounding)."""
    out = heads(features)
    assert out.shape == logits
    out.square().sum().backward()
    for name, p in heads.named_parameters():
        assert p.grad is not None and float(p.grad.abs().max()) > 1e-6, name


def feature(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_video_heads_see_every_frame_and_all_of_them_learns(frames: int) -> None:
    torch.manual_seed(0)
    tokens = [feature(i, 2, frames, 48, 2, 3).requires_grad_() for i in range(3)]
    all_learn(VideoHeads(48, 3), tokens, (2, 3))
    assert all(bool((t.grad.abs().sum((0, 2, 3, 4)) > 0).all()) for t in tokens if t.grad is not None)


def test_video_head_unpatchifies_tokens_where_they_lie() -> None:
    """d / 4 channels at twice the size; a token's numbers stay within its own 2 x 2 pixels."""
    head = VideoHead(16, 2)
    seen: list[Tensor] = []
    head.conv.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    tokens = torch.zeros(1, 3, 16, 4, 5)
    tokens[0, 1, :, 2, 3] = torch.arange(1.0, 17.0)
    head(tokens)
    grid = seen[0]
    assert grid.shape == (1, 4, 3, 8, 10)
    assert sorted(grid[0, :, 1, 4:6, 6:8].flatten().tolist()) == list(range(1, 17))
    assert float(grid.sum()) == 136


@pytest.mark.parametrize("registers", [1, 3])
def test_register_head_learns_and_knows_no_order_of_tokens(registers: int) -> None:
    torch.manual_seed(0)
    head = RegisterHead(48, 3, heads=4, registers=registers)
    tokens = [feature(i, 2, 3, 48, 2, 3) for i in range(3)]
    all_learn(head, tokens, (2, 1))
    assert torch.allclose(head([t.flip(1, 3) for t in tokens]), head(tokens), atol=1e-5)
    assert not torch.allclose(head([tokens[1], tokens[0], tokens[2]]), head(tokens), atol=1e-3)
    with pytest.raises(ValueError, match="do not divide"):
        RegisterHead(48, 3, heads=5)


def test_image_heads_halve_down_to_4_and_all_of_them_learns() -> None:
    torch.manual_seed(0)
    all_learn(
        ImageHeads([(16, 16), (32, 8), (8, 4)]),
        [feature(0, 3, 1, 16, 16, 16), feature(1, 3, 1, 32, 8, 8), feature(2, 3, 1, 8, 4, 4)],
        (3, 3),
    )
    for size in (2, 6, 12):
        with pytest.raises(ValueError, match="cannot be halved to 4"):
            ImageHead(16, size)


def test_group_norm_leaves_something_on_one_position() -> None:
    """A group of one channel and one position would be zero whatever came in."""
    assert [group_norm(c).num_groups for c in (4, 8, 12, 48, 256, 7)] == [1, 2, 3, 12, 32, 1]
    assert bool((group_norm(256)(feature(0, 2, 256, 1, 1)).abs() > 1e-3).any())


def test_an_odd_width_has_no_patches() -> None:
    with pytest.raises(ValueError, match="unpatchified 2x2"):
        VideoHeads(30, 2)


def test_a_trained_backbone_gets_the_classifiers_gradient_a_frozen_one_none() -> None:
    net, condition = random_net(0, DEEP), Conditioning(texts(2, 2))
    judge = Discriminator(ScoreNet(net, "critic"), VideoHeads(48, 2), (1, 2))
    judge.logits(latents(1, 2, 3), SIGMA, condition).sum().backward()
    assert "blocks.2.ffn.2.weight" in gradients(net)
    net.zero_grad(set_to_none=True)
    net.requires_grad_(False)
    x = latents(1, 2, 3).requires_grad_()
    judge.logits(x, SIGMA, condition).sum().backward()
    assert gradients(net) == {}
    assert x.grad is not None
    assert float(x.grad.norm()) > 0


@pytest.mark.parametrize(("preset", "width"), [("1.3b", 384), ("14b", 1280)])
def test_heads_fit_wans_own_geometry(preset: str, width: int) -> None:
    config = PRESETS[preset]
    with torch.device("meta"):
        tokens = [torch.empty(1, 21, config.dim, 30, 52) for _ in tapped_blocks(config.num_layers)]
        heads, registers = VideoHeads(config.dim, 3), RegisterHead(config.dim, 3, config.num_heads)
        assert heads(tokens).shape == (1, 3)
        assert registers(tokens).shape == (1, 1)
    assert heads.heads[0].conv.weight.shape == (width, width, 2, 4, 4)


def test_features_are_of_the_role_that_an_adapter_plays() -> None:
    net = random_net(0, DEEP)
    x, bare = latents(1, 2, 3), ScoreNet(random_net(0, DEEP), "teacher")
    for seed, name in enumerate(("a", "b")):
        add_adapter(net, name, LoraConfig(rank=2, targets=["q", "ffn.0"]))
        generator = torch.Generator().manual_seed(seed)
        for key in adapter_names(net, name).values():
            weight = net.get_parameter(key)
            weight.data = 0.3 * torch.randn(weight.shape, generator=generator)
    roles = [ScoreNet(net, str(name), adapter=name).features(x, SIGMA, conditioning(2, 2), (3,)) for name in ("a", "b")]
    teacher = ScoreNet(net, "teacher").features(x, SIGMA, conditioning(2, 2), (3,))
    assert torch.equal(teacher[0], bare.features(x, SIGMA, conditioning(2, 2), (3,))[0])
    assert not torch.allclose(roles[0][0], teacher[0], atol=1e-3)
    assert not torch.allclose(*[r[0] for r in roles], atol=1e-3)
