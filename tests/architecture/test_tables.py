"""Every entry of every table of pluggable parts resolves, has a file of its own and declares what it must."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import torch

from moe_serve.base.config import Config
from moe_serve.base.errors import ConfigError
from moe_serve.base.registry import Registry
from moe_serve.base.tables import ALL2ALL, EXECUTORS
from moe_serve.model.all2all.base import Arrived
from moe_serve.model.all2all.limits import LIMITS
from moe_serve.model.attention.base import ATTENTION
from tests.support.doubles import LIBRARIES, stand_in

ROOT = Path(__file__).parents[2]
EXTRAS = {"ray"}
"""Entries that need a package of their name."""
ENTRIES = [(table, name) for table in (ALL2ALL, EXECUTORS, ATTENTION) for name in table]


def stand_ins(name: str) -> None:
    """Doubles of the libraries of backends for GPUs."""
    if name in LIBRARIES:
        stand_in(LIBRARIES[name], is_open=False)


@pytest.mark.parametrize(("table", "name"), ENTRIES, ids=lambda value: getattr(value, "kind", value))
def test_an_entry_resolves_to_a_class_in_a_file_of_its_own(table: Registry, name: str) -> None:
    if name in EXTRAS:
        pytest.importorskip(name)
    stand_ins(name)
    module, _, attribute = table.target(name).partition(":")
    assert (ROOT / (module.replace(".", "/") + ".py")).is_file()
    found = table.load(name)
    assert isinstance(found, type)
    assert found.__name__ == attribute
    others = [table.target(other).partition(":")[0] for other in table if other != name]
    assert module not in others


@pytest.mark.parametrize("name", list(ALL2ALL))
def test_an_all2all_backend_declares_its_capabilities(name: str) -> None:
    stand_ins(name)
    backend = ALL2ALL.load(name)
    assert backend.arrives in get_args(Arrived)  # type: ignore[attr-defined]
    assert backend.applies_weights in ("combine", "experts")  # type: ignore[attr-defined]
    assert backend.id_dtype in (torch.int32, torch.int64)  # type: ignore[attr-defined]
    assert isinstance(backend.exact, bool)  # type: ignore[attr-defined]


def test_every_all2all_backend_has_limits_and_nothing_else_has() -> None:
    assert set(LIMITS) == set(ALL2ALL)


@pytest.mark.parametrize("table", [ALL2ALL, EXECUTORS], ids=lambda table: table.kind)
def test_unknown_names_are_refused(table: Registry) -> None:
    with pytest.raises(ConfigError, match="unknown"):
        table.check("no-such-thing")


def test_a_second_name_is_taken_for_the_first() -> None:
    parallel = Config.from_flat({"all2all_backend": "flashinfer_all2allv"}).parallel
    assert parallel.all2all_backend == "flashinfer_nvlink_two_sided"
    parallel.check_built()
