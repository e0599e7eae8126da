"""Writes the parts of docs/ that follow from the code: `python -m scripts.generate_docs`; `--check` only compares.

The tree of modules in architecture.md, all of configuration.md, the table of limits in all-to-all.md, the tables in
benchmarks.md, the manifests and the dashboard in docs/kubernetes, and the manifests that tests compare with.
"""

from __future__ import annotations

import ast
import re
import sys
import types
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import SecretStr
from pydantic.fields import FieldInfo

from bench.report import RESULTS, markdown_table, read_reports
from moe_serve.base.config import SECTIONS, Config
from moe_serve.base.section import Section, dashed
from moe_serve.base.tables import ALL2ALL, EXECUTORS
from moe_serve.model.all2all.limits import LIMITS, Limits
from scripts.kubernetes_examples import kept_manifests
from scripts.measurements import results

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PACKAGE = ROOT / "moe_serve"
ABOUT = {
    "model": "Model",
    "parallel": "Ranks",
    "cache": "KV cache",
    "scheduler": "Scheduler",
    "server": "Server",
}
TABLES = {
    table.option: ", ".join(f"`{name}`" for name in names)
    for table, names in ((ALL2ALL, ["auto", *ALL2ALL]), (EXECUTORS, list(EXECUTORS)))
}


def main(arguments: list[str]) -> int:
    stale = [path for path, text in generated().items() if not path.exists() or path.read_text() != text]
    if "--check" in arguments:
        for path in stale:
            print(f"{path.relative_to(ROOT)} is not up to date; run python -m scripts.generate_docs")
        return 1 if stale else 0
    for path, text in generated().items():
        path.write_text(text)
    print(f"written: {', '.join(str(path.relative_to(ROOT)) for path in stale) or 'nothing new'}")
    return 0


def generated() -> dict[Path, str]:
    """Every file that is written here, whole."""
    architecture, benchmarks, all2all = (DOCS / f"{name}.md" for name in ("architecture", "benchmarks", "all-to-all"))
    return {
        architecture: replaced(architecture.read_text(), "modules", module_tree(PACKAGE)),
        benchmarks: replaced(benchmarks.read_text(), "results", results(read_reports(RESULTS))),
        all2all: replaced(all2all.read_text(), "limits", limits_table(LIMITS)),
        DOCS / "configuration.md": configuration(),
        **kept_manifests(),
    }


def replaced(text: str, name: str, content: str) -> str:
    """`text` with new content between the two comments that mark its generated part `name`."""
    begin, end = f"<!-- generated: {name} -->", f"<!-- end of {name} -->"
    before, _, rest = text.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"the text has no part between {begin} and {end}")
    return f"{before}{begin}\n\n{content}\n\n{end}{after}"


# --- modules --------------------------------------------------------------------------------------------------


def module_tree(package: Path) -> str:
    """A table per folder: every module and the first sentence of its docstring."""
    folders = sorted({path.parent for path in package.rglob("*.py")}, key=lambda path: path.relative_to(package).parts)
    parts = []
    for folder in folders:
        rows = [
            (f"`{path.name}`", first_sentence(path))
            for path in sorted(folder.glob("*.py"))
            if path.read_text(encoding="utf-8").strip()
        ]
        if rows:
            title = folder.relative_to(package.parent).as_posix() + "/"
            parts.append(f"**{title}**\n\n" + markdown_table(["module", "what it is"], rows))
    return "\n\n".join(parts)


def first_sentence(path: Path) -> str:
    """Of a module's docstring, in one line."""
    paragraph = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n\n")[0]
    text = " ".join(paragraph.split())
    sentence = re.match(r".*?[.?!](?=\s+[A-Z`]|$)", text)
    return (sentence.group(0) if sentence else text).replace("|", "\\|")


# --- all-to-all -----------------------------------------------------------------------------------------------


def limits_table(table: Mapping[str, Limits]) -> str:
    """What each all-to-all backend can carry."""
    rows = [
        (
            f"`{name}`",
            ", ".join(limits.devices or ()),
            _one_of(limits.rank_counts, limits.max_ranks) or (f"at least {limits.min_ranks}" * (limits.min_ranks > 1)),
            _one_of(None, limits.max_rows),
            _one_of(limits.top_ks, limits.max_top_k),
            _one_of(limits.hidden_sizes, None, limits.hidden_multiple),
            ", ".join(limits.dtypes or ()),
            ", ".join(
                [
                    *(["whole, as many on every rank"] if limits.whole_experts and limits.equal_slots else []),
                    *filter(None, [_one_of(None, limits.max_experts, limits.experts_multiple)]),
                ]
            ),
            f"{limits.host_memory or ''}{', in one host alone' if limits.one_host else ''}",
        )
        for name, limits in table.items()
    ]
    header = ["backend", "on", "ranks", "rows of a rank", "top k", "hidden size", "types", "experts", "within a host"]
    return markdown_table(header, rows)


def _one_of(values: Sequence[int] | None, most: int | None, multiple: int = 1) -> str:
    if values is not None:
        return ", ".join(map(str, values))
    if most is not None:
        return f"at most {most}"
    return f"a multiple of {multiple}" if multiple > 1 else ""


# --- options --------------------------------------------------------------------------------------------------


def configuration() -> str:
    """All options from the sections that base/config.py lists."""
    agreed = set(Config().agreement())
    parts = [
        "# Configuration",
        "Written by `python -m scripts.generate_docs` from the sections in `moe_serve/base/config.py` and "
        "`moe_serve/base/parallel_config.py` (with `moe_serve/base/nodes.py`); change it there.",
        "Every option of `moe-serve serve` is a flag, an environment variable (`MOE_SERVE_` and the name in capitals: "
        "`MOE_SERVE_BLOCK_SIZE=32`), a line of the file that `--config` names (`block_size: 32`) and an argument of "
        "`LLM` (`block_size=32`). The first that is given wins: command line, environment, file, default. Underscores "
        "in flags are fine too (`--block_size`). An option marked with = must be equal on every rank; ranks compare "
        "them when they meet, and a difference ends the start with a sentence that names it.",
    ]
    for name, section in SECTIONS.items():
        parts += [f"## {ABOUT[name]}", option_table(section, agreed)]
    return "\n\n".join(parts) + "\n"


def option_table(section: type[Section], agreed: set[str]) -> str:
    rows = []
    for name, info in section.model_fields.items():
        rows.append(option_row(name, info, agreed))
        if isinstance(info.annotation, type) and issubclass(info.annotation, Section):
            inner = info.annotation.model_fields.items()
            rows += [option_row(field, about, set(), f"{name}.") for field, about in inner]
    return markdown_table(["option", "short", "value", "default", "=", "meaning"], rows)


def option_row(name: str, info: FieldInfo, agreed: set[str], prefix: str = "") -> tuple[str, ...]:
    extra: Mapping[str, Any] = info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}
    option = "MODEL" if name == "model" else f"--{prefix}{name}".replace("_", "-")
    default = info.default
    values = TABLES[option] if option in TABLES else kind_of(info.annotation, info.metadata)
    shown = "" if default is None else "{}" if isinstance(default, Section) else str(default).lower()
    return (
        f"`{option}`",
        ", ".join(f"`{dashed(short)}`" for short in extra.get("short", [])),
        values,
        f"`{shown}`" if shown else "",
        "=" if name in agreed else "",
        " ".join((info.description or "").split()).replace("|", "\\|"),
    )


def named(values: Iterable[str]) -> str:
    return ", ".join(f"`{value}`" for value in values)


def kind_of(annotation: Any, metadata: list[Any]) -> str:
    """A type as a reader of options wants it: names of choices, or a number with its bounds."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return named(inner)
    if origin in (Union, types.UnionType):
        return " or ".join(kind_of(part, metadata) for part in inner if part is not type(None))
    if origin is Annotated:
        return kind_of(inner[0], [*metadata, *inner[1:]])
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return "JSON, or dotted options"
    names = {bool: "switch", int: "number", float: "number", str: "text", SecretStr: "text (secret)"}
    return names.get(annotation, str(annotation)) + bounds(metadata)


def bounds(metadata: list[Any]) -> str:
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    found = []
    for item in metadata:
        for part in getattr(item, "metadata", [item]):
            found += [f"{sign} {getattr(part, name)}" for name, sign in signs.items() if hasattr(part, name)]
    return f" {', '.join(found)}" if found else ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
