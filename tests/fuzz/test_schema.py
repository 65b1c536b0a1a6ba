"""Every leaf of a run's schema with hostile values: each is refused in one line that names it, or the run works.

`python -m tests.fuzz.test_schema` also trains what was accepted, all of it, and prints the counts.
"""

from __future__ import annotations

import dataclasses
import functools
import random
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import train  # noqa: F401  once, and not in each child
from configs.load import load_run, run_from_plain
from configs.schema import RunConfig
from tests.fuzz.program import ended
from tests.small import BRIEF, DIFFUSION, NETWORK, ODE, SHORT, merged
from utils.config import to_yaml
from utils.errors import ConfigError
from utils.fields import field_types, section_type
from utils.variants import has_variants

NUMBERS = ["nan", "-inf", "-1", "0", "1", "1e30", "1e-30", str(2**62), str(2**70), "0x10", "'7'"]
VALUES = [*NUMBERS, "true", "null", "''", "abc", "'a: b\tc'", "[]", "[-1]", "[nan]", "[[]]", "{}", "{a: 1}", "'${seed}'", "'${oc.env:HOME}'", "2020-01-01", "x" * 5000, "'\\ud800'"]  # fmt: skip
SAMPLE, MANY, TRAINED = 25, 1500, 40  # in make test; in make test-all, and of those trained
HEADS = {"optimizer": {"lr": 1e-2, "betas": [0.0, 0.99]}}
GAN: dict[str, Any] = {"weight": 0.5, "discriminator_weight": 0.5, "depths": [0.5], "training": HEADS}
MUON = {"optimizer": {"kind": "muon"}}
LORA = {"lora": {"rank": 2}}
SPARSE = {"sparse": {"sparsity": 0.5, "cube": [3, 1, 1], "backend": "reference"}}
FEW = merged(BRIEF, {"training": {"max_steps": 2}})
IMAGES = {"preset": "toy", "overrides": {**NETWORK["overrides"], "in_dim": 1, "out_dim": 1, "text_len": 4}}
SHAPES = {
    "preset": "toy",
    "overrides": {**NETWORK["overrides"], "in_dim": 46, "out_dim": 46, "patch_size": [1, 1, 1]},
}
WAN = {
    "preset": "1.3b",
    "attention": "plain",
    "overrides": {"dim": 48, "ffn_dim": 64, "num_heads": 2, "num_layers": 2, "text_dim": 16, "freq_dim": 16},
}


def of_objective(kind: str, **others: Any) -> dict[str, Any]:
    return merged(FEW, {"objective": {"kind": kind}, **others})


# between them they have every leaf
BASES: dict[str, dict[str, Any]] = {
    "dmd": merged(
        FEW,
        {
            "objective": {"gan": GAN, "reward": {"name": "prompt_adherence", "beta": 0.5}},
            "training": {"sizes": [{"frames": 6}]},
        },
    ),
    "f_distill": of_objective("f_distill", objective={"kind": "f_distill", "gan": GAN}),
    "ladd": of_objective(
        "ladd", objective={"kind": "ladd", "gan": GAN}, critic=None, rollout={"kind": "backward_simulation"}
    ),
    "gan": of_objective("gan", objective={"kind": "gan", "gan": {**GAN, "features": "critic"}}, teacher=None),
    "decoupled_dmd": of_objective("decoupled_dmd"),
    "phased_dmd": of_objective("phased_dmd", schedule={"min_score_timestep": 400}),
    "sid": of_objective("sid"),
    "diffusion_forcing": of_objective("dmd", rollout={"kind": "diffusion_forcing"}),
    "teacher_forcing": of_objective("dmd", rollout={"kind": "teacher_forcing"}),
    "noised_data": of_objective("dmd", rollout={"kind": "noised_data"}),
    "muon": of_objective(
        "dmd", generator_training=MUON, critic_training=MUON, objective={"gan": {**GAN, "training": MUON}}
    ),
    "LoRA": of_objective("dmd", student={**NETWORK, **LORA}, critic={**NETWORK, **LORA}),
    "sparse": of_objective("dmd", student={**NETWORK, **SPARSE}, critic={**NETWORK, **SPARSE}),
    "sparse teacher": of_objective("dmd", teacher={**NETWORK, **SPARSE}),
    "digits": merged(DIFFUSION, {"student": IMAGES, "data": {"kind": "digits"}, "training": {"max_steps": 2}}),
    "shapes": merged(
        DIFFUSION,
        {"student": SHAPES, "data": {"kind": "shapes", "shapes": {"frames": 6}}, "training": {"max_steps": 2}},
    ),
    "wan": of_objective(
        "dmd",
        student=WAN,
        critic=WAN,
        teacher=WAN,
        data={"kind": "wan", "prompts": "configs/toy/prompts.txt", "wan": {"frames": 3, "height": 8, "width": 8}},
    ),
    "synthetic": of_objective(
        "dmd",
        student=WAN,
        critic=WAN,
        teacher=WAN,
        data={"kind": "synthetic", "synthetic": {"frames": 3, "height": 8, "width": 8, "prompts": 8}},
    ),
    "diffusion": merged(DIFFUSION, {**SHORT, "training": {"max_steps": 2}}),
    "ode": merged(ODE, {**SHORT, "training": {"max_steps": 2}}),
    "consistency": merged(
        DIFFUSION, {**SHORT, "trainer": "consistency", "teacher": NETWORK, "training": {"max_steps": 2}}
    ),
}


@functools.cache
def bases() -> dict[str, RunConfig]:
    return {name: run_from_plain(plain) for name, plain in BASES.items()}


def present(section: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """(path, class that has it) of every leaf of a config, and of every section that is absent or may be."""
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        where = f"{path}{field.name}"
        if dataclasses.is_dataclass(value):
            yield from present(value, f"{where}.")
        else:
            yield where, type(section).__name__


def leaves(schema: type, path: str = "", above: tuple[type, ...] = ()) -> Iterator[tuple[str, str]]:
    """(path, class that has it) of every leaf that a config may have."""
    for key, hint in field_types(schema).items():
        section: Any = section_type(hint)
        if section is None or section in above or "list" in str(hint):
            yield f"{path}{key}", schema.__name__
            continue
        for variant in [*section.variants().values()] if has_variants(section) else [section]:
            yield from leaves(variant, f"{path}{key}.", (*above, section))


@functools.cache
def places() -> dict[tuple[str, str], str]:
    """Leaf -> the base that has it."""
    found: dict[tuple[str, str], str] = {}
    for name, config in bases().items():
        for leaf in present(config):
            found.setdefault(leaf, name)
    return found


def loaded(folder: Path, base: str, path: str, value: str) -> str:
    """ "refused" or "accepted", or else what is wrong with the refusal."""
    file = folder / f"{base}.yaml"
    if not file.exists():
        file.write_text(to_yaml(BASES[base]))
    try:
        load_run(file, [f"{path}={value}"])
    except ConfigError as problem:
        said = str(problem)
        if "\n" in said or len(said) > 700:
            return f"refused in {len(said)} characters, {len(said.splitlines())} lines"
        names = path.split(".")[-1] in said or ("${" in said and path in said)
        return "refused" if names else f"does not name the key: {said}"
    except Exception as problem:
        return f"{type(problem).__name__}: {str(problem)[:200]}"
    return "accepted"


def trained(folder: Path, base: str, path: str, value: str) -> str:
    """How two steps of it end: as `ended` says it."""
    arguments = ["--config_path", str(folder / f"{base}.yaml"), "--logdir", str(folder / "run"), "--max_steps", "2"]
    return ended("train.py", [*arguments, f"{path}={value}"], folder / "said")


@functools.cache
def trials() -> list[tuple[str, str, str]]:
    """(base, path, value), all of them, in an order that does not depend on the machine."""
    every = [(base, path, value) for (path, _), base in places().items() for value in VALUES]
    random.Random(0).shuffle(every)
    return every


def test_every_leaf_is_tried() -> None:
    absent = {path for path, _ in set(leaves(RunConfig)) - set(places())}
    assert {path.rpartition(".")[0] for path in absent} == {"teacher.lora"}  # which no run may have


def test_a_hostile_value_is_refused_by_name(tmp_path: Path) -> None:
    found = {trial: loaded(tmp_path, *trial) for trial in trials()[:SAMPLE]}
    assert not {trial: result for trial, result in found.items() if result not in ("refused", "accepted")}
    assert 0.5 < sum(result == "refused" for result in found.values()) / SAMPLE < 1


def test_many_hostile_values_are_refused_by_name_or_train(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    found = {trial: loaded(tmp_path, *trial) for trial in trials()[:MANY]}
    assert not {trial: result for trial, result in found.items() if result not in ("refused", "accepted")}
    accepted = [trial for trial, result in found.items() if result == "accepted"]
    for number, trial in enumerate(accepted[:TRAINED]):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / f"{trial[0]}.yaml").write_text(to_yaml(BASES[trial[0]]))
        assert trained(tmp_path / str(number), *trial) in ("0", "2"), trial


if __name__ == "__main__":
    torch.set_num_threads(1)
    counts: Counter[str] = Counter()
    for base, path, value in trials():
        with tempfile.TemporaryDirectory() as made:
            result = loaded(Path(made), base, path, value)
            if result == "accepted":
                result = f"accepted, then exit code {trained(Path(made), base, path, value)}"
        known = result in ("refused", "accepted, then exit code 0", "accepted, then exit code 2")
        counts[result if known else "WRONG"] += 1
        if not known:
            print(f"{path}={value[:40]} ({base}): {result}", flush=True)
    print(dict(counts))
