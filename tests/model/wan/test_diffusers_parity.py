"""Our DiT is Diffusers' WanTransformer3DModel on the same weights: outputs and every gradient, in fp32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from model.attention.backends import Backend
from model.wan.config import WanConfig
from model.wan.transformer import WanTransformer
from model.wan.weights import to_diffusers_key, to_native_key
from scripts.tiny_models import small_transformer

diffusers = pytest.importorskip("diffusers")

CONFIGS = {
    "tiny": WanConfig(dim=96, ffn_dim=160, num_heads=3, num_layers=2, in_dim=4, out_dim=4, text_dim=24, text_len=7, freq_dim=32),
    "uneven_head": WanConfig(
        dim=40, ffn_dim=64, num_heads=2, num_layers=1, in_dim=3, out_dim=5, text_dim=12, text_len=5, freq_dim=256
    ),
    "no_cross_norm": WanConfig(
        dim=48, ffn_dim=64, num_heads=2, num_layers=1, in_dim=4, out_dim=4, text_dim=12, text_len=5, freq_dim=16,
        cross_attn_norm=False, eps=1e-5,
    ),
    # Diffusers tells text from image by its 512 tokens of text
    "i2v_clip": WanConfig(
        dim=48, ffn_dim=64, num_heads=2, num_layers=2, in_dim=9, out_dim=4, text_dim=12, text_len=512, freq_dim=16,
        model_type="i2v", image_dim=20,
    ),
    "i2v_without_clip": WanConfig(
        dim=48, ffn_dim=64, num_heads=2, num_layers=1, in_dim=9, out_dim=4, text_dim=12, text_len=5, freq_dim=16,
        model_type="i2v",
    ),
}  # fmt: skip

IMAGE_NAMES = {
    "condition_embedder.image_embedder.norm1": "img_emb.proj.0",
    "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
    "condition_embedder.image_embedder.norm2": "img_emb.proj.4",
    "attn2.add_k_proj": "cross_attn.k_img",
    "attn2.add_v_proj": "cross_attn.v_img",
    "attn2.norm_added_k": "cross_attn.norm_k_img",
}


def native_key(key: str) -> str:
    """Diffusers' name of a parameter under Wan's own, those of the image's path written out here."""
    for theirs_, ours in IMAGE_NAMES.items():
        key = key.replace(theirs_, ours)
    return to_native_key(key)


def pair(config: WanConfig, seed: int) -> tuple[WanTransformer, Any]:
    """Both networks with the same weights, none of them zero or one, so that every parameter matters."""
    other = small_transformer(config, seed)
    net = WanTransformer(config, Backend.PLAIN)
    net.load_state_dict({native_key(key): value for key, value in other.state_dict().items()})
    return net, other


def inputs(config: WanConfig, batch: int, frames: int, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(batch, frames, config.in_dim, height, width, generator=generator)
    sigma = torch.rand(batch, generator=generator)
    text = torch.randn(batch, config.text_len, config.text_dim, generator=generator)
    text[-1, config.text_len // 2 :] = 0  # a shorter prompt
    return x, sigma, text


def image_tokens(config: WanConfig, batch: int) -> Tensor | None:
    if config.image_dim is None:
        return None
    return torch.randn(batch, 6, config.image_dim, generator=torch.Generator().manual_seed(8))


def ours_of(net: WanTransformer, x: Tensor, sigma: Tensor, text: Tensor, image: Tensor | None) -> Tensor:
    """Our velocity at what Diffusers takes as one tensor: latents, and behind them the image's channels."""
    if net.config.model_type != "i2v":
        return net(x, sigma, text)
    latents, channels = x.split([net.config.out_dim, net.config.in_dim - net.config.out_dim], 2)
    return net(latents, sigma, text, channels=channels, image=image)


def worst(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).detach().norm() / expected.detach().norm())


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("shape", [(1, 1, 2, 2), (2, 3, 4, 6), (3, 5, 6, 4)])
def test_outputs_and_gradients_equal_diffusers(name: str, shape: tuple[int, int, int, int]) -> None:
    config = CONFIGS[name]
    net, other = pair(config, seed=3)
    x, sigma, text = inputs(config, *shape)
    ours_x, theirs_x = x.clone().requires_grad_(), x.clone().requires_grad_()

    image = image_tokens(config, x.shape[0])
    ours = ours_of(net, ours_x, sigma, text, image)
    expected = other(
        hidden_states=theirs_x.transpose(1, 2), timestep=1000 * sigma, encoder_hidden_states=text,
        encoder_hidden_states_image=image, return_dict=False,
    )[0].transpose(1, 2)  # fmt: skip
    assert ours.shape == expected.shape
    assert worst(ours, expected) < 1e-5

    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    (ours * weight).sum().backward()
    (expected * weight).sum().backward()
    assert ours_x.grad is not None
    assert theirs_x.grad is not None
    assert worst(ours_x.grad, theirs_x.grad) < 2e-5
    gradients = {native_key(name): p for name, p in other.named_parameters()}
    checked = 0
    for key, p in net.named_parameters():
        want = gradients[key].grad
        assert p.grad is not None and want is not None, key
        if want.norm() < 1e-4 * weight.norm():  # q and k over a single token: softmax of one score has no gradient
            assert p.grad.norm() < 1e-3 * weight.norm(), key
            continue
        assert worst(p.grad, want) < (5e-5 if config.image_dim is None else 1e-4), key  # sums over 512 tokens of text
        checked += 1
    assert checked >= (
        len(gradients) - 12 * config.num_layers if shape == (1, 1, 2, 2) else len(gradients) - config.num_layers * 2
    )


def test_time_per_frame_equals_diffusers_time_per_token() -> None:
    """TI2V's time per token, constant within a frame, is our time per frame."""
    config = CONFIGS["tiny"]
    net, other = pair(config, seed=5)
    x, _, text = inputs(config, 2, 3, 4, 4)
    sigma = torch.tensor([[0.0, 0.5, 1.0], [0.9, 0.1, 0.3]])
    per_token = (1000 * sigma).repeat_interleave(4, dim=1)
    with torch.no_grad():
        expected = other(x.transpose(1, 2), per_token, text, return_dict=False)[0].transpose(1, 2)
        assert worst(net(x, sigma, text), expected) < 1e-5


def test_the_image_counts() -> None:
    """Tokens and channels of the image both change the velocity; so what is equal above is not equal for nothing."""
    net, _ = pair(CONFIGS["i2v_clip"], seed=3)
    x, sigma, text = inputs(net.config, 1, 2, 4, 4)
    image = image_tokens(net.config, 1)
    assert image is not None
    with torch.no_grad():
        out = ours_of(net, x, sigma, text, image)
        assert worst(ours_of(net, x, sigma, text, image.flip(2)), out) > 1e-3
        changed = torch.cat([x[:, :, :4], x[:, :, 4:].flip(1)], 2)
        assert worst(ours_of(net, changed, sigma, text, image), out) > 1e-3


def test_conditioning_that_does_not_fit_is_refused_in_one_line() -> None:
    net, _ = pair(CONFIGS["i2v_clip"], seed=3)
    x, sigma, text = inputs(net.config, 1, 2, 4, 4)
    latents, channels = x.split([4, 5], 2)
    image = image_tokens(net.config, 1)
    bad = [
        ({"image": image}, r"latents must be \[B, F, 9, 5 of them image conditioning, H, W\], got \[1, 2, 4, 4, 4\]"),
        ({"image": image, "channels": channels[:, :1]}, "channels .* must be as the latents"),
        ({"channels": channels}, "needs CLIP's tokens of an image"),
        ({"channels": channels, "image": torch.zeros(1, 6, 3)}, r"image must be \[1, Li, 20\]"),
    ]
    for conditioning, message in bad:
        with pytest.raises(ValueError, match=message) as problem:
            net(latents, sigma, text, **conditioning)
        assert "\n" not in str(problem.value)
    plain, _ = pair(CONFIGS["i2v_without_clip"], seed=3)
    with pytest.raises(ValueError, match="takes no image tokens"):
        plain(latents, sigma, text[:, :5], channels=channels, image=image)


def test_key_map_is_a_bijection() -> None:
    net, other = pair(CONFIGS["tiny"], seed=0)
    ours, their_names = list(net.state_dict()), list(other.state_dict())
    assert sorted(map(to_diffusers_key, ours)) == sorted(their_names)
    assert [to_native_key(to_diffusers_key(key)) for key in ours] == ours
    assert sum(to_diffusers_key(key) != key for key in ours) == len(ours) - 2  # only patch_embedding is alike
