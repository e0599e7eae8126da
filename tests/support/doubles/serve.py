"""`moe-serve` with the limits of open doubles: `python -m tests.support.doubles.serve serve ...`."""

from __future__ import annotations

import sys

from moe_serve.cli.main import main
from tests.support.doubles import open_everything

WORKER = ("--worker-cls", "tests.support.doubles.worker:OverDoubles")
COMMAND = (sys.executable, "-m", "tests.support.doubles.serve")

if __name__ == "__main__":
    open_everything()
    sys.exit(main())
