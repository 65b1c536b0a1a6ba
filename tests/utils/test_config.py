"""utils.config and utils.cli: what is accepted, and that each mistake ends in one line with path, value and remedy."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from hashlib import sha256
from itertools import product
from pathlib import Path
from typing import Any, Literal

import pytest

from trainer import command
from utils import cli, compared, config
from utils.errors import ConfigError, UserError
from utils.fields import check_modes
from utils.variants import check_kinds


class Kind(Enum):
    DMD = "dmd"
    SID = "sid"


@dataclass
class Optimizer:
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)
    fused: bool = False

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"lr={self.lr} is not positive: give a number above 0")


@dataclass
class Head:
    layer: int = 0


@dataclass
class Demanding:
    name: str | None
    a: int = 0


@dataclass
class Net:
    optimizer: Optimizer = field(default_factory=Optimizer)
    steps: list[int] = field(default_factory=lambda: [1000, 500])


@dataclass
class Schema:
    data: str = "toy"
    student: Net = field(default_factory=Net)
    critic: Net = field(default_factory=Net)
    kind: Kind = Kind.DMD
    gan: Optimizer | None = None
    heads: list[Head] = field(default_factory=list)
    weights: dict[str, float] = field(default_factory=dict)
    backend: Literal["sdpa", "flex"] = "sdpa"
    seed: int = 0
    window: int | None = None
    names: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.seed == 13:
            raise ValueError("seed: 13 with window is impossible:\n  give another")


def read(tmp_path: Path, text: str, *overrides: str) -> Schema:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return config.load(Schema, path, overrides)


def test_yaml_base_and_overrides_merge_in_this_order(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "base.yaml").write_text("data: base\nseed: 1\nstudent: {optimizer: {lr: 1e-3, fused: yes}, steps: [3]}")
    (tmp_path / "middle.yaml").write_text("base: base.yaml\nseed: 2\nwindow: 5")
    path = tmp_path / "folder" / "run.yaml"
    path.write_text("base: ../middle.yaml\nkind: sid\nstudent: {optimizer: {lr: 2e-3}}\nweights: {a: 1}")
    loaded = config.load(Schema, path, ["seed=4", "student.steps=[8,7]", "gan.lr=1", "weights.b=2", "window=null"])
    assert loaded == Schema(
        data="base",
        seed=4,
        kind=Kind.SID,
        student=Net(Optimizer(lr=2e-3, fused=True), [8, 7]),
        gan=Optimizer(lr=1.0),
        weights={"a": 1.0, "b": 2.0},
    )
    assert isinstance(loaded.student.optimizer.betas, tuple)


def test_an_overlay_changes_what_is_there_and_adds_no_section(tmp_path: Path) -> None:
    """Overlays lie in their order over the file, and all key=value over them, wherever they stand."""
    (tmp_path / "run.yaml").write_text("gan: {lr: 0.5}\nstudent: {optimizer: {lr: 1.0}}\nwindow: 3\n")
    (tmp_path / "bare.yaml").write_text("gan: null\n")
    (tmp_path / "below.yaml").write_text("seed: 1\nwindow: 4\n")
    (tmp_path / "tiny.yaml").write_text("base: below.yaml\ngan: {fused: true}\nseed: 2\ncritic: {steps: [7]}\n")
    (tmp_path / "other.yaml").write_text("seed: 3\n")

    def loaded(name: str, *overrides: str) -> Schema:
        paths = [str(tmp_path / text) if text.endswith(".yaml") else text for text in overrides]
        return config.load(Schema, tmp_path / name, paths)

    full = loaded("run.yaml", "seed=5", "tiny.yaml")
    assert full.gan == Optimizer(lr=0.5, fused=True)
    assert (full.seed, full.window, full.critic.steps, full.student.optimizer.lr) == (5, 4, [7], 1.0)
    for name in ("run.yaml", "bare.yaml"):
        assert [loaded(name, "tiny.yaml", "other.yaml").seed, loaded(name, "other.yaml", "tiny.yaml").seed] == [3, 2]
    assert loaded("bare.yaml", "tiny.yaml").gan is None
    (tmp_path / "bare.yaml").write_text("seed: 0\n")  # its default is none, too
    assert loaded("bare.yaml", "tiny.yaml").gan is None
    assert loaded("bare.yaml", "tiny.yaml", "gan.lr=2").gan == Optimizer(lr=2)
    with pytest.raises(ConfigError, match="gone.yaml' does not exist"):
        loaded("run.yaml", "gone.yaml")
    (tmp_path / "wrong.yaml").write_text("gan: {rate: 1}\n")
    with pytest.raises(ConfigError, match="gan.rate: unknown key"):
        loaded("run.yaml", "wrong.yaml")


def test_sections_in_lists_and_interpolation(tmp_path: Path) -> None:
    loaded = read(tmp_path, "data: x\nseed: 7\nwindow: ${seed}\nheads: [{layer: 2}, {}]")
    assert loaded.heads == [Head(2), Head(0)]
    assert loaded.window == 7


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("a cat #1", "a cat #1"),
        ("#1 cat", "#1 cat"),
        ("-cat #1", "-cat #1"),
        ("it's #1", "it's #1"),
        ('"a cat #1"', "a cat #1"),
        ("'a cat'  # a comment", "a cat"),
        ('"no"', "no"),
        ("2020-01-01", "2020-01-01"),
        (r"a \${seed} #1", "a ${seed} #1"),
    ],
)
def test_a_text_on_the_command_line_is_what_it_says(tmp_path: Path, text: str, meant: str) -> None:
    assert read(tmp_path, "", f"data={text}").data == meant


def test_any_text_is_saved_and_read_again(tmp_path: Path) -> None:
    """Whatever stands for something else in YAML or in a reference, and every four of these parts in a row."""
    parts = ("\\", "${", "}", "seed", ":")
    texts = ["no", "010", "12:30:45", "1e3", "a #1", "~", "a: b", "\n\t", *map("".join, product(parts, repeat=4))]
    assert config.from_plain(Schema, config.to_plain(Schema(names=texts))).names == texts
    config.save(Schema(names=texts), tmp_path / "saved.yaml")
    assert config.load(Schema, tmp_path / "saved.yaml").names == texts
    text = Schema(data="costs ${seed}")
    config.save(text, tmp_path / "saved.yaml")
    assert config.load(Schema, tmp_path / "saved.yaml") == text


# text of the YAML, overrides, what the line must have: key path, value, remedy
MISTAKES = [
    ("student: {optimizer: {lrr: 3}}", [], ["student.optimizer.lrr:", "3", "did you mean 'student.optimizer.lr'?"]),
    ("lr: 3", [], ["lr:", "student.optimizer.lr, critic.optimizer.lr, gan.lr"]),
    ("xyzzy: 3", [], ["xyzzy:", "data, student, critic, kind"]),
    ("1: 2", [], ["1:", "unknown key"]),
    ("critic: {optimizer: {lr: fast}}", [], ["critic.optimizer.lr:", "'fast'", "give a number"]),
    ("seed: 2.5", [], ["seed:", "2.5", "give a whole number"]),
    ("critic: {optimizer: {lr: nan}}", [], ["critic.optimizer.lr:", "'nan'", "give a number that is finite"]),
    ("student: {optimizer: {betas: [0.9, .inf]}}", [], ["student.optimizer.betas[1]:", "inf", "that is finite"]),
    (
        "critic: '${student}'",
        ["critic.steps=[1]"],
        ["critic:", "${student} stands for a whole section", "write the section"],
    ),
    ("seed: [1, 2]", [], ["seed:", "[1, 2]", "give a whole number"]),
    ("seed: {a: 1}", [], ["seed:", "{'a': 1}", "give a whole number"]),
    ("seed: null", [], ["seed:", "None", "give a whole number"]),
    ("window: wide", [], ["window:", "'wide'", "give a whole number or null"]),
    ("data: [a]", [], ["data:", "['a']", "give text"]),
    ("student: 3", [], ["student:", "3", "give a section with keys optimizer, steps"]),
    ("student: [1]", [], ["student:", "[1]", "give a section with keys optimizer, steps"]),
    ("student: null", [], ["student:", "None", "give a section"]),
    ("student: {steps: 3}", [], ["student.steps:", "3", "give a list, each item a whole number"]),
    ("student: {steps: [1, b]}", [], ["student.steps:", "[1, 'b']", "each item a whole number"]),
    ("student: {optimizer: {betas: [1]}}", [], ["student.optimizer.betas:", "[1]", "list of 2 values"]),
    ("student: {optimizer: {fused: maybe}}", [], ["student.optimizer.fused:", "'maybe'", "give true or false"]),
    ("kind: did", [], ["kind:", "'did'", "allowed: one of dmd, sid"]),
    ("kind: false", [], ["kind:", "False", "give one of dmd, sid", "quotes"]),
    ("backend: cudnn", [], ["backend:", "'cudnn'", "give one of sdpa, flex"]),
    ("weights: {a: b}", [], ["weights:", "{'a': 'b'}", "each value a number"]),
    ("heads: [{layer: 1}, {layr: 2}]", [], ["heads[1].layr:", "2", "did you mean 'heads[1].layer'?"]),
    ("heads: [{layer: x}]", [], ["heads[0].layer:", "'x'", "give a whole number"]),
    ("heads: [3]", [], ["heads:", "[3]", "each item a section with keys layer"]),
    ("window: ${sed}", [], ["window:", "sed", "name an existing key"]),
    ("window: ${seed", [], ["window:", "close the ${...}", r"write \${"]),
    ("data: a ${seat} by", [], ["data:", "'a ${seat} by'", "name an existing key", r"write \${"]),
    ("data: a ${5:00} fee", [], ["data:", "close the ${...}", r"write \${"]),
    (r"data: a \\${oc.env:HOME}", [], ["data:", "calls oc.env", "HOME is of this machine's environment"]),
    ("", ["data=a ${ cat"], ["data:", "'a ${ cat'", r"write \${"]),
    *((f"data: {bare}", [], ["data:", "give text, in quotes"]) for bare in ("no", "1e3", "0x1F")),
    *(
        (f"{key}: {bare}", [], ["line 1: ", f"{bare} is the number {number} in YAML: write {number}, or quote it"])
        for key in ("data", "seed")
        for bare, number in {"010": 8, "-007": -7, "12:30:45": 45045, "16:9": 969}.items()
    ),
    ("", ["seed=010"], ["seed=010", "is the number 8 in YAML"]),
    ("names: [cat, off]", [], ["names[1]:", "False", "give text, in quotes"]),
    ("data:", [], ["data:", "None", 'give text (the empty one is ""']),
    ("", ["data=no"], ["data:", "False", """on a command line data='"..."'"""]),
    ("critic: {optimizer: {lr: -1}}", [], ["critic.optimizer.lr=-1.0 is not positive: give a number above 0"]),
    ("gan: {lr: -1}", [], ["gan.lr=-1.0 is not positive"]),
    ("seed: 13", [], ["seed: 13 with window is impossible: give another"]),
    ("student:\n  steps: [1,\nseed: 3", [], ["run.yaml, line 4", "not valid YAML"]),
    ("seed: 1\nseed: 2", [], ["run.yaml, line 2", "duplicate key seed"]),
    ("a: 1\n\tb: 2", [], ["run.yaml, line 2", "tab"]),
    ("- 1", [], ["run.yaml", "holds a list", "key: value"]),
    ("3", [], ["run.yaml", "int", "key: value"]),
    ("base: [a]", [], ["base:", "['a']", "relative to this one"]),
    ("base: other.yml", [], ["base:", "'other.yml'", "run.yaml"]),
    ("base: run.yaml", [], ["base:", "cycle", "run.yaml -> run.yaml"]),
    ("", ["seed"], ["'seed'", "key=value"]),
    ("", ["=3"], ["'=3'", "key=value"]),
    ("", ["student..lr=3"], ["'student..lr=3'", "key=value"]),
    ("", ["student.steps=[1,2"], ["student.steps:", "'[1,2'", "close its brackets"]),
    ("", ["critic.optimizer.lr=x"], ["critic.optimizer.lr:", "'x'", "give a number"]),
    ("", ["student.optimiser.lr=1"], ["student.optimiser:", "did you mean 'student.optimizer'?"]),
    ("", ["student.steps.0=1"], ["student.steps:", "{'0': 1}", "give a list"]),
]


@pytest.mark.parametrize(("text", "overrides", "needles"), MISTAKES, ids=[f"{t}{o or ''}" for t, o, _ in MISTAKES])
def test_a_mistake_is_one_line_with_path_value_and_remedy(
    tmp_path: Path, text: str, overrides: list[str], needles: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text, *overrides)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 300 + len(str(tmp_path)) * 2
    for needle in needles:
        assert needle in message


def test_mandatory_key_and_missing_file(tmp_path: Path) -> None:
    @dataclass
    class Mandatory:
        data: Demanding

    (tmp_path / "run.yaml").write_text("data: {a: 1}")
    with pytest.raises(ConfigError, match="^data.name: has no value and no default: give text or null$"):
        config.load(Mandatory, tmp_path / "run.yaml")
    with pytest.raises(ConfigError, match=r"'.*/rum.yaml' does not exist \(did you mean '.*/run.yaml'\?\)"):
        config.load(Schema, tmp_path / "rum.yaml")
    with pytest.raises(ConfigError, match=r"does not exist \('.*' holds .*\)"):
        config.load(Schema, tmp_path / "nowhere" / "run.yaml")


def test_a_longer_cycle_of_bases_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("base: b.yaml")
    (tmp_path / "b.yaml").write_text("base: a.yaml")
    with pytest.raises(ConfigError, match=r"cycle a.yaml -> b.yaml -> a.yaml"):
        config.load(Schema, tmp_path / "a.yaml")


def test_a_defect_in_post_init_is_not_dressed_up_as_a_user_error(tmp_path: Path) -> None:
    @dataclass
    class Broken:
        seed: int = 0

        def __post_init__(self) -> None:
            raise ZeroDivisionError

    (tmp_path / "run.yaml").write_text("seed: 1")
    with pytest.raises(ZeroDivisionError):
        config.load(Broken, tmp_path / "run.yaml")


ODD = Schema(
    data="a: [odd] 1e-4 'text'\nüñ",
    kind=Kind.SID,
    gan=Optimizer(lr=1e-05, betas=(0.1, 1 / 3)),
    heads=[Head(3)],
    weights={"a b": 0.1},
    window=4,
)


def test_saved_config_reads_back_equal(tmp_path: Path) -> None:
    config.save(ODD, tmp_path / "new" / "c.yaml")
    again = config.load(Schema, tmp_path / "new" / "c.yaml")
    assert again == ODD
    assert config.from_plain(Schema, config.to_plain(ODD)) == ODD
    assert compared.config_hash(again) == compared.config_hash(ODD)
    assert "kind: sid" in config.to_yaml(ODD)


def test_from_plain_checks_as_load_does() -> None:
    with pytest.raises(ConfigError, match="^student.optimizer.lr: 'x' is not allowed: give a number$"):
        config.from_plain(Schema, {"data": "", "student": {"optimizer": {"lr": "x"}}})


def test_hash_is_pinned_and_blind_to_the_order_of_keys() -> None:
    pinned = sha256(b'{"a":1,"b":{"c":2.5}}').hexdigest()
    assert compared.config_hash({"a": 1, "b": {"c": 2.5}}) == compared.config_hash({"b": {"c": 2.5}, "a": 1}) == pinned
    assert compared.config_hash({"a": 1, "b": {"c": 2.25}}) != pinned


def test_diff_names_what_differs() -> None:
    other = replace(ODD, seed=5, gan=Optimizer(lr=2.0, betas=(0.1, 1 / 3)), student=Net(steps=[1]))
    assert compared.diff(ODD, other) == ["gan.lr", "seed", "student.steps"]
    assert compared.diff(ODD, config.to_plain(ODD)) == []
    assert compared.diff(Schema("x"), Schema("x", gan=Optimizer())) == ["gan", "gan.betas", "gan.fused", "gan.lr"]


# ---------------------------------------------------------------------------------------------- sections with kinds


@dataclass
class Shape:
    kind: str = "circle"
    colour: str = "red"

    @classmethod
    def variants(cls) -> Mapping[str, type[Shape]]:
        return {"circle": Circle, "square": Square}


@dataclass
class Circle(Shape):
    radius: float = 1.0


@dataclass
class Square(Shape):
    kind: str = "square"
    side: float = 1.0
    border: Optimizer = field(default_factory=Optimizer)


@dataclass
class Sized:
    """What was a circle becomes a square around it."""

    kind: str = "circle"
    colour: str = "red"

    @classmethod
    def variants(cls) -> Mapping[str, type[Sized]]:
        return {"circle": SizedCircle, "square": SizedSquare}

    @staticmethod
    def switched(values: Mapping[Any, Any], kind: str) -> dict[Any, Any]:
        return {**values, "side": 2 * values["radius"]} if kind == "square" and "radius" in values else {**values}


@dataclass
class SizedCircle(Sized):
    radius: float = 1.0


@dataclass
class SizedSquare(Sized):
    kind: str = "square"
    side: float = 1.0


@dataclass
class Drawing:
    first: Shape = field(default_factory=Circle)
    second: Sized = field(default_factory=SizedCircle)
    kind: Kind | None = None


def draw(tmp_path: Path, layers: list[str], *overrides: str) -> Drawing:
    for number, text in enumerate(layers):
        below = f"base: {number - 1}.yaml\n" if number else ""
        (tmp_path / f"{number}.yaml").write_text(below + text)
    return config.load(Drawing, tmp_path / f"{len(layers) - 1}.yaml", overrides)


CIRCLE = "first: {kind: circle, radius: 3, colour: blue}"


def test_a_layer_that_changes_the_kind_drops_what_was_the_other_kinds(tmp_path: Path) -> None:
    assert draw(tmp_path, [CIRCLE]).first == Circle(colour="blue", radius=3.0)
    assert draw(tmp_path, [CIRCLE, "first: {kind: square, side: 2}"]).first == Square(colour="blue", side=2.0)
    assert draw(tmp_path, [CIRCLE], "first.kind=square").first == Square(colour="blue")
    assert draw(tmp_path, ["first: {radius: 3}", "first: {kind: square}"]).first == Square()  # a circle by default
    again = draw(tmp_path, [CIRCLE, "first: {kind: square, border: {lr: 2}}", "first: {border: {fused: true}}"])
    assert again.first == Square(colour="blue", border=Optimizer(lr=2.0, fused=True))
    back = draw(tmp_path, [CIRCLE, "first: {kind: square}", "first: {kind: circle}"])
    assert back.first == Circle(colour="blue")  # what was dropped stays so


@pytest.mark.parametrize(
    ("layers", "overrides", "key"),
    [
        ([CIRCLE, "first: {kind: square, radius: 4}"], [], "first.radius=4: radius is not for kind square"),
        ([CIRCLE], ["first.radius=4", "first.kind=square"], "first.radius=4: radius is not for kind square"),
        ([CIRCLE, "first: {kind: square}"], ["first.radius=4"], "first.radius=4: radius is not for kind square"),
        (["first: {kind: circle, side: 4}", "first: {colour: red}"], [], "leave it out, or choose square"),
        (["first: {radios: 4}", "first: {kind: square}"], [], "first.radios: unknown key"),
        ([CIRCLE, "first: {kind: squire}"], [], "did you mean 'square'?"),
        ([CIRCLE, "first: {kind: [square]}"], [], "first.kind: ['square'] is not allowed"),
    ],
)
def test_what_a_layer_says_beside_its_kind_is_kept_and_refused(
    tmp_path: Path, layers: list[str], overrides: list[str], key: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        draw(tmp_path, layers, *overrides)
    assert key in str(caught.value)


def test_a_section_may_translate_what_was_the_other_kinds(tmp_path: Path) -> None:
    below = "second: {radius: 3, colour: blue}"
    assert draw(tmp_path, [below, "second: {kind: square}"]).second == SizedSquare(colour="blue", side=6.0)
    assert draw(tmp_path, [below, "second: {kind: square, side: 5}"]).second == SizedSquare(colour="blue", side=5.0)


def test_what_was_saved_with_the_keys_of_all_kinds_is_read() -> None:
    saved = {"first": {"kind": "circle", "radius": 3.0, "side": 4.0, "border": {"lr": 9.0}}}
    assert config.from_plain(Drawing, saved, other_kinds="dropped").first == Circle(radius=3.0)
    with pytest.raises(ConfigError, match="^first.side=4.0: side is not for kind circle: leave it out, or choose sq"):
        config.from_plain(Drawing, saved)
    with pytest.raises(ConfigError, match="^first.sight: unknown key"):
        config.from_plain(Drawing, {"first": {"sight": 4.0}}, other_kinds="dropped")


def test_sections_and_modes_made_in_python_are_refused_too() -> None:
    check_kinds(Drawing(Square()))
    for drawing, message in (
        (Drawing(Shape()), "first: a Shape is no config of kind circle: choose Circle"),
        (Drawing(replace(Square(), kind="circle")), "first: a Square is no config of kind circle: choose Circle"),
        (Drawing(Circle(kind="squire")), "first: kind 'squire' is unknown: choose circle, square"),
    ):
        with pytest.raises(ValueError, match=f"^{message}$"):
            check_kinds(drawing)
    drawing = Drawing(kind="sid")  # type: ignore[arg-type]
    check_modes(drawing)
    assert drawing.kind is Kind.SID
    with pytest.raises(ValueError, match="^kind 'did' is unknown: choose dmd or sid, or null$"):
        check_modes(Drawing(kind="did"))  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------- command line


def test_overrides_may_stand_anywhere() -> None:
    args = command.train_args(
        ["a=1", "--config_path", "configs/toy/teacher.yaml", "b.c=[1,2]", "--max_steps", "5", "--no_save", "d==x"]
    )
    assert args == command.TrainArgs(
        config_path=Path("configs/toy/teacher.yaml"),
        overrides=("a=1", "b.c=[1,2]", "d==x"),
        logdir=Path("logs/toy/teacher"),
        resume="auto",
        max_steps=5,
        wandb=True,
        save=False,
        visualize=True,
        print_config=False,
        plan=None,
    )


def test_switches() -> None:
    args = command.train_args(
        [
            "--config_path",
            "x.yaml",
            "--logdir",
            "d",
            "--resume",
            "never",
            "--disable-wandb",
            "--no_visualize",
            "--print_config",
        ]
    )
    assert (args.logdir, args.resume, args.save) == (Path("d"), "never", True)
    assert (args.wandb, args.visualize, args.print_config, args.max_steps) == (False, False, True, None)


@pytest.mark.parametrize(
    ("argv", "needles"),
    [
        ("", ["--config_path", "required"]),
        ("--config_path x --no_sav", ["--no_sav", "did you mean --no_save?"]),
        ("--config_path x --local_rank=1", ["--local_rank 1 is a launcher's, and LOCAL_RANK is not set to it"]),
        ("--config_path x --max_steps 0", ["--max_steps", "'0'", "at least 1"]),
        ("--config_path x --max_steps", ["--max_steps"]),
        ("--config_path x --quux", ["--quux", "--help"]),
    ],
)
def test_wrong_options_are_one_line(argv: str, needles: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        command.train_args(argv.split())
    assert "\n" not in str(caught.value)
    for needle in needles:
        assert needle in str(caught.value)


def exit_code(main: Callable[[], int | None]) -> int | str | None:
    with pytest.raises(SystemExit) as caught:
        cli.run_cli(main)
    return caught.value.code


def refuse() -> None:
    raise UserError("lr: 3\n is wrong")


def test_a_user_error_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/train.py"])
    assert exit_code(refuse) == 2
    assert capsys.readouterr() == ("", "train.py: error: lr: 3 is wrong\n")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(cli, "SAME_ERROR_SECONDS", 0.0)
    assert exit_code(refuse) == 2
    assert capsys.readouterr() == ("", "train.py: error: rank 1: lr: 3 is wrong\n")


def test_programs_of_one_process_refuse_several(monkeypatch: pytest.MonkeyPatch) -> None:
    cli.refuse_several_ranks("inference.py")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"^inference.py runs as one process and was started as 2: .*without torchrun$"):
        cli.refuse_several_ranks("inference.py")


def test_run_cli_passes_on_return_values_and_our_own_defects() -> None:
    assert exit_code(lambda: None) == 0
    assert exit_code(lambda: 3) == 3
    with pytest.raises(ValueError, match="^ours$"):
        cli.run_cli(lambda: _raise(ValueError("ours")))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.ENAMETOOLONG, errno.EACCES, errno.EDQUOT])
def test_what_a_disk_refuses_is_no_defect_of_ours(
    number: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py"])
    assert exit_code(lambda: _raise(OSError(number, os.strerror(number), "/data/x"))) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"train.py: error: /data/x: {os.strerror(number)}: ") and said.count("\n") == 1
    with pytest.raises(FileNotFoundError):
        cli.run_cli(lambda: _raise(FileNotFoundError(errno.ENOENT, "no such file", "/data/x")))


def test_a_launchers_folder_that_is_full_changes_no_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EXIT_CODES", str(tmp_path / "absent"))
    assert exit_code(refuse) == 2
    assert exit_code(lambda: 0) == 0
    assert "absent" in capsys.readouterr().err


def _raise(error: Exception) -> int:
    raise error
