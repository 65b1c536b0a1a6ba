"""Weights from every format and place, made here by the libraries that make them; what does not fit is one line."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from model.export import Dtype, Format
from model.wan.config import PRESETS, WanConfig
from model.wan.formats import to_diffusers_key, to_native_key
from model.wan.geometry import describe, diffusers_config, fields_of_shapes, native_config, read_config
from model.wan.save import fp8_scale, save_model, save_weights
from model.wan.sources import located
from model.wan.transformer import WanTransformer
from model.wan.weights import LazyWeights, fit, geometry_of, load_weights, shapes_of
from tests.nets import random_net

CONFIG = WanConfig(
    dim=48, ffn_dim=64, num_heads=2, num_layers=2, in_dim=3, out_dim=3, text_dim=12, text_len=512, freq_dim=16
)
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    return {key: value.detach() for key, value in random_net(1, CONFIG).state_dict().items()}


class Held:
    """Weights in memory."""

    def __init__(self, state: State) -> None:
        self.state, self.shapes, self.config = state, shapes_of(state), None

    def read(self, names):  # type: ignore[no-untyped-def]
        return ((name, self.state[name]) for name in names)


def same(weights: LazyWeights, state: State) -> bool:
    """All names, and every value bit for bit."""
    return weights.shapes == shapes_of(state) and all(torch.equal(v, state[n]) for n, v in weights.read(state))


def diffusers_folder(path: Path, state: State) -> Path:
    """As the library itself saves it."""
    diffusers = pytest.importorskip("diffusers")
    net = diffusers.WanTransformer3DModel.from_config(diffusers_config(CONFIG))
    net.load_state_dict({to_diffusers_key(key): value for key, value in state.items()})
    net.save_pretrained(path)
    return path


# ------------------------------------------------------------------------------------------------------------- formats


@pytest.mark.parametrize("preset", PRESETS)
def test_every_key_shape_and_config_is_diffusers(preset: str, tmp_path: Path) -> None:
    """Full geometry, on meta: the network that Diffusers builds from our config.json has our parameters."""
    diffusers = pytest.importorskip("diffusers")
    config = PRESETS[preset]
    with torch.device("meta"):
        ours = shapes_of(WanTransformer(config).state_dict())
        theirs = shapes_of(diffusers.WanTransformer3DModel.from_config(diffusers_config(config)).state_dict())
    assert {to_diffusers_key(key): shape for key, shape in ours.items()} == theirs
    assert {to_native_key(key): shape for key, shape in theirs.items()} == ours
    for number, values in enumerate((diffusers_config(config), native_config(config))):
        file = tmp_path / f"{number}.json"
        file.write_text(json.dumps(values))
        fields = read_config(file)
        assert fields is not None
        assert preset in describe(fields | fields_of_shapes(ours)).split()[1::2]


def test_image_to_video_parameters_have_both_names() -> None:
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        net = diffusers.WanTransformer3DModel.from_config(
            diffusers_config(CONFIG) | {"image_dim": 20, "added_kv_proj_dim": 48, "pos_embed_seq_len": 6}
        )
    plain = {to_diffusers_key(key) for key in random_net(1, CONFIG).state_dict()}
    added = {to_native_key(key): key for key in net.state_dict() if key not in plain}
    layers = [f"img_emb.proj.{i}" for i in (0, 1, 3, 4)]
    layers += [f"blocks.{b}.cross_attn.{name}" for b in (0, 1) for name in ("k_img", "v_img")]
    norms = {f"blocks.{b}.cross_attn.norm_k_img.weight" for b in (0, 1)}
    assert added.keys() == {f"{n}.{leaf}" for n in layers for leaf in ("weight", "bias")} | norms | {"img_emb.emb_pos"}
    assert all(to_diffusers_key(native) == key for native, key in added.items())
    shapes = {to_native_key(key): tuple(value.shape) for key, value in net.state_dict().items()}
    assert fields_of_shapes(shapes)["image_dim"] == 20


def test_diffusers_folders_pipelines_and_experts(state: State, tmp_path: Path) -> None:
    pipeline = tmp_path / "pipeline"
    diffusers_folder(pipeline / "transformer", state)
    (pipeline / "vae").mkdir()
    for path in (pipeline, pipeline / "transformer"):
        assert same(LazyWeights(path), state)
        assert geometry_of(path) == CONFIG
    with pytest.raises(ValueError, match="has one network, no transformer_2 or low_noise_model"):
        LazyWeights(pipeline, expert="low")
    low = {key: value + 1 for key, value in state.items()}
    diffusers_folder(pipeline / "transformer_2", low)
    assert same(LazyWeights(pipeline, expert="high"), state)
    assert same(LazyWeights(pipeline, expert="low"), low)
    assert same(LazyWeights(pipeline / "transformer_2"), low)
    with pytest.raises(
        ValueError, match=r"two experts: give \S+/transformer \(high noise\) or \S+/transformer_2 \(low"
    ):
        LazyWeights(pipeline)
    for name, value in (("high_noise_model", state), ("low_noise_model", low)):
        save_model(tmp_path / "native" / name, Held(value), CONFIG, Format.NATIVE, Dtype.fp32)
    assert same(LazyWeights(tmp_path / "native", expert="low"), low)


def test_a_native_folder_with_its_other_models_beside(state: State, tmp_path: Path) -> None:
    for other in ("models_t5_umt5-xxl-enc-bf16.pth", "Wan2.1_VAE.pth"):
        (tmp_path / other).write_bytes(b"not to be opened")
    torch.save(state, tmp_path / "model.pth")
    (tmp_path / "config.json").write_text(json.dumps(native_config(CONFIG)))
    assert same(LazyWeights(tmp_path), state)
    assert geometry_of(tmp_path) == CONFIG


@pytest.mark.parametrize("wrapper", ["", "model.", "module.model.", "model._fsdp_wrapped_module."])
def test_self_forcing_and_causvid_checkpoints(state: State, tmp_path: Path, wrapper: str) -> None:
    """`generator` with wrappers' names, its average, and the critic, in one file of torch.save."""

    def wrapped(shift: float) -> State:
        renamed = {k.replace("blocks.0.", "blocks.0._checkpoint_wrapped_module."): v + shift for k, v in state.items()}
        return {wrapper + key: value for key, value in renamed.items()}

    file = tmp_path / "model.pt"
    torch.save({"generator": wrapped(0), "generator_ema": wrapped(1), "critic": wrapped(2), "step": 7}, file)
    for which, shift in (("raw", 0), ("ema", 1), ("critic", 2)):
        assert same(LazyWeights(file, which), {key: value + shift for key, value in state.items()})
    torch.save({"generator": wrapped(0)}, file)
    assert same(LazyWeights(file), state)  # the average where there is one
    with pytest.raises(ValueError, match=r"model\.pt: the file has no critic: it has generator$"):
        LazyWeights(file, "critic")


class Payload:
    """What a pickle could run."""

    def __reduce__(self):  # type: ignore[no-untyped-def]
        return (Path.touch, (Path("it_ran"),))


def test_a_pickle_with_code_is_refused_and_not_run(
    state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"generator": state, "args": Payload()}, "bad.pt")
    with pytest.raises(ValueError, match=r"bad\.pt: bad\.pt is damaged, or holds objects besides tensors"):
        LazyWeights("bad.pt")
    assert not Path("it_ran").exists()
    torch.save(state, "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="cannot be mapped"):
        LazyWeights("old.pt")
    torch.save({"generator": [1, 2]}, "odd.pt")
    with pytest.raises(ValueError, match="no state_dict of tensors"):
        LazyWeights("odd.pt")


def test_gates_of_sparse_attention_are_left_out_with_one_warning(state: State, tmp_path: Path) -> None:
    """FastWan's folders: Diffusers' names and a gate in each block."""
    gates = {f"blocks.{b}.to_gate_compress.{leaf}": torch.zeros(48) for b in (0, 1) for leaf in ("weight", "bias")}
    save_file({to_diffusers_key(key): value for key, value in state.items()} | gates, tmp_path / "x.safetensors")
    weights = LazyWeights(tmp_path)
    gate = "blocks.1.self_attn.to_gate_compress.bias"
    assert weights.shapes[gate] == (48,)
    assert to_diffusers_key(gate) in gates
    with pytest.warns(UserWarning, match=r"4 gate tensors of sparse attention \(to_gate_compress\)") as caught:
        fit(weights, shapes_of(state), CONFIG)
    assert len(caught) == 1
    assert same(weights, state)
    sparse = LazyWeights(tmp_path)
    with warnings.catch_warnings():  # a network that has the gates gets them
        warnings.simplefilter("error")
        fit(sparse, shapes_of(state) | {to_native_key(key): (48,) for key in gates}, CONFIG)


def test_the_task_is_read_where_each_format_says_it(tmp_path: Path) -> None:
    """Wan names it; Diffusers shows it in the channels, and for TI2V in the pipeline's file."""
    values, part = diffusers_config(CONFIG), tmp_path / "transformer"
    part.mkdir()
    for changes, pipeline, expected in (
        ({}, {}, "t2v"), ({"in_channels": 9}, {}, "i2v"), ({}, {"expand_timesteps": True}, "ti2v"),
    ):  # fmt: skip
        (part / "config.json").write_text(json.dumps(values | changes))
        (tmp_path / "model_index.json").write_text(json.dumps(pipeline))
        fields = read_config(part / "config.json")
        assert fields is not None
        assert fields["model_type"] == expected
    (part / "config.json").write_text(json.dumps(native_config(CONFIG) | {"model_type": "ti2v"}))
    assert (read_config(part / "config.json") or {})["model_type"] == "ti2v"
    (part / "config.json").write_text(json.dumps({"z_dim": 16}))
    assert read_config(part / "config.json") is None  # a VAE's


# ------------------------------------------------------------------------------------------------------------- refusals


def test_a_wrong_preset_is_told_the_right_one() -> None:
    with torch.device("meta"):
        shapes = {name: shapes_of(WanTransformer(PRESETS[name]).state_dict()) for name in ("1.3b", "14b")}

    stored = Held({})
    stored.shapes = shapes["14b"]
    with pytest.raises(ValueError, match=r"choose the geometry that they were made for \(preset 14b") as error:
        fit(stored, shapes["1.3b"], PRESETS["1.3b"])
    assert "\n" not in str(error.value)


def test_heads_that_shapes_do_not_show_are_compared_with_the_config(state: State, tmp_path: Path) -> None:
    weights = LazyWeights(diffusers_folder(tmp_path, state))
    fit(weights, shapes_of(state), CONFIG)
    other = WanConfig(**{**vars(CONFIG), "num_heads": 4, "eps": 1e-5})
    with pytest.raises(ValueError, match="config.json says .*num_heads 2 instead of 4"):
        fit(weights, shapes_of(state), other)


def test_missing_tensors_are_not_a_matter_of_geometry(state: State, tmp_path: Path) -> None:
    part = {key: value for key, value in state.items() if key != "head.head.bias"}
    save_file(part, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"1 missing \(head\.head\.bias\): they are incomplete, or of another kind"):
        load_weights(random_net(2, CONFIG), tmp_path / "x.safetensors")


def test_mixed_shards_are_refused(state: State, tmp_path: Path) -> None:
    first, other = tmp_path / "a", tmp_path / "b"
    size = sum(value.nbytes for value in state.values())
    for folder, parts in ((first, 2), (other, 3)):
        folder.mkdir()
        save_weights(folder, Held(state), Format.NATIVE, Dtype.fp32, size * 2 // (2 * parts - 1))
    assert same(LazyWeights(first), state)
    assert len(list(first.glob("*.safetensors"))) == 2
    stray = next(other.glob("*-of-00003.safetensors"))
    (first / stray.name).write_bytes(stray.read_bytes())
    with pytest.raises(ValueError, match="also holds .*-of-00003.safetensors, .* shards of two models are mixed"):
        LazyWeights(first)
    (first / stray.name).unlink()
    first_shard, second_shard = sorted(first.glob("*.safetensors"))
    second_shard.write_bytes(first_shard.read_bytes())
    with pytest.raises(ValueError, match="does not hold what .*index.json says"):
        LazyWeights(first)


def test_what_is_no_wan_dit_is_one_line(state: State, tmp_path: Path) -> None:
    save_file({"encoder.0.weight": torch.zeros(2)}, tmp_path / "vae.safetensors")
    save_file({"blocks.0.self_attn.q.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "lora.safetensors")
    cases = [("vae.safetensors", "no Wan DiT"), ("lora.safetensors", "this is a LoRA"), ("nothing", "no weights at")]
    for name, message in cases:
        with pytest.raises(ValueError, match=message) as error:
            LazyWeights(tmp_path / name)
        assert "\n" not in str(error.value)
        assert name in str(error.value)
    with pytest.raises(ValueError, match=r"lora.safetensor': it does not exist \(did you mean '.*/lora.safetensors'"):
        LazyWeights(tmp_path / "lora.safetensor")
    with pytest.raises(ValueError, match=r"it does not exist \('.*' holds lora.safetensors, vae.safetensors\)"):
        LazyWeights(tmp_path / "logs" / "ode_init")
    with pytest.raises(ValueError, match="expert 'middle' is unknown"):
        LazyWeights(tmp_path, expert="middle")


# ----------------------------------------------------------------------------------------------------------------- hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[list[str]]]:
    """A cache that holds owner/name as huggingface_hub lays it out, no network; the patterns asked for, by repository."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    asked: dict[str, list[list[str]]] = {}
    download = huggingface_hub.snapshot_download

    def offline(repo: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.setdefault(repo, []).append(allow_patterns)
        return download(
            repo, revision=revision, allow_patterns=allow_patterns, cache_dir=tmp_path / "hub", local_files_only=True
        )

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    return asked


def cached(tmp_path: Path, repo: str, commit: str = "0" * 40) -> Path:
    folder = tmp_path / "hub" / f"models--{repo.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    return folder / "snapshots" / commit


def test_hub_repositories_and_paths_within_them(state: State, tmp_path: Path, hub: dict[str, list[list[str]]]) -> None:
    wan = cached(tmp_path, "owner/Wan-Diffusers")
    diffusers_folder(wan / "transformer", state)
    assert same(LazyWeights("owner/Wan-Diffusers"), state)
    assert hub["owner/Wan-Diffusers"] == [["*config.json", "model_index.json"], ["transformer/*"]]
    forcing = cached(tmp_path, "owner/forcing")
    (forcing / "checkpoints").mkdir(parents=True)
    torch.save({"generator_ema": state}, forcing / "checkpoints" / "x.pt")
    for path in ("owner/forcing/checkpoints/x.pt", Path("owner/forcing@main/checkpoints/x.pt")):
        assert same(LazyWeights(path), state)
    native = cached(tmp_path, "owner/native")
    save_model(native, Held(state), CONFIG, Format.NATIVE, Dtype.fp32)
    assert same(LazyWeights("owner/native"), state)
    assert hub["owner/native"][1] == ["config.json", "diffusion_pytorch_model*"]


def test_a_hub_name_that_cannot_be_had_is_one_line(
    tmp_path: Path, hub: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    (tmp_path / "hub").mkdir()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(ValueError, match="'owner/none' is no local path, and cannot be had from the Hub") as error:
        LazyWeights("owner/none")
    assert "\n" not in str(error.value)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        ValueError, match="HF_HUB_OFFLINE is set and the cache lacks it: .*hf download owner/none"
    ) as error:
        LazyWeights("owner/none/x.pt")
    assert "\n" not in str(error.value)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "logs").mkdir()
    assert located("logs/typo") == Path("logs/typo")  # not a repository: the folder is here


# ------------------------------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize("dtype", [Dtype.fp32, Dtype.bf16])
def test_round_trips_are_bit_exact(state: State, tmp_path: Path, dtype: Dtype) -> None:
    """native -> ours -> Diffusers -> ours -> native, in shards and in one file."""
    if dtype is Dtype.bf16:
        state = {key: value.bfloat16() for key, value in state.items()}
    torch.save(state, tmp_path / "native.pth")
    first = LazyWeights(tmp_path / "native.pth")
    save_model(tmp_path / "diffusers", first, CONFIG, Format.DIFFUSERS, dtype, shard_bytes=40_000)
    assert len(list((tmp_path / "diffusers").glob("*.safetensors"))) > 1
    second = LazyWeights(tmp_path / "diffusers")
    assert same(second, state)
    assert second.geometry() == CONFIG
    save_model(tmp_path / "native", second, CONFIG, Format.NATIVE, dtype)
    third = LazyWeights(tmp_path / "native")
    assert same(third, state)
    assert third.geometry() == CONFIG
    assert all(value.dtype is state[name].dtype for name, value in third.read(state))


def test_fp8_is_of_the_blocks_matrices_with_a_scale_of_a_power_of_two(state: State, tmp_path: Path) -> None:
    state = {key: value.bfloat16() * 0.01 for key, value in state.items()}
    save_weights(tmp_path, Held(state), Format.NATIVE, Dtype.fp8)
    from safetensors.torch import load_file

    stored = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    big = {n for n in state if n.startswith("blocks.") and state[n].ndim == 2}
    assert {n for n, v in stored.items() if v.dtype is torch.float8_e4m3fn} == big | {"scaled_fp8"}
    assert stored.keys() - state.keys() == {n.replace(".weight", ".scale_weight") for n in big} | {"scaled_fp8"}
    assert all(torch.equal(stored[n], state[n]) for n in state.keys() - big)
    for name, value in LazyWeights(tmp_path).read(state):
        assert torch.equal(value, value.bfloat16().float())  # the scale rounds nothing
        error = float((value - state[name].float()).abs().max() / state[name].float().abs().max())
        assert error <= (2**-4 if name in big else 0), name
        if name in big:  # a plain cast would lose far more
            plain = state[name].to(torch.float8_e4m3fn).float() - state[name].float()
            assert (value - state[name].float()).norm() < 0.5 * plain.norm()
    assert [float(fp8_scale(torch.tensor([x]))) for x in (448.0, 449.0, 0.0, 3.5)] == [1, 2, 1, 2**-7]


def test_values_that_fp8_cannot_hold_are_refused(state: State, tmp_path: Path) -> None:
    state = dict(state)
    state["blocks.0.ffn.0.weight"] = torch.full_like(state["blocks.0.ffn.0.weight"], 500.0)
    with pytest.raises(ValueError, match="blocks.0.ffn.0.weight has values beyond fp8's 448"):
        save_weights(tmp_path, Held(state), Format.DIFFUSERS, Dtype.fp8)
    save_weights(tmp_path, Held(state), Format.NATIVE, Dtype.fp8)
    state["blocks.0.ffn.0.weight"][0, 0] = float("nan")
    with pytest.raises(ValueError, match="export it in bf16"):
        save_weights(tmp_path, Held(state), Format.NATIVE, Dtype.fp8)
