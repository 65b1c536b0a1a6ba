"""The tables of what a run must not be: every line begins with a key and has a remedy, and the shipped runs break none."""

from __future__ import annotations

import re

import pytest

from configs import rules
from configs.load import load_run
from configs.schema import RunConfig
from tests import ROOT
from utils.fields import field_types, section_type

RUN = load_run(ROOT / "configs/toy/self_forcing_dmd.yaml")


def lines() -> list[str]:
    """Every row's line, with the values of a run."""
    found = [rule.says.format(run=RUN) for rule in (*rules.DISTILLATION, *rules.OTHER_TRAINERS)]
    found += [rule.says.format(run=RUN, name="critic", net=RUN.critic) for rule in rules.NETWORKS]
    return found + [
        rule.says.format(run=RUN, section="critic_training", trained=RUN.critic_training) for rule in rules.OPTIMIZERS
    ]


@pytest.mark.parametrize("line", lines())
def test_a_line_begins_with_a_key_and_ends_with_a_remedy(line: str) -> None:
    key, schema = re.split(r"[ :]", line)[0], RunConfig
    for part in key.split("."):
        kinds = schema.variants().values() if hasattr(schema, "variants") else [schema]
        owner = next((kind for kind in kinds if part in field_types(kind)), None)
        assert owner is not None, f"{key}: no {part} in {schema.__name__}"
        schema = section_type(field_types(owner)[part]) or schema
    assert (
        re.search(r": (set|choose|give|leave|lower)\b", line)
        or line.endswith("where its interval starts")
        or "would" in line
    )
    assert "\n" not in line
    assert "{" not in line


def test_a_shipped_run_is_none_of_these() -> None:
    assert not any(rule.wrong(RUN) for rule in (*rules.DISTILLATION, *rules.OTHER_TRAINERS))
