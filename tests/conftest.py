"""Options of this test suite."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from tests.support.ranks import Ranks

settings.register_profile("no deadline", deadline=None)  # how long an example takes says how busy the machine is
settings.load_profile("no deadline")


@pytest.fixture(autouse=True)
def _logging_as_a_library_has_it() -> None:
    """A command that a test or a fixture of a module ran in this process set logging up; caplog would hear nothing."""
    logger = logging.getLogger("moe_serve")
    logger.handlers.clear()
    logger.setLevel(logging.NOTSET)
    logger.propagate = True


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Four ranks that all modules share: each spawn costs seconds of importing torch."""
    from tests.support.ranks import Ranks  # whoever needs no ranks needs no torch

    with Ranks(4) as world:
        yield world


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full-grid",
        action="store_true",
        help="parity over HTTP for every architecture x world x all2all backend x placement, not a covering part",
    )
