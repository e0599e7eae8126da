"""How a process of ours starts another one: it imports what we could, nothing from the folder it is started in, and
is not told the keys of clients.

`python -m` puts the current folder first, where a random.py or a folder named moe_serve would be run instead.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from moe_serve.base.config import KEYS
from moe_serve.base.section import ENVIRONMENT_PREFIX

HOME = Path(__file__).resolve().parents[2]
"""Where this package lies: a checkout that is not installed is the one current folder that must stay."""
KEY_VARIABLES = {(ENVIRONMENT_PREFIX + name).upper() for name in KEYS}


def module_command(module: str) -> list[str]:
    """Runs a module; with child_environment()."""
    return [sys.executable, "-P", "-m", module]


def child_environment() -> dict[str, str]:
    """This process's environment for a child: without keys, however they are spelt (options know no case)."""
    kept = {name: value for name, value in os.environ.items() if name.upper() not in KEY_VARIABLES}
    return kept | import_environment()


def import_environment() -> dict[str, str]:
    """The environment that keeps this process's import path, in its order and without the current folder."""
    here = Path.cwd()
    kept = [folder for folder in sys.path if folder and (Path(folder) != here or here == HOME)]
    return {"PYTHONPATH": os.pathsep.join([*kept, *([] if str(HOME) in kept else [str(HOME)])])}
