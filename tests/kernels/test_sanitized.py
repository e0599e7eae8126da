"""The compiled kernels touch no memory but what they were given: their tests, under AddressSanitizer and UBSan."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "sanitize"
NO_SANITIZER = 77


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_the_sanitizers_find_nothing() -> None:
    search = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    done = subprocess.run([SCRIPT], env={**os.environ, "PATH": search}, capture_output=True, text=True, check=False)
    if done.returncode == NO_SANITIZER:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-8000:]
    assert " passed" in done.stdout
