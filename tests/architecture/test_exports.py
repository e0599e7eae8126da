"""The public names of the package are exactly those listed."""

from __future__ import annotations

import types

import moe_serve


def test_all_lists_exactly_the_public_names() -> None:
    for name in moe_serve.__all__:
        assert getattr(moe_serve, name) is not None
    visible = {
        name
        for name, value in vars(moe_serve).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType | types.FunctionType)
    }
    assert visible | {"LLM"} == set(moe_serve.__all__)
