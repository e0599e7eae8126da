"""The floors of docs/architecture.md, read off the imports: only downward, no cycles, leaves never import leaves."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "moe_serve"
KERNELS = Path(__file__).parents[2] / "kernels"
FLOORS = {
    "base": 0,
    "text": 1,
    "parallel": 1,
    "eplb": 2,
    "world": 3,
    "model": 3,
    "worker": 4,
    "executor": 5,
    "engine": 6,
    "api": 7,
    "launch": 8,
    "deploy": 8,
    "doctor": 8,
    "llm": 9,
    "cli": 10,
    "examples": 10,
    "__main__": 11,
    "__init__": 11,
}
APART = {frozenset({"world", "model"}), frozenset({"text", "parallel"}), frozenset({"launch", "deploy"})}
APART |= {frozenset({"doctor", room}) for room in ("launch", "deploy", "api", "engine")}
PLUGGABLE = ("model/all2all", "model/attention", "model/archs", "executor", "eplb/policies")
BASES = {
    "base",
    "choose",
    "flashinfer_nvlink",
    "library",
    "limits",
    "rows",
    "shape",
    "remote",
    "replies",
    "watching",
    "lines",
    "subprocesses",
    "seats",
    "starting",
    "nodes",
    "stage_results",
    "devices",
    "ray_cluster",
    "ray_placement",
    "ray_settings",
    "__init__",
}
PURE = (
    "eplb",
    "world/fleet.py",
    "world/members.py",
    "executor/ray_placement.py",
    "launch/ray_spread.py",
    "engine/scheduler.py",
    "engine/lockstep.py",
    "engine/router.py",
    "engine/flight.py",
    "engine/turns.py",
    "engine/admission.py",
    "engine/board.py",
    "engine/overdue.py",
    "engine/pace.py",
    "deploy",
    "doctor/judge",
    "doctor/finding.py",
    "world/status.py",
    "base/launched.py",
)
IMPURE = {"socket", "threading", "time", "asyncio", "torch", "zmq", "subprocess"}
LATE_IMPORTS = {"base/registry.py"}


@cache
def modules() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


@cache
def module_names() -> frozenset[str]:
    return frozenset(map(name_of, modules()))


@cache
def imports_of(path: Path) -> set[str]:
    """Modules of ours that a file imports, anywhere in it; `from package import module` names the module."""
    known = module_names()
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            assert node.level == 0, f"{path} imports relatively"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inner & known or {node.module}
    return {module for module in found if module.split(".")[0] == "moe_serve"}


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_downward(path: Path) -> None:
    room = room_of(name_of(path))
    for imported in imports_of(path):
        target = room_of(imported)
        if target == room:
            continue
        assert frozenset({room, target}) not in APART, f"{room} and {target} must not know each other ({imported})"
        assert FLOORS[target] < FLOORS[room], f"{path} reaches up to {imported}"


def test_imports_have_no_cycle() -> None:
    graph = {name_of(path): imports_of(path) for path in modules() if path.name != "__init__.py"}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, f"cycle: {' -> '.join((*trail, module))}"
        if module not in done:
            for imported in graph.get(module, ()):
                visit(imported, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("folder", PLUGGABLE)
def test_leaves_of_a_pluggable_folder_do_not_import_each_other(folder: str) -> None:
    package = "moe_serve." + folder.replace("/", ".")
    leaves = {path.stem for path in (ROOT / folder).glob("*.py")} - BASES
    for path in (ROOT / folder).glob("*.py"):
        if path.stem not in BASES:
            wrong = {f"{package}.{leaf}" for leaf in leaves} & imports_of(path)
            assert not wrong, f"{path} imports its siblings {wrong}"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_stand_at_the_top_and_inner_packages_are_empty(path: Path) -> None:
    relative = str(path.relative_to(ROOT))
    source = path.read_text()
    if path.name == "__init__.py" and path.parent != ROOT:
        assert not source.strip(), f"{relative} must stay empty: importing a leaf must not import its siblings"
    tree = ast.parse(source)
    top = set(map(id, tree.body))
    late = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom) and id(node) not in top]
    assert not late, f"{relative} imports inside a function or block (line {late[0].lineno})"
    if relative not in LATE_IMPORTS:
        assert "import_module(" not in source, f"{relative}: only base/registry.py imports by name"
    assert "global " not in {line.strip()[:7] for line in source.splitlines()}, f"{relative} has a global statement"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_says_what_it_is_and_stays_readable(path: Path) -> None:
    source = path.read_text()
    if source.strip():
        assert ast.get_docstring(ast.parse(source)), f"{path} has no docstring"
        assert len(source.splitlines()) <= 330, f"{path} is too long to be read at a sitting"


def pure_modules() -> list[Path]:
    """Without the desk's planner, whose report tells how long the policy took."""
    return [path for path in modules() if str(path.relative_to(ROOT)).startswith(PURE) and path.name != "plan.py"]


@pytest.mark.parametrize("path", pure_modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_what_decides_has_no_socket_thread_clock_loop_or_tensor(path: Path) -> None:
    """A clock may be an argument: then a test can make time pass."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and node.module is not None else []
        assert not {name.split(".")[0] for name in names} & IMPURE, f"{path} line {node.lineno} imports {names}"  # type: ignore[attr-defined]


def test_only_doors_stand_in_the_hall() -> None:
    assert {path.name for path in ROOT.glob("*.py")} == {"__init__.py", "__main__.py", "llm.py"}


def test_no_product_code_uses_the_default_process_group() -> None:
    forbidden = ("init_process_group(backend", "dist.all_reduce", "dist.barrier", "get_world_group", "dist.group.WORLD")
    for path in modules():
        source = path.read_text()
        for word in (*forbidden, "import torch.distributed as dist"):
            assert word not in source, f"{path} uses {word}"


def test_kernels_know_nothing_of_the_house_and_only_the_model_knows_them() -> None:
    files = [*KERNELS.rglob("*.py")]
    assert len(files) > 10
    for path in files:
        assert "moe_serve" not in {name.partition(".")[0] for name in imported(path)}, path
    users = {path.relative_to(ROOT).parts[0] for path in ROOT.rglob("*.py") if knows_kernels(path)}
    assert users == {"model"}


def knows_kernels(path: Path) -> bool:
    return any(name.partition(".")[0] == "moe_kernels" for name in imported(path))


def imported(path: Path) -> set[str]:
    """Modules that a file imports, at any depth."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {each.name for each in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names
