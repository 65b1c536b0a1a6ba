"""What a visitor may say to the demo and how often, its limits, and its command line."""

from __future__ import annotations

import json
import random

import pytest

from serving.command import demo_args
from serving.limits import Limits
from serving.protocol import Rate, Shown, Start, Stop, Switch, parse, without_paths, without_prompt
from utils.errors import UserError

# ------------------------------------------------------------------------------------------------------- the messages


def test_messages() -> None:
    limits = Limits()
    assert parse('{"type": "start", "prompt": " a\\n cat "}', limits) == Start("a cat", None)
    assert parse('{"type": "start", "prompt": "<b>\\ud83d\\ude00", "seed": 7}', limits) == Start("<b>😀", 7)
    assert parse('{"type": "prompt", "prompt": "x"}', limits) == Switch("x")
    assert parse('{"type": "shown", "frames": 0}', limits) == Shown(0)
    assert parse('{"type": "stop"}', limits) == Stop()
    assert parse(json.dumps({"type": "start", "prompt": "😀" * 4000}), limits) == Start("😀" * 4000, None)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not a JSON object"),
        ("[1]", "not a JSON object"),
        ("null", "not a JSON object"),
        ("{", "not a JSON object"),
        ("[" * 48_000, "not a JSON object"),
        ('{"a":' * 9600, "not a JSON object"),
        ('{"type": "stop", "type": "stop"}', "not a JSON object"),
        ('{"type": "shown", "frames": NaN}', "not a JSON object"),
        ('{"type": "shown", "frames": ' + "9" * 48_000 + "}", "not a JSON object"),
        ("{}", "its type has to be one of start, prompt, shown, stop"),
        ('{"type": ["stop"]}', "its type has to be"),
        ('{"type": "load"}', "its type has to be"),
        ('{"type": "stop", "path": "/etc/passwd"}', "stop takes nothing, and no other key"),
        ('{"type": "start", "prompt": "x", "run": "y"}', "start takes prompt and seed"),
        ('{"type": "start"}', "prompt: type a text"),
        ('{"type": "start", "prompt": 3}', "prompt: type a text"),
        ('{"type": "prompt", "prompt": " \\n "}', "prompt: type a text"),
        ('{"type": "prompt", "prompt": "' + "x" * 4001 + '"}', "4001 characters: 4000 are the most"),
        ('{"type": "prompt", "prompt": "a\\u0000b"}', "control characters"),
        ('{"type": "prompt", "prompt": "\\ud83d"}', "control characters"),
        ('{"type": "start", "prompt": "x", "seed": -1}', "seed: give a whole number from 0 to 2147483647"),
        ('{"type": "start", "prompt": "x", "seed": true}', "seed: give a whole number"),
        ('{"type": "start", "prompt": "x", "seed": 1.0}', "seed: give a whole number"),
        ('{"type": "shown"}', "frames: give a whole number from 0 to 600"),
        ('{"type": "shown", "frames": 601}', "frames: give a whole number"),
    ],
)  # fmt: skip
def test_a_wrong_message_is_one_line(text: str, said: str) -> None:
    with pytest.raises(ValueError) as error:
        parse(text, Limits())
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 150


def test_whatever_is_sent_is_understood_or_refused() -> None:
    draw = random.Random(0)
    words = [
        '{"type":',
        '"start"',
        '"prompt"',
        ":",
        ",",
        "}",
        "{",
        "[",
        "]",
        "-1",
        "1e999",
        '"seed"',
        "\\u0000",
        "é",
        '"',
    ]
    for _ in range(3000):
        text = "".join(draw.choices(words, k=draw.randrange(1, 12)))
        try:
            parse(text, Limits())
        except ValueError as error:
            assert "\n" not in str(error)


def test_rate_is_an_average_with_a_burst() -> None:
    now = [0.0]
    rate = Rate(10, clock=lambda: now[0])
    assert [rate.allows() for _ in range(21)] == [True] * 20 + [False]
    now[0] = 0.5
    assert [rate.allows() for _ in range(5)] == [True] * 4 + [False]  # the refused one counted too


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"users": 0}, "--users 0: give a number of at least 1"),
        ({"waiting": -1}, "--waiting -1: give a number of at least 0"),
        ({"prompt_chars": 5000}, "--message_bytes 49152: --prompt_chars 5000 may take 60256"),
        ({"users": 60}, "--connections 64: --users and --waiting need 68"),
    ],
)
def test_limits_that_make_no_sense(changes: dict[str, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Limits(**changes)


@pytest.mark.parametrize(
    ("problem", "said"),
    [
        (UserError("prompt 'a/b':\n unknown word"), "prompt 'a/b': unknown word"),
        (UserError("prompt 'a/b' is not in the text cache /srv/my cache: add it"), None),
        (UserError("prompt 'a/b' is not in the text cache logs/cache: add it"), None),
        (OSError(2, "No such file", "here"), None),
    ],
)
def test_an_error_is_told_without_paths(problem: Exception, said: str | None) -> None:
    assert without_paths(problem, "a/b") == said


@pytest.mark.parametrize("prompt", ["/", "a", "it's / here", "long " * 20])
def test_a_prompt_is_left_out_and_hides_no_path(prompt: str) -> None:
    problem = UserError(f"data: prompt {prompt[:60]!r} is not in the text cache /srv/a/text: add it")
    assert without_paths(problem, prompt) is None
    assert without_prompt(problem, prompt) == "data: prompt '…' is not in the text cache /srv/a/text: add it"


# ------------------------------------------------------------------------------------------------------ the command line


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("", "one of the arguments --run --checkpoint --model is required"),
        ("--run x --users 0", "--users 0: give a number of at least 1"),
        ("--run x --fps 0", "--fps 0: give a number from 1 to 120"),
        ("--run x --port 70000", "--port 70000: give a number from 0 to 65535"),
        ("--run x --prompt_chars 5000", "--message_bytes 49152: --prompt_chars 5000 may take 60256"),
        ("--run x --frame 3", "unknown option --frame"),
    ],
)
def test_wrong_options_are_one_line(options: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        demo_args(options.split())
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_options_reach_what_they_are_for() -> None:
    args = demo_args(
        [
            "--checkpoint",
            "c",
            "--steps",
            "2",
            "--window",
            "9",
            "--sinks",
            "3",
            "--noisy_context",
            "--users",
            "2",
            "--max_frames",
            "99",
            "--seed",
            "5",
        ]
    )
    sampling = args.sampling(7)
    assert (sampling.steps, sampling.window, sampling.sinks, sampling.noisy_context, sampling.seed) == (
        2,
        9,
        3,
        True,
        7,
    )
    assert args.limits == Limits(users=2, max_frames=99)
    assert args.host == "127.0.0.1"
    assert args.seed == 5
