"""What all ranks must have alike, compared before they begin, and what rank 0 does for all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence

from utils import distributed
from utils.errors import AgreedError, UserError

SHOWN = 80  # characters of a value
NAMED = 5  # values of one disagreement
ONE_COMMAND = "start all of them from one folder with one command"

Value = str | Sequence[str]


def require_agreement(values: Mapping[str, Value], remedy: str = ONE_COMMAND) -> None:
    """Compares values by name over all ranks; a collective.

    values: a text, or a list of texts, of which the first that differs is shown. What follows a NUL byte in a text is
        compared and not shown, such as a hash.
    remedy: what to do about a difference.

    Raises AgreedError, naming what differs, its values and whose they are.
    """
    if distributed.world_size() == 1:
        return
    mine = {name: _brief(value) for name, value in values.items()}
    if _alike(_digest(json.dumps(mine, sort_keys=True))):
        return
    theirs = [json.loads(text) for text in distributed.all_gather_long_text(json.dumps(mine))]
    names = dict.fromkeys(name for rank in theirs for name in rank)
    differing = [name for name in names if len({rank.get(name) for rank in theirs}) > 1]
    found = []
    for name in differing[:NAMED]:
        value = values.get(name)
        if isinstance(value, str) or any(name not in rank for rank in theirs):
            found.append(_said(name, [rank.get(name, "absent") for rank in theirs]))
        elif value is not None:
            found.append(_first_difference(name, value))
    if len(differing) > NAMED:
        found.append(f"and {len(differing) - NAMED} more")
    raise AgreedError(f"the ranks do not run the same: {'; '.join(found)}: {remedy}")


def _brief(value: Value) -> str:
    """What stands for a value where it is not known to differ."""
    return value if isinstance(value, str) else f"{len(value)} items\0{_digest(*value)}"


def _digest(*texts: str) -> str:
    """A hash of texts one after the other, and of where each ends."""
    digest = hashlib.sha256()
    for text in texts:
        raw = text.encode(errors="surrogatepass")
        digest.update(len(raw).to_bytes(8, "little") + raw)
    return digest.hexdigest()


def _alike(text: str) -> bool:
    """Whether a short text is the same on all ranks; a collective."""
    return len(set(distributed.all_gather_text(text))) == 1


def _first_difference(name: str, items: Sequence[str]) -> str:
    """A collective: all ranks have a list of this name. Halves the part in which the first difference lies."""
    lengths = {"shortest": float(len(items))}
    low, high = 0, int(distributed.all_reduce_scalars(lengths, "min")["shortest"])
    while low < high:  # items[:low] are alike
        middle = (low + high + 1) // 2
        if _alike(_digest(*items[low:middle])):
            low = middle
        else:
            high = middle - 1
    held = distributed.all_gather_long_text(items[low] if low < len(items) else "nothing")
    return _said(f"{name}, number {low + 1}", held)


def _said(name: str, of_ranks: Sequence[str]) -> str:
    shown = [text.partition("\0")[0] for text in of_ranks]
    if len(set(shown)) == 1:  # what differs is hidden
        whose = distributed.grouped(of_ranks, lambda number, _: "one" if number == 0 else "another")
        return f"{name} ({_cut(shown[0], 0)}) is not the same: {whose}"
    shortest = min(map(len, shown))
    begins = next((i for i in range(shortest) if len({text[i] for text in shown}) > 1), shortest)
    return f"{name} differs: {distributed.grouped([_cut(text, begins) for text in shown])}"


def _cut(text: str, begins: int) -> str:
    """The part of a long text in which the difference begins."""
    if len(text) <= SHOWN:
        return text
    first = max(0, begins - SHOWN // 4)
    before, after = "..." if first else "", "..." if first + SHOWN < len(text) else ""
    return f"{before}{text[first : first + SHOWN]}{after}"


def on_main(action: Callable[[], object]) -> None:
    """Done on rank 0 while the others wait; the UserError that it may raise is an AgreedError on every rank."""
    problem = ""
    try:
        if distributed.is_main():
            action()
    except UserError as error:
        problem = str(error)
    if problem := distributed.all_gather_text(problem, size=2048)[0]:
        raise AgreedError(problem)
