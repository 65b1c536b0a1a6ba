"""Imports run one way, losses know no networks, and the core runs without the optional packages."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

from tests import ROOT

FAMILIES = sorted(f"model.{path.parent.name}" for path in ROOT.glob("model/*/family.py"))
# from the ground up; rooms of one layer do not know each other
LAYERS = [
    ["utils"],
    ["model.attention", "worlds", "importers"],
    ["model"],
    FAMILIES,
    ["pipeline"],
    ["tasks"],
    ["configs"],
    ["trainer"],
    ["generation", "planning"],
    ["evaluation", "serving"],
    ["entry points"],
    ["tests"],
]
ON_UTILS_ALONE = {"worlds", "importers"}
ENTRY_FOLDERS = {"benchmarks", "examples", "scripts"}
ROOMS = {room.split(".")[0] for rooms in LAYERS for room in rooms} - {"entry points", "tests"}
PACKAGES = {*ROOMS, *ENTRY_FOLDERS, "tests"}
OPTIONAL = [
    *("diffusers", "transformers", "peft", "accelerate", "wandb", "deepspeed", "matplotlib"),
    *("av", "pyarrow", "lmdb", "sklearn", "tensorboard", "flash_attn", "flash_attn_interface", "triton"),
    *("fastapi", "starlette", "uvicorn", "websockets", "PIL"),
]


def module_of(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def project_files(root: Path) -> list[Path]:
    """Python files of the project, relative to ``root``."""
    files = [*root.glob("*.py"), *(file for name in PACKAGES for file in root.glob(f"{name}/**/*.py"))]
    return sorted(file.relative_to(root) for file in files)


def room_of(module: str) -> str:
    """The room of LAYERS that a module lies in; what lies in none is an entry point."""
    rooms = [room for rooms in LAYERS for room in rooms if module == room or module.startswith(room + ".")]
    return max(rooms, key=len, default="entry points")


def layer(room: str) -> int:
    return next(number for number, rooms in enumerate(LAYERS) if room in rooms)


def imports(path: Path, root: Path, modules: set[str]) -> Iterator[tuple[int, str]]:
    """(line, module of the project) for each import anywhere in the file, also in functions."""
    for node in ast.walk(ast.parse((root / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                above = ".".join(path.parts[: len(path.parts) - node.level])
                source = f"{above}.{source}".strip(".")
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                # `from model import wan` imports model.wan; a file or a folder of files
                is_module = any(known == inner or known.startswith(inner + ".") for known in modules)
                yield node.lineno, inner if is_module else source


def violations(root: Path) -> list[str]:
    files = project_files(root)
    modules = {module_of(path) for path in files}
    tops = PACKAGES | {module.split(".")[0] for module in modules}
    found = []
    for path in files:
        ours = room_of(module_of(path))
        for line, target in imports(path, root, modules):
            if target.split(".")[0] not in tops:
                continue
            where, theirs = f"{path.as_posix()}:{line} imports {target}", room_of(target)
            if layer(theirs) > layer(ours) or (layer(theirs) == layer(ours) and theirs != ours):
                found.append(f"{where}: {ours} must not know {theirs}")
            elif ours in ON_UTILS_ALONE and theirs not in (ours, "utils"):
                found.append(f"{where}: {ours} stands on utils alone")
            elif theirs in FAMILIES and theirs != ours and path.parts[0] not in ("benchmarks", "tests"):
                found.append(f"{where}: nobody names a family: ask model/family.py")
    return found


def circles(root: Path) -> list[list[str]]:
    """Groups of files that import each other, directly or through others: strongly connected parts of more than one."""
    files = project_files(root)
    modules = {module_of(path) for path in files}
    knows = {module_of(path): {t for _, t in imports(path, root, modules) if t in modules} for path in files}
    reached: dict[str, set[str]] = {}
    for start in modules:
        seen, queue = set(), [start]
        while queue:
            for target in knows[queue.pop()] - seen:
                seen.add(target)
                queue.append(target)
        reached[start] = seen
    found = {frozenset({a, *(b for b in reached[a] if a in reached[b])}) for a in modules if a in reached[a]}
    return sorted(sorted(group) for group in found)


def test_there_is_no_circle_of_files() -> None:
    assert circles(ROOT) == []


def test_each_room_says_what_belongs_there() -> None:
    """In the first line of its `__init__.py`."""
    for folder in sorted({path.parent for path in project_files(ROOT)} - {Path(".")}):
        if folder.parts[0] != "tests":
            said = ast.get_docstring(ast.parse((ROOT / folder / "__init__.py").read_text(encoding="utf-8")))
            assert said and said[0].isupper(), f"{folder}/__init__.py says nothing"


def test_imports_run_one_way() -> None:
    assert violations(ROOT) == []


BAD = {
    "utils/a.py": "import model.dmd",
    "utils/b.py": "def f():\n    from trainer import base",
    "model/wan/c.py": "from pipeline import d",
    "model/dmd.py": "from model import wan",
    "model/gan.py": "from .wan.transformer import WanTransformer",
    "pipeline/d.py": "from configs import schema",
    "pipeline/e.py": "from model.wan.transformer import WanTransformer",
    "scripts/f.py": "def f():\n    from model import wan",
    "configs/schema.py": "import trainer.base as base",
    "trainer/base.py": "from train import main",
    "generation/live.py": "from serving.limits import Limits",
    "planning/plan.py": "from generation.live import Live",
    "worlds/toy.py": "from model.types import Rollout",
    "importers/tables.py": "from configs.schema import RunConfig",
    "tasks/kinds/encoded.py": "from trainer import base",
    "serving/run.py": "from train import main",
    "train.py": "from tests import conftest",
}
GOOD = {
    "utils/fine.py": "from utils.a import x\nimport torch",
    "model/types.py": "from utils import a",
    "model/wan/transformer.py": "from . import c\nfrom utils.a import x",
    "pipeline/fine.py": "from model.attention.kv_cache import KVCache\nfrom model import dmd",
    "model/wan/fine.py": "from ..types import Rollout",
    "benchmarks/fine.py": "from model.wan.transformer import WanTransformer",
    "trainer/fine.py": "from configs.schema import Config\nfrom pipeline import d",
    "serving/fine.py": "from trainer import base",
    "scripts/fine.py": "import trainer.base",
    "inference.py": "from trainer import base",
}


def test_each_kind_of_wrong_import_is_found_and_no_right_one(tmp_path: Path) -> None:
    for name, text in {**BAD, **GOOD}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert sorted({line.split(":")[0] for line in violations(tmp_path)}) == sorted(BAD)


def test_an_installation_has_every_room_and_command() -> None:
    """`pip install -e .` takes what pyproject.toml lists."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    files = [path for path in project_files(ROOT) if path.parts[0] != "tests"]
    folders = {module_of(path.parent / "__init__.py") for path in files if len(path.parts) > 1}
    assert listed["packages"] == sorted(folders)
    assert listed["py-modules"] == sorted(module_of(path) for path in files if len(path.parts) == 1)


def test_tests_lie_as_the_rooms_do() -> None:
    """A test file is in the folder of its room; beside those, what needs processes, Slurm, a GPU or a browser,
    and what is of all readers."""
    beside = {"tests", "tests/distributed", "tests/slurm", "tests/gpu", "tests/serving/browser", "tests/fuzz"}
    folders = {path.relative_to(ROOT).parent for path in ROOT.glob("tests/**/test_*.py")}
    missing = [
        path for path in folders if path.as_posix() not in beside and not (ROOT / path.relative_to("tests")).is_dir()
    ]
    assert not missing
    of_the_whole = {"test_api.py", "test_docs.py", "test_examples.py", "test_extending.py", "test_layers.py"}
    of_the_whole |= {"test_glossary.py", "test_wan_from_zero.py"}
    assert {path.name for path in ROOT.glob("tests/test_*.py")} == of_the_whole


def test_each_circle_is_found(tmp_path: Path) -> None:
    texts = {
        "utils/a.py": "from utils import b",
        "utils/b.py": "def f():\n    from utils.c import x",
        "utils/c.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from utils.a import y",
        "utils/d.py": "from utils import a",
    }
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert circles(tmp_path) == [["utils.a", "utils.b", "utils.c"]]


# subclasses of what those packages hold: imported where they are used, after demo.py has looked for the packages
OF_THE_SERVER = {"serving.bounded", "serving.download"}
CORE = [
    module_of(path)
    for path in project_files(ROOT)
    if path.parts[0] in {*ROOMS, "benchmarks"} or len(path.parts) == 1
    if module_of(path) not in OF_THE_SERVER
]

PROBE = """
import importlib, json, sys, traceback
modules, blocked = json.loads(sys.argv[1]), json.loads(sys.argv[2])
sys.modules.update(dict.fromkeys(blocked))
failed = {}
for name in modules:
    try:
        importlib.import_module(name)
    except Exception:
        failed[name] = traceback.format_exc().strip().splitlines()[-3:]
print(json.dumps(failed))
"""


def test_core_imports_without_optional_packages() -> None:
    command = [sys.executable, "-c", PROBE, json.dumps(CORE), json.dumps(OPTIONAL)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == {}
