"""What was saved comes back bit for bit, and nothing that goes wrong costs an earlier checkpoint."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from utils import checkpoint, shards
from utils.errors import UserError
from utils.optim_state import flatten_optimizer, restore_optimizer


def tensors() -> dict[str, dict[str, Tensor]]:
    base = torch.randn(4, 6)
    return {
        "student": {
            "fp32": torch.randn(3, 5),
            "bf16": torch.randn(7).bfloat16(),
            "int": torch.arange(4),
            "flags": torch.tensor([True, False]),
            "scalar": torch.tensor(float("nan")),
            "empty": torch.zeros(0, 3),
            "transposed": base.t(),
            "whole": base,
            "alias": base,
            "row": base[1],
            "column": base[:, 2],
            "parameter": nn.Parameter(torch.randn(2)),
        },
        "critic": {"w": torch.randn(2)},
    }


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape, name
        # bytes, not values: NaN is equal to itself, -0.0 is not equal to 0.0
        assert a[name].detach().contiguous().reshape(-1).view(torch.uint8).tolist() == (
            b[name].detach().contiguous().reshape(-1).view(torch.uint8).tolist()
        ), name


def test_round_trip_is_exact(tmp_path: Path) -> None:
    root, saved = tmp_path / "run" / "checkpoints", tensors()
    state = {"step": 100, "cursor": [1, 2], "lr": 1e-5 / 3, "name": "ü", "none": None}
    path = checkpoint.save(root, 100, saved, state)
    assert path == root / "step_00000100" == checkpoint.latest(root)
    assert checkpoint.load_state(path) == state
    assert sorted(checkpoint.tensor_names(path)) == ["critic", "student"]
    for name, group in saved.items():
        assert_same(checkpoint.load_tensors(path, name), group)
        assert_same(load_file(path / f"{name}.safetensors"), group)  # what any other tool sees
    into = {name: {key: torch.zeros_like(value) for key, value in group.items()} for name, group in saved.items()}
    checkpoint.load_into(path, checkpoint.layout(path), into)
    for name, group in saved.items():
        assert_same(into[name], group)
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json"}


def test_order_retention_and_step(tmp_path: Path) -> None:
    for step in (5, 10, 100_000_000, 20, 15):
        checkpoint.save(tmp_path, step, {}, {})
    (tmp_path / "step_00000099").mkdir()  # without a state: not one of ours
    (tmp_path / "notes").mkdir()
    steps = [checkpoint.step_of(path) for path in checkpoint.list_checkpoints(tmp_path)]
    assert steps == [5, 10, 15, 20, 100_000_000]
    gone = checkpoint.prune(tmp_path, keep_last=2, keep_every=10)
    assert [checkpoint.step_of(path) for path in gone] == [5, 15]
    assert [checkpoint.step_of(path) for path in checkpoint.list_checkpoints(tmp_path)] == [10, 20, 100_000_000]
    checkpoint.prune(tmp_path, keep_last=1)
    assert [checkpoint.step_of(path) for path in checkpoint.list_checkpoints(tmp_path)] == [100_000_000]
    assert {path.name for path in tmp_path.iterdir()} == {"step_100000000", "step_00000099", "notes"}
    with pytest.raises(ValueError, match="keep_last=0"):
        checkpoint.prune(tmp_path, keep_last=0)


def half_written(error: BaseException) -> Callable[..., None]:
    def write_file(file: Path, group: dict[str, Tensor]) -> None:
        file.write_bytes(b"\x00" * 100)
        raise error

    return write_file


def test_a_killed_save_shadows_nothing_and_is_cleared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = tensors()
    good = checkpoint.save(tmp_path, 1, saved, {"n": 1})

    class Killed(BaseException): ...

    with monkeypatch.context() as patch:
        patch.setattr(shards, "write_file", half_written(Killed()))
        patch.setattr("utils.checkpoint.shutil.rmtree", lambda *_, **__: None)  # the dead tidy up nothing
        with pytest.raises(Killed):
            checkpoint.save(tmp_path, 2, saved, {"n": 2})
    assert len(list(tmp_path.iterdir())) == 2  # the good one and what the kill left
    assert checkpoint.latest(tmp_path) == checkpoint.resolve_resume("auto", tmp_path) == good
    assert_same(checkpoint.load_tensors(good, "student"), saved["student"])
    checkpoint.save(tmp_path, 3, saved, {})
    assert {path.name for path in tmp_path.iterdir()} == {"step_00000001", "step_00000003"}


def test_full_disk_is_said_clearly_and_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = checkpoint.save(tmp_path, 1, tensors(), {"n": 1})
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(shards, "write_file", half_written(full))
    for step in (1, 2):
        with pytest.raises(UserError, match=rf"step_0000000{step} .*No space left on device; earlier .* intact"):
            checkpoint.save(tmp_path, step, tensors(), {"n": 2})
    assert list(tmp_path.iterdir()) == [good]
    assert checkpoint.load_state(good) == {"n": 1}


def test_a_background_save_keeps_what_it_was_given_and_reports_at_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    write_file = shards.write_file

    def slow(file: Path, group: dict[str, Tensor]) -> dict[str, int]:
        assert gate.wait(60)
        return write_file(file, group)

    monkeypatch.setattr(shards, "write_file", slow)
    saver = checkpoint.Saver(tmp_path, keep_last=1, background=True)
    live, state = {"net": {"w": torch.ones(3, 2)[:, 1], "step": torch.tensor(1.0)}}, {"counts": [1]}
    saver.save(1, live, state)
    live["net"]["w"].zero_()  # training goes on, and must not be seen
    live["net"]["step"] += 1
    state["counts"].append(2)
    assert checkpoint.latest(tmp_path) is None
    gate.set()
    saver.wait()
    saved = checkpoint.load_tensors(tmp_path / "step_00000001", "net")
    assert saved["w"].tolist() == [1, 1, 1]
    assert saved["step"].item() == 1
    assert checkpoint.load_state(tmp_path / "step_00000001") == {"counts": [1]}

    monkeypatch.setattr(shards, "write_file", half_written(OSError(errno.ENOSPC, "No space left on device")))
    saver.save(2, live, state)
    with pytest.raises(UserError, match="step_00000002 could not be written: No space left on device"):
        saver.save(3, live, state)
    monkeypatch.setattr(shards, "write_file", write_file)
    saver.save(4, live, state)
    saver.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000004"]


def test_retention_never_deletes_the_only_whole_one(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, tensors(), {})
    truncate(tmp_path / "step_00000003/student.safetensors")
    (tmp_path / "step_00000002/tensors.json").unlink()
    assert checkpoint.prune(tmp_path, keep_last=1) == []
    checkpoint.save(tmp_path, 4, tensors(), {})
    assert len(checkpoint.prune(tmp_path, keep_last=1)) == 3
    assert checkpoint.latest(tmp_path) == tmp_path / "step_00000004"


def test_saving_a_step_again_replaces_it_and_a_kill_in_between_keeps_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save(tmp_path, 1, {}, {"n": 1})
    checkpoint.save(tmp_path, 1, {}, {"n": 2})
    assert checkpoint.load_state(tmp_path / "step_00000001") == {"n": 2}
    rename = os.rename

    def killed_at_the_second(source: Path, target: Path) -> None:
        if Path(source).name.startswith(".tmp"):
            raise KeyboardInterrupt
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("utils.checkpoint_folder.os.rename", killed_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(tmp_path, 1, {}, {"n": 3})
    assert checkpoint.latest(tmp_path) is None
    found = checkpoint.find_resume("auto", tmp_path)
    assert found is not None
    assert found[1] == {"n": 2}
    checkpoint.save(tmp_path, 2, {}, {})
    assert checkpoint.load_state(tmp_path / "step_00000001") == {"n": 2}
    assert {path.name for path in tmp_path.iterdir()} == {"step_00000001", "step_00000002"}


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-4])


def scramble(file: Path) -> None:
    file.write_bytes(b"\xff" * file.stat().st_size)


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1  # the last tensor's last bit: still a valid file of the right size
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "say"),
    [(truncate, "truncated"), (scramble, "corrupt"), (flip, "the checksum of"), (Path.unlink, "is missing")],
)
def test_a_damaged_file_is_named(tmp_path: Path, damage: Callable[[Path], Any], say: str) -> None:
    checkpoint.save(tmp_path, 1, {}, {})
    path = checkpoint.save(tmp_path, 2, tensors(), {})
    damage(path / "student.safetensors")
    with pytest.raises(
        UserError, match=rf"step_00000002/student.safetensors .*{say}.*whole one is step_00000001: --resume last-good"
    ) as caught:
        checkpoint.load_tensors(path, "student")
    assert "\n" not in str(caught.value)
    into = {"student": {name: torch.zeros_like(value) for name, value in tensors()["student"].items()}}
    with pytest.raises(UserError, match=say):
        checkpoint.check(path)  # what a resume does first
        checkpoint.load_into(path, checkpoint.layout(path), into)
    assert checkpoint.load_tensors(path, "critic").keys() == {"w"}


def test_a_changed_table_or_state_is_found_by_its_checksum(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 2, tensors(), {"cursor": 16})
    table, state = path / "tensors.json", path / "state.json"
    table.write_text(table.read_text().replace('"F32"', '"I32"', 1))
    with pytest.raises(UserError, match="tensors.json is corrupt .*its checksum"):
        checkpoint.layout(path)
    state.write_text(state.read_text().replace("16", "17"))
    with pytest.raises(UserError, match="state.json is corrupt .*its checksum"):
        checkpoint.load_state(path)


def test_the_first_format_is_still_read(tmp_path: Path) -> None:
    """One process's files with their sizes, no table."""
    path, saved = tmp_path / "step_00000007", {"a": torch.randn(3).bfloat16(), "b": torch.tensor(2.0)}
    path.mkdir()
    save_file(saved, path / "net.safetensors")
    files = {"net.safetensors": (path / "net.safetensors").stat().st_size}
    (path / "state.json").write_text(json.dumps({"format": 1, "step": 7, "files": files, "state": {"n": 1}}))
    assert checkpoint.load_state(path) == {"n": 1}
    assert checkpoint.tensor_names(path) == ["net"]
    assert_same(checkpoint.load_tensors(path, "net"), saved)
    truncate(path / "net.safetensors")
    with pytest.raises(UserError, match="net.safetensors is truncated"):
        checkpoint.load_tensors(path, "net")


@pytest.mark.parametrize("text", ["", '{"format": 1', "[]", "{}", "\udcff"])
def test_a_damaged_state_is_named(tmp_path: Path, text: str) -> None:
    path = checkpoint.save(tmp_path, 2, {}, {})
    (path / "state.json").write_text(text, errors="surrogateescape")
    with pytest.raises(UserError, match="step_00000002/state.json"):
        checkpoint.load_state(path)


@pytest.mark.parametrize(
    "damage",
    [lambda manifest: manifest["files"].pop("student.safetensors"), lambda manifest: manifest.update(crc32=[1])],
)
def test_a_state_that_names_too_little_is_damaged(tmp_path: Path, damage: Callable[[dict[str, Any]], Any]) -> None:
    path = checkpoint.save(tmp_path, 2, tensors(), {})
    manifest = json.loads((path / "state.json").read_text())
    damage(manifest)
    (path / "state.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="step_00000002/state.json "):
        checkpoint.verify(path)


def test_another_format_and_an_unknown_name_are_refused(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 2, tensors(), {})
    with pytest.raises(UserError, match="has no 'ema': it has critic, student"):
        checkpoint.load_tensors(path, "ema")
    manifest = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(UserError, match="has format 99, this code reads 1 and 2"):
        checkpoint.load_state(path)


def test_resume_accepts_a_run_its_checkpoints_or_one_of_them(tmp_path: Path) -> None:
    root = tmp_path / "run" / "checkpoints"
    assert checkpoint.resolve_resume("auto", root) is None
    first, last = checkpoint.save(root, 1, {}, {}), checkpoint.save(root, 2, {}, {})
    assert checkpoint.resolve_resume("auto", root) == last
    assert checkpoint.resolve_resume("never", root) is None
    for arg, expected in [(first, first), (root, last), (tmp_path / "run", last)]:
        assert checkpoint.resolve_resume(str(arg), tmp_path / "elsewhere") == expected
    with pytest.raises(UserError, match=r"no checkpoint in .*: .* has run; give"):
        checkpoint.resolve_resume(str(tmp_path), root)
    with pytest.raises(UserError, match=r"no checkpoint in .*nowhere/at/all: .* has run; give"):
        checkpoint.resolve_resume(str(tmp_path / "nowhere" / "at" / "all"), root)
    with pytest.raises(UserError, match="it is a file"):
        checkpoint.resolve_resume(str(first / "state.json"), root)


# ----------------------------------------------------------------------------------------------------------- optimizer


def adamw(net: nn.Module) -> torch.optim.Optimizer:
    decay, plain = [p for p in net.parameters() if p.dim() > 1], [p for p in net.parameters() if p.dim() <= 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": plain, "lr": 3e-3, "betas": (0.5, 0.7)}]
    return torch.optim.AdamW(groups, lr=1e-2)


def amsgrad(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(net.parameters(), lr=torch.tensor(1e-2), amsgrad=True)


def muon(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Muon([p for p in net.parameters() if p.dim() == 2], lr=1e-2)


def sgd(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=1e-2, momentum=0.9)


def network(seed: int, width: int = 5) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3))


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        loss = (net(x) - x[:, :3]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("make", [adamw, amsgrad, muon, sgd])
def test_training_goes_on_bit_for_bit(tmp_path: Path, make: Callable[[nn.Module], torch.optim.Optimizer]) -> None:
    net = network(0)
    optimizer = make(net)
    train(net, optimizer, range(5))
    for group in optimizer.param_groups:  # what a schedule does
        group["lr"] *= 0.5
    flat, rest = flatten_optimizer(optimizer, net.named_parameters())
    path = checkpoint.save(tmp_path, 5, {"net": net.state_dict(), "optimizer": flat}, {"optimizer": rest})
    unbroken = train(net, optimizer, range(5, 10))

    other = network(1)
    resumed = make(other)
    other.load_state_dict(checkpoint.load_tensors(path, "net"))
    layout, saved = checkpoint.layout(path), checkpoint.load_state(path)["optimizer"]
    slots = restore_optimizer(resumed, {p: n for n, p in other.named_parameters()}, layout["optimizer"], saved)
    checkpoint.load_into(path, layout, {"optimizer": slots})
    assert train(other, resumed, range(5, 10)) == unbroken
    assert_same(dict(other.state_dict()), dict(net.state_dict()))
    again, rest_again = flatten_optimizer(resumed, other.named_parameters())
    assert_same(again, flatten_optimizer(optimizer, net.named_parameters())[0])
    assert rest_again == rest
    assert [type(g["betas"]) for g in resumed.param_groups if "betas" in g] == [
        type(g["betas"]) for g in optimizer.param_groups if "betas" in g
    ]


def test_an_optimizer_that_has_not_stepped_restores_to_nothing(tmp_path: Path) -> None:
    net = network(0)
    flat, rest = flatten_optimizer(adamw(net), net.named_parameters())
    assert flat == {}
    used = adamw(net)
    train(net, used, range(2))
    path = checkpoint.save(tmp_path, 1, {"optimizer": flat}, {})
    assert restore_optimizer(used, net.named_parameters(), checkpoint.layout(path)["optimizer"], rest) == {}
    assert len(used.state) == 0


def test_what_does_not_fit_is_listed() -> None:
    net = network(0)
    optimizer = sgd(net)
    train(net, optimizer, range(1))
    _, rest = flatten_optimizer(optimizer, net.named_parameters())

    renamed = {p: n.replace("2.", "head.") for n, p in net.named_parameters()}
    with pytest.raises(UserError, match=r"missing in the checkpoint: head.weight, head.bias; not in .*: 2.weight"):
        restore_optimizer(optimizer, renamed, {}, rest)

    wider = network(0, width=6)
    with pytest.raises(UserError, match=r"shape: 0.weight \(\[5, 4\] in the checkpoint, \[6, 4\] here\), 0.bias"):
        restore_optimizer(sgd(wider), wider.named_parameters(), {}, rest)

    with pytest.raises(UserError, match=r"in another group: 0.bias, 2.bias; 1 parameter groups .* 2 here"):
        restore_optimizer(adamw(net), net.named_parameters(), {}, rest)

    with pytest.raises(ValueError, match=r"a parameter of shape \[5\] has no name"):
        flatten_optimizer(optimizer, {p: n for n, p in net.named_parameters() if n != "0.bias"})


def test_state_that_json_cannot_hold_is_refused(tmp_path: Path) -> None:
    net = network(0)
    optimizer = sgd(net)
    optimizer.state[net[0].weight]["odd"] = {1, 2}  # type: ignore[index]
    with pytest.raises(ValueError, match="0.weight/odd is a set"):
        flatten_optimizer(optimizer, net.named_parameters())
    optimizer.state[net[0].weight] = {"number": 2.5, "text": "x", "none": None, "many": [1, 2]}  # type: ignore[index]
    flat, rest = flatten_optimizer(optimizer, net.named_parameters())
    fresh = sgd(net)
    path = checkpoint.save(tmp_path, 1, {"optimizer": flat}, {})
    layout = checkpoint.layout(path)["optimizer"]
    restore_optimizer(fresh, net.named_parameters(), layout, json.loads(json.dumps(rest)))
    assert fresh.state[net[0].weight] == optimizer.state[net[0].weight]  # type: ignore[index]
