"""Who is to blame for the end of a world is the launcher's exit code."""

from __future__ import annotations

import pytest

from moe_serve.base.messages import Stop
from moe_serve.launch.endings import WORLD_ENDED, exit_code


@pytest.mark.parametrize(
    ("code", "node", "expected"),
    [
        (1, "here", 1),
        (1, "there", WORLD_ENDED),
        (1, "", 1),
        (2, "here", 2),
        (2, "there", WORLD_ENDED),
        (2, "", 2),
        (0, "here", 0),
        (0, "there", WORLD_ENDED),
    ],
)
def test_what_another_node_did_is_told_from_what_this_one_did(code: int, node: str, expected: int) -> None:
    assert exit_code(Stop("a reason", code, node), "here", asked=False) == expected
