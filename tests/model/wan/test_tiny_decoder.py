"""TAEHV's tiny decoder: the published layout, the mathematics against a slow reference, streams, bad files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from model.codec import VAEConfig
from model.wan.tiny_decoder import TinyDecoder, load_tiny_decoder
from model.wan.vae import WanVAE, load_vae
from scripts.tiny_models import small_vae

WIDTHS = (256, 128, 64, 64)


def layout(a: int = 16, b: int = 12, c: int = 8, d: int = 8) -> dict[str, tuple[int, ...]]:
    """Names and shapes of taew2_1.pth's decoder as its repository publishes them, here with narrower stages."""
    out: dict[str, tuple[int, ...]] = {
        **{"1.weight": (a, 16, 3, 3), "1.bias": (a,), "22.weight": (3, d, 3, 3), "22.bias": (3,)},
        **{"7.conv.weight": (a, a, 1, 1), "13.conv.weight": (2 * b, b, 1, 1), "19.conv.weight": (2 * c, c, 1, 1)},
        **{"8.weight": (b, a, 3, 3), "14.weight": (c, b, 3, 3), "20.weight": (d, c, 3, 3)},
    }
    for index, width in zip((3, 4, 5, 9, 10, 11, 15, 16, 17), (a, a, a, b, b, b, c, c, c), strict=True):
        for layer in (0, 2, 4):
            out[f"{index}.conv.{layer}.weight"] = (width, width * (2 if layer == 0 else 1), 3, 3)
            out[f"{index}.conv.{layer}.bias"] = (width,)
    return {f"decoder.{name}": shape for name, shape in out.items()}


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    draws = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=draws) / max(1, int(torch.tensor(shape[1:]).prod())) ** 0.5
        for name, shape in layout().items()
    }


def reference(state: dict[str, Tensor], latents: Tensor) -> Tensor:
    """The whole clip in one pass, all frames of a layer at once, written from the layout alone. [F, C, H, W] in."""

    def conv(x: Tensor, name: str) -> Tensor:
        weight = state[f"decoder.{name}.weight"]
        return functional.conv2d(x, weight, state.get(f"decoder.{name}.bias"), padding=weight.shape[-1] // 2)

    x = conv(torch.tanh(latents / 3) * 3, "1").relu()
    for first, factor in ((3, 1), (9, 2), (15, 2)):
        for index in range(first, first + 3):
            h = torch.cat([x, torch.cat([torch.zeros_like(x[:1]), x[:-1]])], dim=1)
            h = conv(conv(conv(h, f"{index}.conv.0").relu(), f"{index}.conv.2").relu(), f"{index}.conv.4")
            x = (h + x).relu()
        x = x.repeat_interleave(2, dim=-1).repeat_interleave(2, dim=-2)
        grown = conv(x, f"{first + 4}.conv")
        x = torch.cat([part for frame in grown for part in frame.chunk(factor)]).view(-1, *x.shape[1:])
        x = conv(x, f"{first + 5}")
    return conv(x.relu(), "22").clamp(0, 1)[3:]


def test_names_and_shapes_are_the_published_ones() -> None:
    with torch.device("meta"):
        net, other = TinyDecoder(), TinyDecoder(48, 2)
    assert {name: tuple(p.shape) for name, p in net.named_parameters()} == layout(*WIDTHS)
    assert other.decoder[1].weight.shape[1] == 48
    assert other.decoder[22].weight.shape[0] == 12


def test_streams_are_the_reference_and_each_other(state: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save({**state, "encoder.0.weight": torch.zeros(1)}, tmp_path / "taew2_1.pth")
    save_file(state, tmp_path / "taew2_1.safetensors")
    net = load_tiny_decoder(tmp_path / "taew2_1.pth", torch.float32)
    x = torch.randn(2, 3, 16, 2, 3, generator=torch.Generator().manual_seed(1))
    whole = net.stream()(x)
    expected = torch.stack([reference(state, sample) for sample in x])
    assert whole.shape == expected.shape == (2, 9, 3, 16, 24)
    assert whole.std() > 0.1
    assert 0 < whole.mean() < 1
    assert torch.allclose(whole, expected, atol=1e-5)
    stream = load_tiny_decoder(tmp_path / "taew2_1.safetensors", torch.float32).stream()
    assert torch.equal(torch.cat([stream(x[:, :1]), stream(x[:, 1:])], dim=1), whole)
    assert not torch.allclose(net.stream()(x[:, 1:])[:, -1], whole[:, -1], atol=1e-3)


def test_it_decodes_in_the_vaes_place(state: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(state, tmp_path / "tiny.safetensors")
    small_vae("2.1").save_pretrained(tmp_path / "vae")
    vae = load_vae(VAEConfig(str(tmp_path), str(tmp_path / "tiny.safetensors"), dtype="fp32"))
    x = torch.randn(1, 2, 16, 2, 2)
    assert torch.allclose(vae.decode(x)[0], reference(state, x[0]), atol=1e-5)
    with pytest.raises(ValueError, match="for 48 channels at 1/16 of the size, the VAE has 16 at 1/8"):
        WanVAE(small_vae("2.1"), tiny=TinyDecoder(48, 2))
    with pytest.raises(ValueError, match="tiled is for the VAE's own decoder"):
        VAEConfig("x", "y", tiled=True)


def test_a_grown_layer_keeps_its_last_frames(state: dict[str, Tensor], tmp_path: Path) -> None:
    wider = torch.cat([torch.ones(16, 16, 1, 1), state["decoder.7.conv.weight"]])
    save_file({**state, "decoder.7.conv.weight": wider}, tmp_path / "tiny.safetensors")
    net = load_tiny_decoder(tmp_path / "tiny.safetensors", torch.float32)
    assert torch.equal(net.decoder[7].conv.weight, state["decoder.7.conv.weight"])  # type: ignore[union-attr]


def test_bad_files_are_refused_in_one_line(state: dict[str, Tensor], tmp_path: Path) -> None:
    def refused(match: str, name: str, table: object = None) -> None:
        if table is not None:
            torch.save(table, tmp_path / name)
        with pytest.raises(ValueError, match=match) as caught:
            load_tiny_decoder(tmp_path / name)
        assert "\n" not in str(caught.value)

    refused("is no .safetensors or .pth file", "absent.pth")
    refused("has no 'decoder.1.weight'", "a.pth", {"x": torch.zeros(1)})
    refused("is no table of tensors", "b.pth", [1])
    refused("cannot be read", "c.pth", {"x": Path("code")})  # nothing but tensors is unpickled
    refused("lacks decoder.3.conv.0.bias", "d.pth", {k: v for k, v in state.items() if k != "decoder.3.conv.0.bias"})
    refused("holds decoder.23.weight, which", "e.pth", {**state, "decoder.23.weight": torch.zeros(1)})
    (tmp_path / "f.safetensors").write_bytes(b"no")
    refused("cannot be read", "f.safetensors")
