"""Which compiled path is chosen, and what is refused."""

from __future__ import annotations

import pytest
import torch
from moe_kernels.paths import available

from moe_serve.base.errors import ConfigError
from moe_serve.base.topology import Topology
from moe_serve.model import kernels
from moe_serve.model.kernels import SLOWEST_FIRST, choose_kernels, path_for
from moe_serve.parallel.collectives import Group, alone
from tests.support.ranks import Ranks, Seat

CPU = torch.device("cpu")
BF16 = torch.bfloat16


def group() -> Group:
    return alone("world", 0, CPU)


def test_auto_takes_the_best_that_was_measured() -> None:
    expected = next(path for path in ("amx", "avx512", "avx2") if path in available())
    assert choose_kernels("auto", BF16, CPU, group()) == expected
    assert choose_kernels("torch", BF16, CPU, group()) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_auto_leaves_other_types_to_torch_and_a_path_refuses_them(dtype: torch.dtype) -> None:
    assert choose_kernels("auto", dtype, CPU, group()) is None
    with pytest.raises(ConfigError, match="bfloat16 on a CPU, not float"):
        choose_kernels("generic", dtype, CPU, group())


def test_a_path_that_cannot_run_here_is_refused_with_those_that_can(monkeypatch: pytest.MonkeyPatch) -> None:
    for path in SLOWEST_FIRST[1:]:
        if path not in available():
            with pytest.raises(ConfigError, match=f"kernels {path} cannot run here: this machine has .*generic"):
                choose_kernels(path, BF16, CPU, group())
    monkeypatch.setattr(kernels, "available", tuple)
    with pytest.raises(ConfigError, match="has none compiled"):
        choose_kernels("generic", BF16, CPU, group())


def test_without_any_there_is_one_warning(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(kernels, "available", tuple)
    assert choose_kernels("auto", BF16, CPU, group()) is None
    (record,) = caplog.records
    assert "install a C++ compiler" in record.getMessage()


def test_odd_widths_fall_back_by_name(caplog: pytest.LogCaptureFixture) -> None:
    assert path_for("avx2", 32, 48) == "avx2"
    assert path_for(None, 24, 48) is None
    assert not caplog.records
    assert path_for("avx2", 24, 48) is None
    assert "24 x 48" in caplog.text


def _chosen(seat: Seat, best_here: list[str]) -> str | None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "available", lambda: (best_here[seat.rank], "generic"))  # this rank's machine
        return choose_kernels("auto", BF16, CPU, seat.groups(Topology(dp=2)).control)


@pytest.mark.ranks
def test_all_ranks_take_what_the_weakest_machine_has(ranks: Ranks) -> None:
    assert ranks.run(_chosen, ["avx2", "avx2"], only=2) == ["avx2", "avx2"]
    assert ranks.run(_chosen, ["avx2", "generic"], only=2) == [None, None]
