"""Signatures in a library's source as data: `python -m scripts.record_signatures NAME VERSION COMMIT FILE CLASS...`.

Written to tests/model/wires/NAME.json; a library's double is checked against them, and the library where there is one.
"""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

FOLDER = Path(__file__).parent.parent / "tests" / "model" / "wires"


def signatures(source: str, classes: list[str]) -> dict[str, dict[str, list[list[str | None]]]]:
    """Of each class its functions, of each of these [parameter, default as it is written or None]."""
    found: dict[str, dict[str, list[list[str | None]]]] = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef) and node.name in classes:
            functions = (each for each in node.body if isinstance(each, ast.FunctionDef))
            found[node.name] = {each.name: parameters(each) for each in functions}
    return found


def parameters(function: ast.FunctionDef) -> list[list[str | None]]:
    names = [each.arg for each in (*function.args.posonlyargs, *function.args.args)]
    defaults = [None if each is None else ast.unparse(each) for each in function.args.defaults]
    told: list[list[str | None]] = [
        [name, default] for name, default in zip(names, [None] * (len(names) - len(defaults)) + defaults, strict=True)
    ]
    told += [
        [each.arg, None if default is None else ast.unparse(default)]
        for each, default in zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True)
    ]
    return [each for each in told if each[0] != "self"]


def main() -> None:
    name, version, commit, file, *classes = sys.argv[1:]
    told = {"version": version, "commit": commit, "classes": signatures(Path(file).read_text(), classes)}
    path = FOLDER / f"{name}.json"
    path.write_text(json.dumps(told, indent=1) + "\n")
    print(f"written: {path}")


if __name__ == "__main__":
    main()
