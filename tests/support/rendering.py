"""Chat templates rendered in the test's own process, for tests of what is rendered and not of how long it may take."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import msgspec

from moe_serve.text.rendering import TemplateSetup
from moe_serve.text.templates import Templates


class RendersHere:
    """As RenderProcess, without a process."""

    def __init__(self, setup: TemplateSetup) -> None:
        self._setup = setup
        self.broken: dict[str, str] = {}

    def start(self) -> None:
        self.broken = self._made().broken

    def render(self, job: Mapping[str, Any]) -> dict[str, Any]:
        return self._made().render(json.dumps(job))

    def close(self) -> None:
        pass

    def _made(self) -> Templates:
        return Templates(msgspec.to_builtins(self._setup))
