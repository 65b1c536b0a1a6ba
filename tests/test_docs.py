"""What the pages for people name exists: files, modules, config keys, options, tests, error messages, examples."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import importlib
import io
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml
from torch.distributed.run import get_args_parser

from configs.load import load_run, run_from_plain
from configs.schema import RunConfig
from scripts import config_reference
from tests import ROOT
from tests.small import trainer
from trainer.command import train_args
from utils.errors import ConfigError, UserError

SITE = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))
PAGES = ["README.md", "CONTRIBUTING.md", *SITE]
PEOPLE = [*PAGES, "CHANGELOG.md", "LOG.md", "CITATION.cff", "docs/papers.bib"]
SUFFIXES = "py|sh|yaml|yml|toml|md|txt|bib|cff|gif|json|jsonl|safetensors|html|slurm"
MADE_BY_RUNS = ("logs/", ".venv/", "site/")  # not in the repository
SECTIONS = {field.name for field in dataclasses.fields(RunConfig)}
NEW_IN_AN_EXAMPLE = {"objective.kind=huber_dmd", "objective.huber_c=0.5"}
OF_OTHERS = {"owner/name", "VBench_full_info.json", "default_config.yaml", "config.json"}
PROGRAMS = {
    "train.py": "trainer/command.py",
    "inference.py": "generation/command.py",
    "inference.sh": "generation/command.py",
    "demo.py": "serving/command.py",
    "doctor.py": "planning/doctor.py",
    "preprocess.py": (
        # of all its commands
        "generation/preprocess_text.py generation/ode_pairs.py tasks/preprocess_video.py tasks/video_command.py"
    ),
    "evaluate.py": "evaluation/command.py",
    "export.py": "generation/export.py",
    "import_recipe.py": "import_recipe.py",
    "benchmarks.train_step": "benchmarks/train_step.py",
    "benchmarks.streaming": "benchmarks/streaming.py",
    "benchmarks.attention": "benchmarks/attention.py",
    "benchmarks.scaling": "benchmarks/scaling.py",
    "scripts.report": "scripts/report.py",
    "scripts.methods": "scripts/methods.py",
    "scripts.shapes_teacher": "scripts/shapes_teacher.py",
    "scripts.tiny_models": "scripts/tiny_models.py",
    "tests.replay": "tests/replay.py",
}
OPTIONS_OF_OTHERS = {
    "torchrun": {"--standalone", "--nnodes", "--nproc_per_node", "--max_restarts"},
    "accelerate launch": {"--multi_gpu", "--cpu", "--num_processes"},
    "srun": {"--kill-on-bad-exit"},
    "ruff": {"--check"},
    "sbatch": {"--nodes", "--signal", "--partition", "--account", "--export", "--array", "--gpus"},
    "scancel": {"--signal", "--batch"},
    "docker": {
        *("--tag", "--file", "--build-arg", "--rm", "--gpus", "--shm-size", "--user", "--env", "--volume"),
        *("--interactive", "--tty"),
    },
    "apptainer": {"--nv", "--fakeroot"},
}
FENCE = re.compile(r"^```(\w*)(?: title=\S+)?\n(.*?)^```$", re.M | re.S)
COMMENT = re.compile(r"<!--.*?-->", re.S)


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def fences(text: str, language: str) -> list[str]:
    return [body for name, body in FENCE.findall(text) if name == language]


def spans(text: str) -> list[str]:
    """Inline code."""
    return re.findall(r"`([^`\n]+)`", COMMENT.sub("", FENCE.sub("", text)))


# ------------------------------------------------------------------------------------------------------ what there is


@cache
def words() -> frozenset[str]:
    """Every identifier in the project's sources, these tests left out."""
    files = [p for p in ROOT.glob("*/**/*.py") if p.relative_to(ROOT).parts[0] not in (".venv", "logs")]
    files += [*ROOT.glob("*.py"), *ROOT.glob("*.sh"), *ROOT.glob("slurm/*"), ROOT / "Makefile"]
    found: set[str] = set()
    for path in files:
        if path != Path(__file__).resolve():
            found |= set(re.findall(r"\w+", path.read_text(encoding="utf-8")))
    return frozenset(found)


@cache
def known_keys() -> frozenset[str]:
    return frozenset(key_paths(RunConfig))


def key_paths(schema: type, prefix: str = "") -> Iterator[str]:
    for key, hint in config_reference.hints(schema).items():
        yield prefix + key
        for option in config_reference.options(hint):
            if dataclasses.is_dataclass(option):
                yield from key_paths(option, f"{prefix}{key}.")  # type: ignore[arg-type]


@cache
def options(source: str) -> frozenset[str]:
    """Options that a file gives to argparse, or that tests.replay, which has no parser, looks for."""
    if source == "tests/replay.py":
        return frozenset({"--digest"}) if '"--digest" in arguments' in read(source) else frozenset()
    calls = (node for node in ast.walk(ast.parse(read(source))) if isinstance(node, ast.Call))
    return frozenset(
        arg.value
        for call in calls
        if isinstance(call.func, ast.Attribute) and call.func.attr == "add_argument"
        for arg in call.args
        if isinstance(arg, ast.Constant) and str(arg.value).startswith("--")
    )


@cache
def all_options() -> frozenset[str]:
    files = " ".join(PROGRAMS.values()).split()
    return frozenset({"--help"}).union(*map(options, files), *OPTIONS_OF_OTHERS.values())


def is_key(path: str) -> bool:
    """Whether the config takes this key. Where the schema lists no keys, the loader is asked, which refuses unknown ones."""
    if path in known_keys():
        return True
    nested: object = None
    for part in reversed(path.split(".")):
        nested = {part: nested}
    assert isinstance(nested, dict)
    try:
        run_from_plain(nested)
    except ConfigError as error:
        return "unknown key" not in str(error)
    return path.split(".")[0] in SECTIONS


def resolves(dotted: str) -> bool:
    """Whether `a.b.c` is a module, or something in one."""
    parts = dotted.split(".")
    for n in range(len(parts), 0, -1):
        name = ".".join(parts[:n])
        path = ROOT / Path(*parts[:n])
        if not (path.with_suffix(".py").is_file() or path.is_dir()):
            continue
        thing: object = importlib.import_module(name)
        for part in parts[n:]:
            if not hasattr(thing, part):
                return False
            thing = getattr(thing, part)
        return True
    return False


# -------------------------------------------------------------------------------------------------- what a span claims


def problem(span: str) -> str | None:
    """Why this piece of inline code is wrong, or None. Formulae (no path, key, option or name) are not judged."""
    if span in NEW_IN_AN_EXAMPLE | OF_OTHERS or span.startswith(MADE_BY_RUNS):
        return None
    if test := re.fullmatch(r"(tests/[\w/]+\.py)::(\w+)", span):
        exists = (ROOT / test[1]).is_file() and f"def {test[2]}(" in read(test[1])
        return None if exists else f"there is no test {span}"
    if target := re.fullmatch(r"make ([\w-]+)( .*)?", span):
        return None if re.search(rf"^{target[1]}:", read("Makefile"), re.M) else f"no target in the Makefile: {span}"
    unknown = [option for option in re.findall(r"(?<!\S)--[\w-]+", span) if option not in all_options()]
    if unknown:
        return f"no program has the option {unknown[0]}"
    if (span.startswith(("--", "torchrun ")) and " " in span) or span.startswith("python -m "):
        return command_problem(span)
    if "*" in span and "/" in span:
        return None if list(ROOT.glob(span)) else f"no file matches {span}"
    if re.fullmatch(rf"[\w.-]+(/[\w.-]+)*(/|\.({SUFFIXES}))|[\w.]+(/[\w.]+)+", span):
        return path_problem(span)
    key = re.fullmatch(r"([a-z_]+(?:\.[a-z_0-9]+)+)(?:(?:=|: ).+)?", span)
    if key and key[1].split(".")[0] in SECTIONS:
        return None if is_key(key[1]) else f"the config has no key {key[1]}"
    if key and resolves(key[1]):
        return None
    if re.fullmatch(r"[A-Za-z_]\w+(\.[A-Za-z_]\w*)+", span):  # Class.method, module.name
        parts = span.split(".")
        return None if all(part in words() for part in parts) else f"nothing is called {span}"
    if re.fullmatch(r"[A-Za-z_]\w{2,}(\(\))?", span):
        return None if span.removesuffix("()") in words() else f"nothing is called {span}"
    return None


def path_problem(path: str) -> str | None:
    if (ROOT / path).exists() or ("/" not in path and list((ROOT / "docs").rglob(path))):
        return None
    # a file that runs make is named in the code that makes it
    name = Path(path).name
    made = "/" not in path and any(f'"{name}"' in read(str(p.relative_to(ROOT))) for p in ROOT.glob("utils/*.py"))
    return None if made else f"there is no file {path}"


def command_problem(line: str) -> str | None:
    """Whether the programs, modules, files and options of a command line exist."""
    tokens = shlex.split(line, comments=True)
    program = next((name for name in PROGRAMS if name in tokens), None)
    allowed = set(OPTIONS_OF_OTHERS["torchrun"]) if "torchrun" in tokens else set()
    allowed |= set().union(*map(options, PROGRAMS[program].split())) if program else set()
    for before, token in zip(["", *tokens], tokens, strict=False):
        if before == "-m" and not resolves(token):
            return f"no module {token}"
        if program and token.startswith("--") and token not in ("--", *allowed) and token.split("=")[0] not in allowed:
            return f"{program} has no option {token}"
        if re.fullmatch(r"(configs|tests|scripts)/[\w./]+|\w+\.(py|sh)", token) and not (ROOT / token).exists():
            return f"there is no file {token}"
        if token.startswith("make ") or before == "make":
            return problem(f"make {token}")
        if (key := re.fullmatch(r"([a-z_.]+)=.*", token)) and program == "train.py" and not is_key(key[1]):
            return f"the config has no key {key[1]}"
    return launch_problem(tokens)


def launch_problem(tokens: list[str]) -> str | None:
    """Whether torchrun leaves a program its own options: it takes what begins as one of its own does for that."""
    if "torchrun" not in tokens:
        return None
    arguments = tokens[tokens.index("torchrun") + 1 :]
    if "..." in arguments:
        return None
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            found = get_args_parser().parse_args(arguments)
    except SystemExit:
        return "torchrun does not take this: put -- before the program"
    expected = arguments[arguments.index(found.training_script) + 1 :]
    return None if found.training_script_args == expected else f"torchrun keeps some of {expected} to itself"


# ---------------------------------------------------------------------------------------------------------- the tests


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_names_exists(page: str) -> None:
    assert [wrong for span in spans(read(page)) if (wrong := problem(span))] == []


def test_pages_name_things() -> None:
    """So that the test above has something to judge."""
    assert sum(len(spans(read(page))) for page in PAGES) > 800
    assert sum(bool(spans(read(page))) for page in PAGES) > 15


@pytest.mark.parametrize(
    "span",
    [
        "trainer/distil.py", "pipeline/*.yml", "tests/model/test_dmd.py::test_nothing", "make tests", "--config-file X",
        "--no-such", "schedule.ts_sched", "rollout.kinds: self_forcing", "utils.config.lode", "RunConfig.is_casual",
        "denoise_blocks", "python -m trainer.evaluat", "python evaluate.py --ruin x", "model/wan2/", "no.jsonl",
    ],
)  # fmt: skip
def test_a_wrong_name_is_found(span: str) -> None:
    assert problem(span)


def rows_without_test(text: str) -> list[str]:
    """Of the tables whose last column is called test, the rows that name none."""
    tables = re.findall(r"^\|[^\n]*\| test \|\n\|[-|]+\|\n((?:\|[^\n]*\n)+)", text, re.M)
    rows = [row for table in tables for row in table.splitlines()]
    return [row for row in rows if not re.search(r"`(tests/[\w/]+(\.py(::\w+)?)?|make \w+)`[^|]*\|$", row)]


@pytest.mark.parametrize("page", PAGES)
def test_each_row_that_is_to_name_a_test_does(page: str) -> None:
    assert rows_without_test(read(page)) == []


def test_a_row_without_a_test_is_found() -> None:
    head = "| names | test |\n|---|---|\n"
    assert rows_without_test(f"{head}| a | `tests/a.py::test_a` |\n| b | |\n") == ["| b | |"]


def commands(text: str) -> Iterator[str]:
    """Lines of shell examples. Those that quote an error are a test of their own."""
    for body in fences(text, "bash"):
        yield from (line for line in body.splitlines() if line.strip() and not line.startswith("#"))


@pytest.mark.parametrize("page", [page for page in PAGES if page != "docs/extending.md"])  # that one is carried out
def test_commands_name_programs_files_and_options_that_exist(page: str) -> None:
    assert [wrong for line in commands(read(page)) if (wrong := command_problem(line))] == []


def test_pages_have_commands() -> None:
    assert len([line for page in PAGES for line in commands(read(page))]) > 40


@pytest.mark.parametrize(
    "line",
    [
        "torchrun train.py --config x",
        "python inference.py --seeds 1",
        "torchrun train.py --config_path configs/toy/x.yaml",
        "make quikstart",
        "torchrun train.py --config_path configs/toy/teacher.yaml training.max_step=3",
    ],
)
def test_a_wrong_command_is_found(line: str) -> None:
    assert command_problem(line)


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="argparse asks later there whether an option is ambiguous")
def test_a_launch_that_torchrun_refuses_is_found() -> None:
    line = "torchrun --nproc_per_node 8 {}inference.py --run logs/wan"
    assert command_problem(line.format("")) == "torchrun does not take this: put -- before the program"
    assert command_problem(line.format("-- ")) is None


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as the site and code hosts make them."""
    heads = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.M)
    return {re.sub(r"[^\w -]", "", head).lower().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", [*PAGES, "LOG.md", "CHANGELOG.md"])
def test_links_lead_somewhere(page: str) -> None:
    here = ROOT / page
    wrong = []
    for link in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", read(page))):
        path, _, anchor = link.partition("#")
        target = here.parent / path if path else here
        if not link.startswith("https://") and not (target.exists() and (not anchor or anchor in anchors(target))):
            wrong.append(link)
    assert wrong == []


def test_every_page_is_in_the_site() -> None:
    nav = yaml.safe_load(read("mkdocs.yml"))["nav"]
    found = re.findall(r"[\w-]+\.md", str(nav))
    assert sorted(f"docs/{page}" for page in found) == SITE


def test_readme_is_short() -> None:
    assert len(read("README.md").splitlines()) <= 150


def test_the_configuration_reference_is_what_the_schema_says() -> None:
    assert config_reference.page() == read("docs/configuration.md"), "write it: python -m scripts.config_reference"


def test_every_key_is_in_the_configuration_reference() -> None:
    text = read("docs/configuration.md")
    keys = [key for key in known_keys() if key.count(".") < 2]
    assert len(keys) > 120
    assert [
        key
        for key in keys
        if not key.startswith(("teacher.", "critic.", "critic_training.")) and f"`{key}`" not in text
    ] == []


def test_a_docstring_is_read_by_key() -> None:
    @dataclasses.dataclass
    class Section:
        """What it is. one, two: these; three: that (see one: or two). four:
        a long line."""

        one: int = 0
        two: int = 0
        three: int = 0
        four: int = 0

    assert config_reference.meanings(Section) == (
        "What it is.",
        {"one": "These.", "two": "These.", "three": "That (see one: or two).", "four": "A long line."},
    )


@pytest.mark.parametrize("program", ["train.py", "inference.py", "demo.py", "evaluate.py", "export.py"])
def test_every_option_is_explained_on_some_page(program: str) -> None:
    """Options are written with _ or with -."""
    said = {option.replace("-", "_") for page in PAGES for option in re.findall(r"--[\w-]+", read(page))}
    known = {option.replace("-", "_") for file in PROGRAMS[program].split() for option in options(file)}
    assert len(known) > 5
    assert sorted(known - said) == []


def page_with(mark: str) -> str:
    """The text of the one page that holds `mark`."""
    (page,) = [page for page in PAGES if mark in read(page)]
    return read(page)


def test_yaml_examples_load(tmp_path: Path) -> None:
    examples = fences(page_with("```yaml\nname: my_student"), "yaml")
    shutil.copytree(ROOT / "configs/toy", tmp_path / "toy")
    configs = []
    for number, text in enumerate(examples):
        (tmp_path / f"toy/example_{number}.yaml").write_text(text, encoding="utf-8")
        configs.append(load_run(tmp_path / f"toy/example_{number}.yaml"))
    assert [config.name for config in configs] == ["my_student", "random_exit"]
    assert [config.rollout.last_step_only for config in configs] == [True, False]


def test_quoted_errors_are_what_is_said() -> None:
    block = fences(page_with("```console\n$ python train.py"), "console")[0].splitlines()
    assert len(block) >= 6
    for line, said in zip(block[::2], block[1::2], strict=True):
        args = train_args(shlex.split(line.removeprefix("$ python train.py ")))
        with pytest.raises(UserError) as error:
            load_run(ROOT / args.config_path, args.overrides)
        assert said == f"train.py: error: {error.value}"


def test_run_folder_is_as_drawn(tmp_path: Path) -> None:
    drawn = fences(page_with("<!-- run-folder -->").split("<!-- run-folder -->")[1], "")[0].splitlines()[1:]
    expected, folder = set(), ""
    for line in drawn:
        name, indent = line.split()[0], len(line) - len(line.lstrip())
        folder = folder if indent > 2 else ""
        if name.endswith("/"):
            folder = name
        expected.add(re.sub(r"\d{6,}", "N", folder + name if not name.endswith("/") else name))
    run = trainer(
        tmp_path, max_steps=2, schedule={"denoising_step_list": [1000]}, logging={"tensorboard": True},
        validation={"every": 2, "count": 1}, checkpoint={"every": 2}, ema={"start": 0},
    )  # fmt: skip
    run.train()
    made = {re.sub(r"\d{6,}", "N", p.relative_to(tmp_path).as_posix()) + "/" * p.is_dir() for p in tmp_path.rglob("*")}
    events = {name for name in made if name.startswith("tensorboard/") and name != "tensorboard/"}
    assert made - events - {"checkpoints/", "validation/"} == expected


def test_every_paper_in_the_code_and_the_status_table_is_cited() -> None:
    cited = set(re.findall(r"eprint = \{([\d.]+)\}", read("docs/papers.bib")))
    number = re.compile(r"(?<![\d.])(\d{4}\.\d{5})(?![\d.])")
    sources = [p for p in ROOT.glob("*/**/*.py") if p.relative_to(ROOT).parts[0] not in ("tests", ".venv", "logs")]
    in_code = {match for path in sources for match in number.findall(path.read_text(encoding="utf-8"))}
    table = read("docs/status.md")
    here = {match for row in table.splitlines() if "planned" not in row for match in number.findall(row)}
    assert len(in_code) > 8
    assert len(here) > 5
    assert (in_code | here) - cited == set()


def test_citation_file_has_what_the_format_asks_for() -> None:
    cff = yaml.safe_load(read("CITATION.cff"))
    assert {"cff-version", "message", "title", "authors"} <= cff.keys()
    assert cff["license"] == "Apache-2.0"
    for reference in cff["references"]:
        assert {"type", "title", "authors"} <= reference.keys()
        assert reference["title"] in read("docs/papers.bib")
        assert reference["url"].rsplit("/", 1)[1] in read("docs/papers.bib")


def test_log_is_one_dated_line_an_entry() -> None:
    entries = [line for line in read("LOG.md").splitlines() if line.startswith("-")]
    assert len(entries) > 5
    assert [line for line in entries if not re.match(r"- 20\d\d-\d\d-\d\d · .{20,}\.$", line)] == []


@pytest.mark.parametrize("page", PEOPLE)
def test_no_absolute_path_of_a_machine(page: str) -> None:
    assert absolute_paths(read(page)) == []


def absolute_paths(text: str) -> list[str]:
    return re.findall(r"(?<![\w./:~<*)\]}-])/[A-Za-z_]\w*/[\w./-]*|\b[A-Z]:\\\w+", text)


def test_absolute_paths_are_found() -> None:
    found: Callable[[str], list[str]] = absolute_paths
    assert found("see /data/runs/x and `/opt/a/b`, C:\\runs") == ["/data/runs/x", "/opt/a/b", "C:\\runs"]
    assert found("a/b/c, https://x.org/y/z, and/or, 1 / 2, <!-- /quickstart-table -->") == []
