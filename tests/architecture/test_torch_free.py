"""Rooms that decide or speak HTTP must not load torch: each is imported in a process where torch raises."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2] / "moe_serve"
FREE = [
    *(f"moe_serve.{room}" for room in ("base", "text", "eplb", "eplb.policies", "eplb.search", "eplb.desk", "world")),
    "moe_serve.engine.scheduler",
    "moe_serve.engine.request",
    "moe_serve.engine.block_pool",
    "moe_serve.engine.core",
    "moe_serve.engine.client",
    "moe_serve.engine.lockstep",
    "moe_serve.engine.router",
    "moe_serve.executor.base",
    "moe_serve.api",
    "moe_serve.launch",
    "moe_serve.model.footprint",
    "moe_serve.model.archs",
    "moe_serve.worker.kv_room",
    *(f"moe_serve.cli.{name}" for name in ("main", "chat", "spawn", "flags", "eplb", "plan", "k8s", "doctor")),
    "moe_serve.deploy",
    "moe_serve.doctor",
    "moe_serve.llm",
]


def test_deciding_and_speaking_rooms_do_not_load_torch() -> None:
    names = []
    for name in FREE:
        path = ROOT.parent / name.replace(".", "/")
        names += (
            [f"{name}.{file.stem}" for file in sorted(path.glob("*.py")) if file.stem != "__init__"]
            if path.is_dir()
            else [name]
        )
    assert len(names) > 20
    program = f"""
import importlib, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torch":
            raise AssertionError("torch was loaded")
sys.meta_path.insert(0, Refuse())
for name in {names!r}:
    try:
        importlib.import_module(name)
    except AssertionError as error:
        raise SystemExit(f"{{name}}: {{error}}")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
