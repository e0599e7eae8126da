"""Signatures in a library's source as data.

`python -m scripts.record_signatures NAME VERSION COMMIT MODULE=FILE:CLASS,FUNCTION,... ...`: from each file some
classes and functions, which are found in that module. Written to tests/model/wires/NAME.json; a library's double is
checked against them, and the library where there is one.
"""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from typing import TypeGuard

FOLDER = Path(__file__).parent.parent / "tests" / "model" / "wires"


Parameters = list[list[str | None]]


def signatures(source: str, names: list[str]) -> dict[str, dict[str, Parameters]]:
    """Of each class its functions, of each of these [parameter, default as it is written or None]; a dataclass has
    __init__ by its fields. A function by itself stands under its name, with __call__."""
    found: dict[str, dict[str, Parameters]] = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name in names:
            found[node.name] = {"__call__": parameters(node)}
        if isinstance(node, ast.ClassDef) and node.name in names:
            functions = {each.name: parameters(each) for each in node.body if is_called(each)}
            if any("dataclass" in ast.unparse(each) for each in node.decorator_list):
                functions["__init__"] = fields(node)
            found[node.name] = functions
    missing = set(names) - set(found)
    assert not missing, f"not in the source: {missing}"
    return found


def is_called(node: ast.stmt) -> TypeGuard[ast.FunctionDef]:
    """A function, and no property."""
    return isinstance(node, ast.FunctionDef) and "property" not in map(ast.unparse, node.decorator_list)


def fields(record: ast.ClassDef) -> Parameters:
    """Of a dataclass, those that are given by name alone last."""
    by_place, by_name = [], []
    for each in record.body:
        if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name):
            default = None if each.value is None else ast.unparse(each.value)
            by_keyword = default is not None and "kw_only=True" in default
            if default is not None and default.startswith("field("):
                told = {word.arg: ast.unparse(word.value) for word in ast.walk(each) if isinstance(word, ast.keyword)}
                default = told.get("default")
            (by_name if by_keyword else by_place).append([each.target.id, default])
    return [*by_place, *by_name]


def parameters(function: ast.FunctionDef) -> Parameters:
    names = [each.arg for each in (*function.args.posonlyargs, *function.args.args)]
    defaults = [None if each is None else ast.unparse(each) for each in function.args.defaults]
    told: Parameters = [
        [name, default] for name, default in zip(names, [None] * (len(names) - len(defaults)) + defaults, strict=True)
    ]
    told += [
        [each.arg, None if default is None else ast.unparse(default)]
        for each, default in zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True)
    ]
    told += [[each.arg, None] for each in (function.args.vararg, function.args.kwarg) if each is not None]
    return [each for each in told if each[0] not in ("self", "cls")]


def main() -> None:
    name, version, commit, *sources = sys.argv[1:]
    modules = {}
    for source in sources:
        module, _, rest = source.partition("=")
        file, _, names = rest.rpartition(":")
        modules.setdefault(module, {}).update(signatures(Path(file).read_text(), names.split(",")))
    path = FOLDER / f"{name}.json"
    path.write_text(json.dumps({"version": version, "commit": commit, "modules": modules}, indent=1) + "\n")
    print(f"written: {path}")


if __name__ == "__main__":
    main()
