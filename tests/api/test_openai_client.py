"""The real openai client against a real HTTP server on fake engines."""

from __future__ import annotations

import pytest

from tests.api.conftest import Served
from tests.support.client_checks import CHECKS, Check
from tests.support.http_server import MODEL


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_client(served: Served, check: Check) -> None:
    check(served.client, served.url, MODEL)
