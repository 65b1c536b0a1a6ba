"""Latents, trajectories and prompts in each file format: round trips, FastVideo's raw latents, what is refused."""

from __future__ import annotations

import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from utils.data.lmdb_store import LMDBFolder
from utils.data.order import ShardedOrder
from utils.data.parquet import ParquetFolder, left_levels, write_parquet
from utils.data.prompts import load_prompts
from utils.data.safetensors_shards import SafetensorsFolder, write_latents, write_trajectories
from utils.data.stream import CorruptSample, Sample, Stream, stacked
from utils.data.tensors import Statistics, from_bytes, to_row

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

STATISTICS = Statistics((0.5, -1.0), (2.0, 4.0))
F, C, H, W = 3, 2, 4, 5


def make(count: int, first: int = 0, first_frame: bool = False) -> list[Sample]:
    """Samples whose every number says which sample, channel and frame it is of."""
    out = []
    for i in range(first, first + count):
        axes = torch.arange(F * C * H * W, dtype=torch.float32).view(F, C, H, W) / 64 + i
        first_latents = axes[:1] + 0.5 if first_frame else None
        clip = torch.full((2, 3), float(i)) if first_frame else None
        out.append(Sample(f"clip{i}", f"caption {i}", torch.full((i % 3 + 1, 6), i / 8), axes, first_latents, clip))
    return out


def same(a: Sample, b: Sample) -> None:
    assert a.caption == b.caption
    for field in ("text", "latents", "first_latents", "clip", "trajectory", "sigmas"):
        x, y = getattr(a, field), getattr(b, field)
        assert (x is None) == (y is None) and (x is None or torch.equal(x, y)), field


def fastvideo_row(name: str, latents_CTHW: np.ndarray, text_LD: np.ndarray, **other: Any) -> dict[str, Any]:
    """A row as FastVideo's preprocessing writes it: numpy's bytes, shape and dtype name."""
    return {
        "id": name,
        "vae_latent_bytes": latents_CTHW.tobytes(),
        "vae_latent_shape": list(latents_CTHW.shape),
        "vae_latent_dtype": str(latents_CTHW.dtype),
        "text_embedding_bytes": text_LD.tobytes(),
        "text_embedding_shape": list(text_LD.shape),
        "text_embedding_dtype": str(text_LD.dtype),
        "file_name": name,
        "caption": f"caption of {name}",
        "media_type": "video",
        "width": 40,
        "height": 32,
        "num_frames": 9,
        "duration_sec": 0.5,
        "fps": 16.0,
        **other,
    }


def test_fastvideos_rows_are_transposed_and_normalised(tmp_path: Path) -> None:
    raw = np.random.default_rng(0).normal(size=(4, C, F, H, W)).astype(np.float32)
    text = np.random.default_rng(1).normal(size=(7, 6)).astype(np.float32)
    rows = [fastvideo_row(f"v{i}", raw[i], text) for i in range(4)]
    (tmp_path / "rank_0/worker_0").mkdir(parents=True)
    for i in range(2):  # its folders, one row group a file
        pq.write_table(
            pa.Table.from_pylist(rows[2 * i : 2 * i + 2]), tmp_path / f"rank_0/worker_0/data_chunk_{i}.parquet"
        )
    folder = ParquetFolder(tmp_path, STATISTICS)
    assert folder.shard_sizes == [2, 2]
    assert folder.shapes() == [(F, C, H, W)] * 4
    mean, std = np.array([0.5, -1.0]).reshape(2, 1, 1, 1), np.array([2.0, 4.0]).reshape(2, 1, 1, 1)
    for i in range(4):
        sample = folder.read(i, 0)
        expected = torch.from_numpy(((raw[i] - mean) / std).transpose(1, 0, 2, 3)).float()
        assert torch.allclose(sample.latents, expected, atol=1e-6)
        assert torch.equal(sample.text, torch.from_numpy(text))
        assert sample.caption == f"caption of v{i}"
    with pytest.raises(ValueError, match="raw VAE latents, as FastVideo writes them: give the VAE's latents_mean"):
        ParquetFolder(tmp_path)
    as_is = ParquetFolder(tmp_path, normalised=True).read(1, 0)
    assert torch.equal(as_is.latents, torch.from_numpy(raw[1].transpose(1, 0, 2, 3).copy()))


def test_what_we_write_has_fastvideos_columns_and_numbers(tmp_path: Path) -> None:
    samples = make(3)
    raw = [Sample(s.name, s.caption, s.text, STATISTICS.denormalise(s.latents)) for s in samples]
    write_parquet(tmp_path / "a.parquet", raw, normalised=False, facts=[{"width": 40, "fps": 16.0}] * 3)
    table = pq.read_table(tmp_path / "a.parquet")
    expected = [*fastvideo_row("", np.zeros(1), np.zeros(1))]
    assert table.schema.names == expected
    assert table.schema.field("vae_latent_shape").type == pa.list_(pa.int64())
    row = table.to_pylist()[2]
    array = np.frombuffer(row["vae_latent_bytes"], dtype=row["vae_latent_dtype"]).reshape(row["vae_latent_shape"])
    assert array.dtype == np.float32
    assert row["vae_latent_shape"] == [C, F, H, W]
    assert row["width"] == 40
    assert np.array_equal(array.transpose(1, 0, 2, 3), raw[2].latents.numpy())
    folder = ParquetFolder(tmp_path, STATISTICS)
    assert all(torch.allclose(folder.read(i, 0).latents, samples[i].latents, atol=1e-6) for i in range(3))


@pytest.mark.parametrize("kind", ["parquet", "safetensors"])
@pytest.mark.parametrize("first_frame", [False, True])
def test_round_trip(kind: str, first_frame: bool, tmp_path: Path) -> None:
    write, suffix = (write_parquet, "parquet") if kind == "parquet" else (write_latents, "safetensors")
    samples = make(5, first_frame=first_frame)
    write(tmp_path / f"b.{suffix}", samples[:3], normalised=True)
    write(tmp_path / f"c.{suffix}", samples[3:], normalised=True, dtype=torch.bfloat16)
    folder: Any = ParquetFolder(tmp_path) if kind == "parquet" else SafetensorsFolder(tmp_path)
    assert sum(folder.shard_sizes) == 5
    assert folder.shapes() == [(F, C, H, W)] * 5
    assert folder.captions() == [sample.caption for sample in samples]
    for i in range(3):
        same(folder.read(i, 0), samples[i])
    assert torch.equal(folder.read(4, 0).latents, samples[4].latents.bfloat16().float())
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"b.{suffix}", f"c.{suffix}"]


def test_raw_safetensors_are_normalised(tmp_path: Path) -> None:
    sample = make(1)[0]
    write_latents(tmp_path / "a.safetensors", [sample], normalised=False)
    read = SafetensorsFolder(tmp_path, STATISTICS).read(0, 0)
    assert torch.allclose(STATISTICS.denormalise(read.latents), sample.latents, atol=1e-5)
    with pytest.raises(ValueError, match="raw VAE latents: give"):
        SafetensorsFolder(tmp_path)
    three = Statistics((0.0,) * 3, (1.0,) * 3)
    with pytest.raises(CorruptSample, match="not the 3 channels"):
        SafetensorsFolder(tmp_path, three).read(0, 0)


def test_a_stream_of_shards_reads_only_the_row_groups_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(4):
        write_parquet(tmp_path / f"{i}.parquet", make(4, 4 * i), normalised=True, rows_per_group=2)
    folder = ParquetFolder(tmp_path)
    order, groups = ShardedOrder(folder.shard_sizes, 0, pool=2), list[int]()
    original = folder._read_group
    monkeypatch.setattr(folder, "_table", lambda group: groups.append(group) or original(group))
    stream = Stream(folder, order, 0)
    batch = stream.samples(range(4, 8))
    assert len(set(groups)) == 2  # 4 positions in a pool of 2 groups of 2 rows
    assert [int(s.name.split("clip")[1][:-1]) for s in batch] == [order.index(p) for p in range(4, 8)]
    assert stacked([s.latents for s in batch], "latents").shape == (4, F, C, H, W)
    with pytest.raises(ValueError, match="4 of 4 samples have no pixels"):
        stacked([s.pixels for s in batch], "pixels")
    with pytest.raises(ValueError, match=r"text of one batch have several shapes: \[\(1, 6\)"):
        stacked([s.text for s in batch], "text")


def test_corrupt_rows_are_named(tmp_path: Path) -> None:
    good = fastvideo_row("good", np.zeros((C, F, H, W), np.float32), np.zeros((1, 6), np.float32))
    short = {**good, "id": "short", "vae_latent_bytes": good["vae_latent_bytes"][:-3]}
    nan = fastvideo_row("nan", np.full((C, F, H, W), np.nan, np.float32), np.zeros((1, 6), np.float32))
    empty = {**good, "id": "empty", "vae_latent_bytes": b""}
    complex64 = {**good, "id": "odd", "vae_latent_dtype": "complex64"}
    flat = {**good, "id": "flat", "vae_latent_shape": [C * F * H * W]}
    pq.write_table(pa.Table.from_pylist([good, short, nan, empty, complex64, flat]), tmp_path / "a.parquet")
    folder = ParquetFolder(tmp_path, STATISTICS)
    assert folder.read(0, 0).latents is not None
    for item, message in enumerate(
        ["bytes, and", "NaN or infinity", "has no latents", "'complex64'", r"\[C, F, H, W\], got \[120\]"], start=1
    ):
        with pytest.raises(CorruptSample, match=message) as error:
            folder.read(item, 0)
        assert "a.parquet, row group 0, row" in str(error.value)
        assert "\n" not in str(error.value)


def test_damage_on_disk_is_a_corrupt_sample_and_not_the_end(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", make(2), normalised=True)
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    data[8:200] = bytes(192)
    (tmp_path / "a.parquet").write_bytes(data)
    folder = ParquetFolder(tmp_path)
    with pytest.raises(CorruptSample, match="row 0"):
        folder.read(0, 0)
    assert folder.read(1, 0).caption == "caption 1"


def test_bytes_that_only_fit_float32_are_float32() -> None:
    """FastVideo reads everything as float32 whatever the dtype column says; some files rely on it."""
    values = torch.tensor([1.5, -2.0])
    assert torch.equal(from_bytes(values.numpy().tobytes(), (2,), "torch.bfloat16", "x"), values)
    half = to_row("x", values.bfloat16())
    assert torch.equal(from_bytes(half["x_bytes"], half["x_shape"], half["x_dtype"], "x"), values.bfloat16())


def test_trajectories_keep_their_own_noise_levels(tmp_path: Path) -> None:
    x, sigmas = torch.randn(5, 4, F, C, H, W), torch.tensor([1.0, 0.9, 0.5, 0.0])
    captions = [f"c{i}" for i in range(5)]
    write_trajectories(tmp_path / "0.safetensors", x[:2], sigmas, captions[:2])
    write_trajectories(tmp_path / "1.safetensors", x[2:], sigmas, captions[2:])
    folder = SafetensorsFolder(tmp_path)
    assert folder.shapes() == [(F, C, H, W)] * 5
    assert torch.equal(folder.sigmas, sigmas)
    for i in range(5):
        sample = folder.read(i, 0)
        assert torch.equal(sample.trajectory, x[i])
        assert torch.equal(sample.latents, x[i, -1])
        assert sample.caption == captions[i]
        assert torch.equal(sample.sigmas, sigmas)
    write_trajectories(tmp_path / "2.safetensors", x[2:], sigmas * 0.5, captions[2:])
    with pytest.raises(ValueError, match=r"2.safetensors stores the noise levels \[0.5"):
        SafetensorsFolder(tmp_path)
    write_latents(tmp_path / "2.safetensors", make(1), normalised=True)
    with pytest.raises(ValueError, match="mixes shards"):
        SafetensorsFolder(tmp_path)
    with pytest.raises(ValueError, match="3 trajectories at 4 levels are"):
        write_trajectories(tmp_path / "3.safetensors", x, sigmas, captions[:3])


def test_fastvideos_trajectories(tmp_path: Path) -> None:
    """Its states follow the step whose timestep stands beside them: the last one is clean."""
    x, timesteps = np.random.default_rng(0).normal(size=(3, C, F, H, W)).astype(np.float32), [1000.0, 750.0, 500.0]
    row = fastvideo_row("t", np.zeros((C, F, H, W), np.float32), np.zeros((1, 6), np.float32))
    for name, array in [("latents", x[None]), ("timesteps", np.array(timesteps, np.float32))]:
        row |= {f"trajectory_{name}_bytes": array.tobytes(), f"trajectory_{name}_shape": list(array.shape)}
        row |= {f"trajectory_{name}_dtype": "float32"}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    sample = ParquetFolder(tmp_path).read(0, 0)
    assert torch.equal(sample.trajectory, torch.from_numpy(x.transpose(0, 2, 1, 3, 4).copy()))
    assert sample.sigmas.tolist() == [0.75, 0.5, 0.0] == left_levels(torch.tensor(timesteps)).tolist()
    assert torch.equal(sample.latents, sample.trajectory[-1])


def store_lmdb(path: Path, rows: np.ndarray, prompts: list[str], images: np.ndarray | None = None) -> None:
    """As Self-Forcing's scripts store it."""
    lmdb = pytest.importorskip("lmdb")
    path.mkdir(parents=True)
    with lmdb.open(str(path), map_size=2**24) as env, env.begin(write=True) as txn:
        txn.put(b"latents_shape", " ".join(map(str, rows.shape)).encode())
        for i, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
            txn.put(f"latents_{i}_data".encode(), row.astype(np.float16).tobytes())
            txn.put(f"prompts_{i}_data".encode(), prompt.encode())
        if images is not None:
            txn.put(b"img_shape", " ".join(map(str, images.shape)).encode())
            for i, image in enumerate(images):
                txn.put(f"img_{i}_data".encode(), image.tobytes())


def test_self_forcings_lmdb(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(5, 4, F, C, H, W)).astype(np.float16)
    store_lmdb(tmp_path / "ode/shard_0", rows[:2], ["a", "b"])
    store_lmdb(tmp_path / "ode/shard_1", rows[2:], ["c", "d", "ü"])
    levels = [1.0, 0.9, 0.5, 0.0]
    folder = LMDBFolder(tmp_path / "ode", levels)
    assert folder.shard_sizes == [2, 3]
    assert folder.captions() == ["a", "b", "c", "d", "ü"]
    for i, prompt in enumerate(["a", "b", "c", "d", "ü"]):
        sample = folder.read(i, 0)
        assert torch.equal(sample.trajectory, torch.from_numpy(rows[i]).float())
        assert sample.caption == prompt
        assert torch.equal(sample.latents, sample.trajectory[-1])
        assert torch.equal(sample.sigmas, torch.tensor(levels))
    folder.close()
    for wrong in (None, levels[:3], levels[::-1], [1.0, 0.9, 0.5, 0.1]):
        with pytest.raises(ValueError, match="give 4 sigmas, falling, the last one 0"):
            LMDBFolder(tmp_path / "ode", wrong)
    before = sorted((path.name, path.stat().st_size) for path in tmp_path.rglob("*.mdb"))
    assert sorted(name for name, _ in before) == ["data.mdb"] * 2 + ["lock.mdb"] * 2  # the writers', not ours


def test_clean_latents_and_first_frames_of_an_lmdb(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(2, 1, F, C, H, W)).astype(np.float16)
    images = np.arange(2 * 4 * 6 * 3, dtype=np.uint8).reshape(2, 4, 6, 3)
    store_lmdb(tmp_path / "a", rows, ["a", "b"], images)
    sample = LMDBFolder(tmp_path / "a").read(1, 0)
    assert sample.trajectory is None
    assert torch.equal(sample.latents, torch.from_numpy(rows[1, 0]).float())
    assert sample.pixels.shape == (1, 3, 4, 6)
    assert np.array_equal((sample.pixels[0] * 255).round().byte().permute(1, 2, 0).numpy(), images[1])
    import lmdb

    with lmdb.open(str(tmp_path / "a")) as env, env.begin(write=True) as txn:
        txn.put(b"latents_0_data", b"short")
        txn.delete(b"prompts_1_data")
    folder = LMDBFolder(tmp_path / "a")
    with pytest.raises(CorruptSample, match="row 0 has 5 bytes"):
        folder.read(0, 0)
    with pytest.raises(CorruptSample, match="row 1 has no prompt"):
        folder.read(1, 0)


def test_optional_packages_that_are_missing_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"")
    for name in ("lmdb", "pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match="need the package lmdb: pip install lmdb"):
        LMDBFolder(tmp_path)
    for action in (lambda: ParquetFolder(tmp_path), lambda: load_prompts(tmp_path / "a.parquet")):
        with pytest.raises(ValueError, match="need pyarrow: pip install"):
            action()


def test_folders_that_hold_something_else_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text/a.parquet").write_text("not parquet")
    (tmp_path / "text/a.safetensors").write_bytes(struct.pack("<Q", 5) + b"wrong")
    pq.write_table(pa.table({"caption": ["x"]}), tmp_path / "columns.parquet")
    save_file({"weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    write_latents(tmp_path / "none.safetensors", [], normalised=True)
    (tmp_path / "no_lmdb").mkdir()
    for action, message in [
        (lambda: ParquetFolder(tmp_path / "absent"), "no such file or folder"),
        (lambda: ParquetFolder(tmp_path / "no_lmdb"), "holds no .parquet file"),
        (lambda: ParquetFolder(tmp_path / "text"), "is no parquet file"),
        (lambda: ParquetFolder(tmp_path / "columns.parquet"), "neither vae_latent_bytes nor trajectory_latents_bytes"),
        (lambda: SafetensorsFolder(tmp_path / "text"), "is no shard of latents"),
        (lambda: SafetensorsFolder(tmp_path / "model.safetensors"), "is no shard of latents"),
        (lambda: SafetensorsFolder(tmp_path / "none.safetensors"), "hold no row"),
        (lambda: LMDBFolder(tmp_path / "no_lmdb"), "holds no LMDB environment"),
        (lambda: Statistics((0.0,), (0.0,)), "positive std"),
        (lambda: write_latents(tmp_path / "x.safetensors", [Sample("a")], normalised=True), "has no latents to write"),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            action()
        assert "\n" not in str(error.value)


def test_prompts_of_a_parquet_file(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    pq.write_table(pa.table({"id": [1, 2, 3], "caption": ["a red fox", None, " a cat "]}), path)
    assert load_prompts(path) == ["a red fox", "a cat"]
    pq.write_table(pa.table({"prompt": [1]}), path)
    with pytest.raises(ValueError, match="column 'prompt' holds 1, which is no text"):
        load_prompts(path)
    pq.write_table(pa.table({"text": ["x"]}), path)
    with pytest.raises(ValueError, match=r"needs a column 'prompt' or 'caption', it has \['text'\]"):
        load_prompts(path)
    path.write_text("x")
    with pytest.raises(ValueError, match="is no parquet file") as error:
        load_prompts(path)
    assert "\n" not in str(error.value)
