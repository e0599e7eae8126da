"""How a process of ours starts another one: it imports what we could, and nothing from the folder it is started in.

`python -m` puts the current folder first, where a random.py or a folder named moe_serve would be run instead.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

HOME = Path(__file__).resolve().parents[2]
"""Where this package lies: a checkout that is not installed is the one current folder that must stay."""


def module_command(module: str) -> list[str]:
    """Runs a module; with import_environment()."""
    return [sys.executable, "-P", "-m", module]


def import_environment() -> dict[str, str]:
    """The environment that keeps this process's import path, in its order and without the current folder."""
    here = Path.cwd()
    kept = [folder for folder in sys.path if folder and (Path(folder) != here or here == HOME)]
    return {"PYTHONPATH": os.pathsep.join([*kept, *([] if str(HOME) in kept else [str(HOME)])])}
