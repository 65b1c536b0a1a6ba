"""LoRA files under everyone's names, added to base weights; ours under theirs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from model.network import LoraWeights, NetworkConfig
from model.wan.formats import to_diffusers_key
from model.wan.lora_files import lora_to_diffusers, lora_to_peft
from model.wan.weights import LazyWeights
from tests.nets import MICRO, random_net, with_loras
from trainer.weight_sources import open_init
from utils.errors import ConfigError

ALPHA, SCALE = 6.0, 0.7
TARGETS = ["blocks.0.self_attn.q", "blocks.1.cross_attn.o", "blocks.1.ffn.0", "patch_embedding", "head.head"]
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("base") / "x.safetensors"
    save_file({key: value.detach() for key, value in random_net(1).state_dict().items()}, file)
    return file


def adapter(rank: int = 3) -> State:
    """Native names, native shapes, factors of every target."""
    out, net = {}, random_net(1)
    generator = torch.Generator().manual_seed(5)
    for name in TARGETS:
        weight = net.get_submodule(name).weight
        tail = (1,) * (weight.ndim - 2)
        out[f"{name}.lora_A.weight"] = torch.randn(rank, *weight.shape[1:], generator=generator)
        out[f"{name}.lora_B.weight"] = torch.randn(weight.shape[0], rank, *tail, generator=generator)
    return out


def expected(state: State, factor: float) -> State:
    """W + factor * up @ down, by hand in fp64."""
    out = dict(random_net(1).state_dict())
    for name in TARGETS:
        up, down = (state[f"{name}.lora_{letter}.weight"].double() for letter in "BA")
        change = torch.einsum("or,ri->oi", up.flatten(1), down.flatten(1)).view(out[f"{name}.weight"].shape)
        out[f"{name}.weight"] = (out[f"{name}.weight"].double() + factor * change).float()
    return out


def renamed(state: State, style: str) -> State:
    """The same adapter as another trainer names it."""
    out = {}
    for key, value in state.items():
        name, letter = key[: -len(".lora_A.weight")], key[-len("A.weight")]
        theirs = to_diffusers_key(name)
        half = {"A": "down", "B": "up"}[letter]
        out[
            {
                "native": f"diffusion_model.{name}.lora_{letter}.weight",
                "peft": f"base_model.model.{theirs}.lora_{letter}.default.weight",
                "diffusers": f"transformer.{theirs}.lora_{letter}.weight",
                "old diffusers": f"transformer.{theirs}.lora.{half}.weight",
                "kohya": f"lora_unet_{name.replace('.', '_')}.lora_{half}.weight",
                "down up": f"{name}.lora_{half}.weight",
                "kohya, two underscores": f"lora_unet__{name.replace('.', '_')}.lora_{half}.weight",
                "kohya, with dots": f"lora_unet_{name.replace('.', '_', 1)}.lora_{half}.weight",
                "diffsynth": f"pipe.dit.{name}.lora_{letter}.default.weight",
                "lora_transformer": f"lora_transformer_{theirs.replace('.', '_')}.lora_{half}.weight",
            }[style]
        ] = value
        if style in ("kohya", "down up"):
            out[f"lora_unet_{name.replace('.', '_')}.alpha" if style == "kohya" else f"{name}.alpha"] = torch.tensor(
                ALPHA
            )
    return out


STYLES = ["native", "peft", "diffusers", "old diffusers", "kohya", "down up"]
STYLES += ["kohya, two underscores", "kohya, with dots", "diffsynth", "lora_transformer"]


@pytest.mark.parametrize("style", STYLES)
def test_any_trainers_names_are_the_same_change(base: Path, tmp_path: Path, style: str) -> None:
    state = adapter()
    save_file(renamed(state, style), tmp_path / "lora.safetensors")
    merged = with_loras(LazyWeights(base), [(tmp_path / "lora.safetensors", SCALE)])
    want = expected(state, SCALE * (ALPHA / 3 if style in ("kohya", "down up") else 1.0))
    plain = dict(random_net(1).state_dict())
    found = dict(merged.read(want))
    for name, value in found.items():
        torch.testing.assert_close(value, want[name], rtol=1e-5, atol=1e-5)
        assert torch.equal(value, plain[name]) == (name.removesuffix(".weight") not in TARGETS), name


@pytest.mark.parametrize("rslora", [False, True])
def test_a_peft_folder_says_its_alpha(base: Path, tmp_path: Path, rslora: bool) -> None:
    state = dict(adapter().items())
    weights, config = lora_to_peft(state, ALPHA)
    save_file(weights, tmp_path / "adapter_model.safetensors")
    config |= {"use_rslora": rslora, "alpha_pattern": {"attn1.to_q": 9.0}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    root = 3**0.5 if rslora else 3
    merged = dict(with_loras(LazyWeights(base), [(tmp_path, 1.0)]).read(expected(state, 1)))
    for name, alpha in (("blocks.0.self_attn.q.weight", 9.0), ("head.head.weight", ALPHA)):
        torch.testing.assert_close(merged[name], expected(state, alpha / root)[name], rtol=1e-5, atol=1e-5)


def test_ours_come_back_from_both_names(base: Path, tmp_path: Path) -> None:
    state = adapter(4)
    save_file(lora_to_diffusers(state, 2.0), tmp_path / "pytorch_lora_weights.safetensors")  # alpha / rank = 1/2: exact
    peft = tmp_path / "peft"
    peft.mkdir()
    weights, config = lora_to_peft(state, 2.0)
    save_file(weights, peft / "adapter_model.safetensors")
    (peft / "adapter_config.json").write_text(json.dumps(config))
    want = expected(state, 0.5)
    for path in (tmp_path, peft):
        for name, value in with_loras(LazyWeights(base), [(path, 1.0)]).read(want):
            torch.testing.assert_close(value, want[name], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="blocks.0.self_attn.q lacks"):
        lora_to_diffusers({"blocks.0.self_attn.q.lora_A.weight": torch.zeros(1, 1)}, 1.0)
    with pytest.raises(ValueError, match="several ranks"):
        lora_to_peft(adapter(4) | {k: v for k, v in adapter(2).items() if k.startswith("head")}, 1.0)


def test_diffusers_reads_our_names_as_its_own() -> None:
    """Its converter of foreign files gives the names that we write."""
    converters = pytest.importorskip("diffusers.loaders.lora_conversion_utils")
    state = {key: value for key, value in adapter().items() if "patch" not in key}
    theirs = converters._convert_non_diffusers_wan_lora_to_diffusers(
        {f"diffusion_model.{k}": v for k, v in state.items()}
    )
    ours = lora_to_diffusers(state, 3.0)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_full_differences_biases_and_several_files_add_up(base: Path, tmp_path: Path) -> None:
    """As CausVid's and AccVideo's extracted LoRAs: `diff` of norms, `diff_b` of biases beside the factors."""
    state, plain = adapter(), dict(random_net(1).state_dict())
    extra = {
        "diffusion_model.blocks.0.norm3.diff": torch.randn(48), "diffusion_model.blocks.0.self_attn.q.diff_b": torch.randn(48),
    }  # fmt: skip
    save_file(renamed(state, "native") | extra, tmp_path / "a.safetensors")
    save_file({"head.head.diff_b": torch.ones(12)}, tmp_path / "b.safetensors")
    merged = with_loras(LazyWeights(base), [(tmp_path / "a.safetensors", 0.5), (tmp_path / "b.safetensors", 2.0)])
    found = dict(merged.read(plain))
    assert torch.allclose(found["blocks.0.norm3.weight"], plain["blocks.0.norm3.weight"] + 0.5 * extra["diffusion_model.blocks.0.norm3.diff"])  # fmt: skip
    assert torch.allclose(found["blocks.0.self_attn.q.bias"], plain["blocks.0.self_attn.q.bias"] + 0.5 * extra["diffusion_model.blocks.0.self_attn.q.diff_b"])  # fmt: skip
    assert torch.allclose(found["head.head.bias"], plain["head.head.bias"] + 2)


def test_the_sum_is_rounded_once_to_what_the_base_is_stored_in(tmp_path: Path) -> None:
    plain = {key: value.detach().bfloat16() for key, value in random_net(1).state_dict().items()}
    save_file(plain, tmp_path / "base.safetensors")
    state = adapter()
    save_file(state, tmp_path / "lora.safetensors")
    merged = with_loras(LazyWeights(tmp_path / "base.safetensors"), [(tmp_path / "lora.safetensors", 1.0)])
    ((_, value),) = merged.read(["blocks.1.ffn.0.weight"])
    up, down = (state[f"blocks.1.ffn.0.lora_{letter}.weight"] for letter in "BA")
    assert torch.equal(value, (plain["blocks.1.ffn.0.weight"].float() + up @ down).bfloat16())


@pytest.mark.parametrize("name", ["blocks.0.diff_m", "blocks.0.modulation.diff"])
def test_a_difference_of_a_modulation_is_added(base: Path, tmp_path: Path, name: str) -> None:
    plain = dict(random_net(1).state_dict())
    change = torch.randn(plain["blocks.0.modulation"].shape)
    head = torch.randn(plain["head.modulation"].shape)
    state = {f"diffusion_model.{name}": change, "diffusion_model.head.diff_m": head}
    save_file(state, tmp_path / "lora.safetensors")
    found = dict(with_loras(LazyWeights(base), [(tmp_path / "lora.safetensors", SCALE)]).read(plain))
    torch.testing.assert_close(found.pop("blocks.0.modulation"), plain["blocks.0.modulation"] + SCALE * change)
    torch.testing.assert_close(found.pop("head.modulation"), plain["head.modulation"] + SCALE * head)
    assert all(torch.equal(value, plain[key]) for key, value in found.items())


def test_changes_of_image_networks_are_left_out_with_one_warning(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    patch = random_net(1).patch_embedding.weight
    more = {
        "blocks.0.cross_attn.k_img.lora_A.weight": torch.ones(3, 48),
        "blocks.0.cross_attn.k_img.lora_B.weight": torch.ones(48, 3),
        "blocks.1.cross_attn.norm_k_img.diff": torch.ones(48),
        "img_emb.proj.1.diff_b": torch.ones(48),
        "patch_embedding.diff": torch.ones(patch.shape[0], 2 * patch.shape[1], *patch.shape[2:]),
    }
    state = {key: value for key, value in adapter().items() if "patch" not in key}
    for name, tensors in {"plain": state, "image": state | more}.items():
        save_file({f"diffusion_model.{key}": value for key, value in tensors.items()}, tmp_path / f"{name}.safetensors")
    plain, image = (
        dict(with_loras(LazyWeights(base), [(tmp_path / f"{name}.safetensors", 1.0)]).read(random_net(1).state_dict()))
        for name in ("plain", "image")
    )
    assert all(torch.equal(value, plain[key]) for key, value in image.items())
    [line] = caplog.messages
    assert "image.safetensors: 4 of 8 changes are left out" in line


def test_two_experts_in_one_file_are_told_apart(base: Path, tmp_path: Path) -> None:
    state = renamed(adapter(), "diffusers")
    low = {key.replace("transformer.", "transformer_2."): 2 * value for key, value in state.items()}
    save_file(state | low, tmp_path / "lora.safetensors")
    for expert, factor in (("high", 1.0), ("low", 4.0)):
        want = expected(adapter(), factor)
        for name, value in with_loras(LazyWeights(base), [(tmp_path / "lora.safetensors", 1.0)], expert).read(want):
            torch.testing.assert_close(value, want[name], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="changes for two experts"):
        with_loras(LazyWeights(base), [(tmp_path / "lora.safetensors", 1.0)])
    save_file(low, tmp_path / "low.safetensors")
    with pytest.raises(ValueError, match="the LoRA is the low-noise expert's"):
        with_loras(LazyWeights(base), [(tmp_path / "low.safetensors", 1.0)], "high")


def as_longlive(file: Path, roles: dict[str, int]) -> State:
    """A file as LongLive's trainer saves it, by PEFT's own functions: adapters of blocks' linear layers, by role and
    seed. Returns the generator's merged weights, by PEFT, too."""
    peft = pytest.importorskip("peft")
    saved: dict[str, object] = {"step": 3000}
    merged: State = {}
    for role, seed in roles.items():
        net = random_net(1)
        layers = [name for name, module in net.named_modules() if isinstance(module, torch.nn.Linear)]
        targets = [name for name in layers if name.startswith("blocks.")]
        wrapped = peft.get_peft_model(net, peft.LoraConfig(r=3, lora_alpha=3, target_modules=targets))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, p in wrapped.named_parameters():
                if "lora_" in name:
                    p.copy_(torch.randn(p.shape, generator=generator))
        saved[role] = {key: value.clone() for key, value in peft.get_peft_model_state_dict(wrapped).items()}
        if role == "generator_lora":
            merged = dict(wrapped.merge_and_unload().state_dict())
    torch.save(saved, file)
    return merged


def test_of_longlives_two_adapters_the_generators_is_taken(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Such a file says no alpha. Its recipe's is as large as the rank, as ours is where nothing is said."""
    file = tmp_path / "lora.pt"
    expected = as_longlive(file, {"generator_lora": 5, "critic_lora": 6})
    for name, value in with_loras(LazyWeights(base), [(file, 1.0)]).read(expected):
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5)
    [line] = caplog.messages
    assert line == f"{file} holds two adapters: the generator's is taken, and critic_lora is left out"
    with pytest.raises(ValueError, match="this is a LoRA: give the base weights here"):
        LazyWeights(file)
    as_longlive(file, {"critic_lora": 6})
    with pytest.raises(ValueError, match="the file has no generator_lora: it has step, critic_lora"):
        with_loras(LazyWeights(base), [(file, 1.0)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks.9.ffn.0.lora_A.weight": torch.zeros(3, 48), "blocks.9.ffn.0.lora_B.weight": torch.zeros(64, 3)}, "blocks.9.ffn.0.weight \\[64, 48\\] instead of none"),
        ({"head.head.lora_A.weight": torch.zeros(3, 7)}, "head.head.weight \\[12, 7\\] instead of \\[12, 48\\]"),
        ({"head.head.lora_A.weight": torch.zeros(2, 48)}, "head.head has ranks 2 and 3"),
        ({"blocks.0.ffn.2.lora_A.weight": torch.zeros(3, 64)}, "blocks.0.ffn.2 has no up matrix: the file is not whole"),
        ({"head.head.dora_scale": torch.zeros(1)}, "it is a DoRA \\(head.head.dora_scale\\), which is not read: merge it"),
        ({"head.head.lokr_w1": torch.zeros(1)}, "it is a LoKr"),
        ({"head.head.hada_w1_a": torch.zeros(1)}, "it is a LoHa"),
        ({"head.head.something": torch.zeros(1)}, "1 names are not a LoRA's"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line(base: Path, tmp_path: Path, change: State, message: str) -> None:
    save_file(adapter() | change, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match=message) as error:
        with_loras(LazyWeights(base), [(tmp_path / "lora.safetensors", 1.0)])
    assert "\n" not in str(error.value)
    assert "lora.safetensors" in str(error.value)


def test_a_network_starts_from_base_and_lora(base: Path, tmp_path: Path) -> None:
    save_file(adapter(), tmp_path / "lora.safetensors")
    net = random_net(2)
    config = NetworkConfig(init=str(base), loras=[LoraWeights(str(tmp_path / "lora.safetensors"), SCALE)])
    weights = open_init(net, config, "student")
    want = expected(adapter(), SCALE)
    for name, value in weights.read(want):
        torch.testing.assert_close(value, want[name], rtol=1e-5, atol=1e-5)
    other = random_net(2, replace(MICRO, num_layers=1))
    with pytest.raises(ConfigError, match="student.init: .*do not fit this geometry"):
        open_init(other, config, "student")
