"""Configs that are Python, read as syntax and never run: plain assignments to `config.a.b`, as FastGen has them."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from utils.errors import ConfigError

ROOT = "config"


class Code(str):
    """A value that a file computes, as its text: it says nothing, for it is never run."""


PROGRAM = "method"  # what a file builds on: the module of `create_config`, or the class that it names


def python_options(text: str, path: Path) -> dict[str, Any]:
    """The values that a config's `create_config` assigns, by their names behind `config.`.

    A value is a literal, arithmetic on literals, or a name, which becomes that name as text; anything else is computed,
    and becomes Code. The module whose `create_config` the file calls is the option `method`. Raises ConfigError at the
    first line that is no assignment, for what it does is not known.
    """
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ConfigError(f"{path}: not Python that can be read ({error or 'it is nested too deep'}): fix it") from None
    function = next((n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "create_config"), None)
    if function is None:
        raise ConfigError(f"{path}: has no function create_config: give a config of FastGen's experiments")
    modules = _imported(tree)
    options: dict[str, Any] = {}
    for statement in function.body:
        if isinstance(statement, ast.Return) or _is_docstring(statement):
            continue
        if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
            raise _no_assignment(path, statement)
        target, value = statement.targets[0], statement.value
        if isinstance(target, ast.Name) and target.id == ROOT and isinstance(value, ast.Call) and not value.args:
            options[PROGRAM] = _base(value, modules, path)
        elif (name := dotted(target)) is not None and name.startswith(f"{ROOT}."):
            options |= _assigned(name.removeprefix(f"{ROOT}."), value)
        else:
            raise _no_assignment(path, statement)
    return options


def _is_docstring(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def _no_assignment(path: Path, node: ast.AST) -> ConfigError:
    line = getattr(node, "lineno", 0)
    return ConfigError(
        f"{path}, line {line}: no plain assignment to {ROOT}.…, so what it does is not known: write the value itself"
    )


def _imported(tree: ast.Module) -> dict[str, str]:
    """Names that the file imports, and the last part of what each stands for."""
    found: dict[str, str] = {}
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name: alias.name.rpartition(".")[2] for alias in node.names}
    return found


def _base(call: ast.Call, modules: dict[str, str], path: Path) -> str:
    """`config_dmd2` of `config_dmd2_default.create_config()`."""
    name = dotted(call.func) or ""
    module, _, function = name.rpartition(".")
    if function not in ("create_config", "Config"):
        raise _no_assignment(path, call)
    return modules.get(module, module) if module else modules.get(name, name)


def dotted(node: ast.AST) -> str | None:
    """`a.b.c` of attributes of a name; None for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (before := dotted(node.value)) is not None:
        return f"{before}.{node.attr}"
    return None


def _assigned(name: str, node: ast.expr) -> dict[str, Any]:
    """The options of one assignment: of a mapping by its keys."""
    try:
        value = value_of(node)
    except ValueError:
        value = Code(ast.unparse(node))
    if isinstance(value, dict):
        return {f"{name}.{key}": entry for key, entry in value.items()}
    return {name: value}


def value_of(node: ast.expr) -> Any:
    """A literal, arithmetic on literals, or the name of something. Raises ValueError for anything else."""
    match node:
        case ast.Constant():
            return node.value
        case ast.List() | ast.Tuple():
            return [value_of(entry) for entry in node.elts]
        case ast.Dict() if all(isinstance(key, ast.Constant) for key in node.keys):
            return {key.value: value_of(v) for key, v in zip(node.keys, node.values, strict=True)}  # type: ignore[union-attr]
        case ast.UnaryOp(op=ast.USub()) | ast.BinOp():
            return _computed(node)
    if (name := dotted(node)) is not None:
        return name
    raise ValueError("computed")


def _computed(node: ast.expr) -> float | int:
    match node:
        case ast.Constant(value=int() | float()):
            return node.value  # type: ignore[return-value]
        case ast.UnaryOp(op=ast.USub()):
            return -_computed(node.operand)
        case ast.BinOp(op=ast.Add()):
            return _computed(node.left) + _computed(node.right)
        case ast.BinOp(op=ast.Sub()):
            return _computed(node.left) - _computed(node.right)
        case ast.BinOp(op=ast.Mult()):
            return _computed(node.left) * _computed(node.right)
        case ast.BinOp(op=ast.Div()) if (divisor := _computed(node.right)) != 0:
            return _computed(node.left) / divisor
    raise ValueError("computed")
