"""Whether two configs are the same, and in which keys they differ."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

from utils.config import to_plain
from utils.fields import SHOWN


def config_hash(config: Any) -> str:
    """sha256 (hex) of the canonical form: equal for equal configs, whatever the process or the order of keys."""
    canonical = json.dumps(to_plain(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def diff(a: Any, b: Any) -> list[str]:
    """Key paths, sorted, whose values differ between two configs (dataclasses or what ``to_plain`` made of them)."""
    flat_a, flat_b = dict(_flatten(to_plain(a))), dict(_flatten(to_plain(b)))
    absent = object()
    keys = flat_a.keys() | flat_b.keys()
    return sorted(key for key in keys if flat_a.get(key, absent) != flat_b.get(key, absent))


def differences(theirs: Any, ours: Any, keys: Sequence[str] | None = None) -> list[str]:
    """`key is 1 there and 2 here`, for each of `diff`'s keys that lies in one of `keys`, None for all."""
    flat = [dict(_flatten(to_plain(config))) for config in (theirs, ours)]
    shown = {
        key: [json.dumps(values[key], default=str)[:SHOWN] if key in values else "absent" for values in flat]
        for key in diff(theirs, ours)
    }
    chosen = [key for key in shown if keys is None or any(f"{key}.".startswith(f"{wanted}.") for wanted in keys)]
    return [f"{key} is {shown[key][0]} there and {shown[key][1]} here" for key in chosen]


def leaves(config: Any) -> dict[str, str]:
    """Each value of a config as JSON, by its key path."""
    return {key: json.dumps(value, default=str) for key, value in _flatten(to_plain(config))}


def _flatten(plain: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(plain, dict) or not plain:
        yield path, plain
        return
    for key, value in plain.items():
        yield from _flatten(value, f"{path}.{key}" if path else str(key))
