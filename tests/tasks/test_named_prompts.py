"""A family whose prompts become two tensors: preprocessing, cache, task and training carry both by their names."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from configs.schema import RunConfig
from generation.preprocess_text import preprocess_text
from model import family
from model.attention.backends import Backend
from model.attention.checkpointing import Checkpointing
from model.attention.sparse import SparseConfig
from model.codec import Codecs, PixelCodecs
from model.family import FirstFrame, Network, PlainFamily, replaced
from model.folders import fingerprint
from model.path import Flow
from model.text_encoder import TextConfig
from model.types import Prompt
from tasks.build import build_task
from tasks.kinds.encoded import EncodedTask
from tasks.text_cache import Shard, Source, TextCache, check_shapes, digest, write_shard
from tests.small import DISTILLATION, NETWORKS, config, merged, trainer
from utils.config import to_yaml
from utils.errors import ConfigError, UserError

CPU = torch.device("cpu")
PROMPTS = ["cats", "a mat", "more than six"]
SHAPES = {"text": (6, 8), "pooled": (5,)}


@dataclass(frozen=True)
class PairConfig:
    """pooled: width of the tensor without tokens."""

    pooled: int = 5
    dim: int = 8
    num_layers: int = 1
    num_heads: int = 1
    in_dim: int = 3
    out_dim: int = 3
    patch_size: tuple[int, int, int] = (1, 1, 1)
    image_dim: int | None = None
    first_frame: FirstFrame = FirstFrame.none
    model_type: str = "text-to-video"

    def tokens_per_frame(self, height: int, width: int) -> int:
        return height * width


class PairNetwork(Network):
    """(x, time, text [B, 6, 8], pooled [B, 5]) to a velocity."""

    def __init__(self, config: PairConfig) -> None:
        super().__init__()
        self.config = config
        self.words = nn.Linear(8 + config.pooled, config.out_dim)
        self.head = nn.Linear(config.in_dim, config.out_dim)

    def fsdp_units(self) -> list[nn.Module]:
        return [self.words]

    def forward(self, x: Tensor, time: Tensor, text: Tensor, pooled: Tensor) -> Tensor:
        said = self.words(torch.cat([text.mean(dim=1), pooled], dim=1))
        return (self.head(x.movedim(2, -1)) + said[:, None, None, None]).movedim(-1, 2)


class PairEncoder:
    """Bytes as tokens, in a table for both tensors."""

    what = "a pair of encoders"
    parts = ("one", "two")

    def __init__(self, config: TextConfig, pooled: int) -> None:
        self.config, self.pooled = config, pooled
        self.table: Tensor | None = None

    def identity(self) -> list[Any]:
        return [fingerprint(str(self.config.encoder)), self.pooled]

    def made_with(self) -> dict[str, str | int | None]:
        return {"encoder": self.config.encoder, "pooled": self.pooled}

    def weight_folders(self) -> list[Path]:
        return [Path(str(self.config.encoder))]

    def load(self) -> None:
        self.table = load_file(self.weight_folders()[0] / "table.safetensors")["table"]

    def encode(self, prompts: Sequence[str]) -> Prompt:
        self.load()
        assert self.table is not None
        text, pooled = torch.zeros(len(prompts), 6, 8), torch.zeros(len(prompts), self.pooled)
        for row, prompt in enumerate(prompts):
            tokens = self.table[list(f"{prompt}\0".encode()[:6])]
            text[row, : len(tokens)], pooled[row] = tokens[:, :8], tokens[0, 8 : 8 + self.pooled]
        return {"text": text, "pooled": pooled}


class PairFamily(PlainFamily):
    presets: Mapping[str, PairConfig] = {"pair": PairConfig()}
    telling: tuple[str, ...] = ("words.bias",)
    head = "head.weight"
    shared: tuple[str, ...] = ("in_dim", "out_dim", "pooled")
    codecs: Codecs = PixelCodecs(mean=(0.5, 0.5, 0.5), scale=(2.0, 2.0, 2.0))

    def geometry(self, preset: str, overrides: Mapping[str, Any]) -> PairConfig:
        return replaced(self.presets[preset], overrides)

    def path(self, geometry: Any) -> Flow:
        return Flow()

    def prompt_shapes(self, geometry: Any) -> dict[str, tuple[int, ...]]:
        return {"text": (6, 8), "pooled": (geometry.pooled,)}

    def text_encoder(self, config: TextConfig, geometry: Any, device: torch.device) -> PairEncoder:
        return PairEncoder(config, geometry.pooled)

    def network(
        self, geometry: Any, backend: Backend, checkpointing: Checkpointing, sparse: SparseConfig | None
    ) -> PairNetwork:
        return PairNetwork(geometry)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An encoder, prompts, and the finished cache of both."""
    root = tmp_path_factory.mktemp("pair")
    (root / "encoder").mkdir()
    table = torch.randn(256, 16, generator=torch.Generator().manual_seed(0))
    save_file({"table": table}, root / "encoder/table.safetensors")
    (root / "prompts.txt").write_text("\n".join(PROMPTS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(family._REGISTERED, "pair", PairFamily())
        (root / "run.yaml").write_text(to_yaml(run(root, "encoder")))
        argv = ["--config_path", str(root / "run.yaml"), "--prompts", str(root / "prompts.txt"), "--out"]
        for more in (["--shard", "0/2"], ["--shard", "1/2"], ["--check"]):
            assert preprocess_text([*argv, str(root / "cache"), *more]) == 0
        yield root


def base(root: Path, *sources: str) -> dict[str, Any]:
    data = {
        **{"kind": "wan", "wan": {"frames": 2, "height": 4, "width": 4}, "real": False},
        **{"prompts": str(root / "prompts.txt"), "text": {source: str(root / source) for source in sources}},
    }
    networks: dict[str, Any] = {name: {"preset": "pair"} for name in NETWORKS}
    return merged({**DISTILLATION, **networks}, {"data": data, "rollout": {"kind": "backward_simulation"}})


def run(root: Path, *sources: str, **changes: Any) -> RunConfig:
    return config(base(root, *sources), **changes)


def same(first: Prompt, second: Prompt) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_the_cache_is_the_encoder_bit_for_bit_in_every_tensor(folder: Path) -> None:
    live, cached = (build_task(run(folder, source), CPU) for source in ("encoder", "cache"))
    prompts = [PROMPTS[2], *PROMPTS, ""]
    expected = live.conditioning(prompts).prompt
    check_shapes(expected, SHAPES)
    assert expected["text"].ne(0).any(dim=2).sum(dim=1).tolist() == [6, 5, 6, 6, 1]
    assert same(cached.conditioning(prompts).prompt, expected)
    assert same(cached.negative(2), {name: value[4:].expand(2, *value.shape[1:]) for name, value in expected.items()})
    build_task(run(folder, "cache", "encoder"), CPU)  # it knows its encoder
    held = [safe_open(folder / "cache" / Shard(i, 2).name, "pt") for i in range(2)]
    assert set(held[0].keys()) == {"digests", "text.tokens", "text.lengths", "pooled.values"}
    assert sum(file.get_slice("text.tokens").get_shape()[0] for file in held) == 5 + 6 + 6 + 1  # no zeros


def test_it_trains_from_the_cache(folder: Path, tmp_path: Path) -> None:
    made = trainer(tmp_path / "run", base(folder, "cache"), training={"max_steps": 1, "critic_warmup_steps": 0})
    weight = dict(made.networks["student"].net.named_parameters())["words.weight"]
    before = weight.detach().clone()
    made.train()
    changed = (weight != before).any(dim=0)
    assert changed[:8].any()
    assert changed[8:].any()


def test_a_cache_of_other_tensors_is_refused_in_one_line(folder: Path, tmp_path: Path) -> None:
    def refused(match: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
        with pytest.raises(UserError, match=match) as caught:
            TextCache(folder / "cache", shapes)
        assert "\n" not in str(caught.value)

    both = r"holds pooled \[5\], text \[6, 8\] of each prompt, the networks take "
    refused(rf"{both}text \[6, 8\]: make a cache with the encoder of these networks", {"text": (6, 8)})
    refused(rf"{both}pooled \[5\], text \[6, 8\], time_ids \[6\]", {**SHAPES, "time_ids": (6,)})
    refused(rf"{both}pooled \[5\], text \[48\]", {**SHAPES, "text": (48,)})
    refused(r"holds pooled \[5\], the networks take \[7\]", {**SHAPES, "pooled": (7,)})
    refused("holds text of up to 6 tokens x 8, the networks take 4 x 8", {**SHAPES, "text": (4, 8)})
    TextCache(folder / "cache", {**SHAPES, "text": (9, 8)})  # there is room
    one = Source(["cats"], "e", {"text": (6, 8)})
    write_shard(tmp_path, Shard(0, 1), one, lambda prompts: {"text": torch.ones(1, 6, 8)})
    build = run(folder, data={"text": {"cache": str(tmp_path)}})
    with pytest.raises(ConfigError, match=r"data: .* holds text of each prompt, the networks take pooled \[5\], text"):
        build_task(build, CPU)
    with pytest.raises(UserError, match="with another format"):
        write_shard(tmp_path, Shard(0, 1), Source(["cats"], "e", SHAPES), lambda prompts: {})


def test_an_encoder_of_other_tensors_is_refused(folder: Path, tmp_path: Path) -> None:
    def refused(match: str, encoded: Prompt) -> None:
        with pytest.raises(UserError, match=match) as caught:
            write_shard(tmp_path, Shard(0, 1), Source(["cats"], "e", SHAPES), lambda prompts: encoded)
        assert "\n" not in str(caught.value)

    text, pooled = torch.ones(1, 6, 8), torch.ones(1, 5)
    takes = r"the networks take pooled \[5\], text \[6, 8\]"
    refused(rf"the text encoder gives text \[6, 8\], {takes}", {"text": text})
    refused(rf"gives pooled \[4\], text \[6, 8\], {takes}", {"text": text, "pooled": pooled[:, :4]})
    refused("gives pooled in torch.bfloat16, and not in torch.float32", {"text": text, "pooled": pooled.bfloat16()})
    refused("prompt 'cats': the text encoder gives pooled that is not finite", {"text": text, "pooled": pooled / 0})
    task = build_task(run(folder, "encoder"), CPU)
    assert isinstance(task, EncodedTask)
    task.text.shapes = {"text": (6, 8)}
    with pytest.raises(UserError, match=r"encoder: the text encoder gives pooled \[5\], text \[6, 8\], the networks"):
        task.load_text_encoder()


def test_a_cache_from_before_there_were_names_is_read(tmp_path: Path) -> None:
    """A text alone: its files are those of format 2, written out here."""
    text = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    source = Source(["a", "b"], "e", {"text": (4, 3)})
    said = {"format": "2", "prompts": source.identity()["prompts"], "encoder": "e"}
    digests = torch.tensor([list(digest(prompt)) for prompt in source.prompts], dtype=torch.uint8)
    tensors = {"tokens": torch.cat([text[0], text[1, :2]]), "lengths": torch.tensor([4, 2]), "digests": digests}
    save_file(tensors, tmp_path / Shard(0, 1).name, said)
    manifest = {**said, "count": 2, "shards": {Shard(0, 1).name: {"first": 0, "prompts": 2, "tokens": 6}}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    text[1, 2:] = 0
    assert torch.equal(TextCache(tmp_path, source.shapes).encode(["a", "b"])["text"], text)
    new = tmp_path / "new"
    write_shard(new, Shard(0, 1), source, lambda prompts: {"text": text[["ab".index(p) for p in prompts]]})
    made = load_file(new / Shard(0, 1).name)
    assert made.keys() == tensors.keys()
    assert all(torch.equal(made[name], tensors[name]) for name in made)
    assert json.loads((new / "manifest.json").read_text()) == {**manifest, "made_with": {}}
    with safe_open(new / Shard(0, 1).name, "pt") as file:
        assert file.metadata() == said


def test_numbers_that_are_not_finite_are_not_read(tmp_path: Path) -> None:
    source = Source(["a"], "e", {"text": (4, 3)})
    write_shard(tmp_path, Shard(0, 1), source, lambda prompts: {"text": torch.ones(1, 4, 3)})
    path = tmp_path / Shard(0, 1).name
    save_file(load_file(path) | {"tokens": torch.full((4, 3), torch.inf)}, path, source.identity())
    with pytest.raises(ValueError, match="holds text that is not finite: delete it and make it again"):
        TextCache(tmp_path, source.shapes).encode(["a"])
