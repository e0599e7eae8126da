"""What --all2all-backend auto is, by where the ranks are: pure."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moe_serve.base.config import Config
from moe_serve.base.errors import ConfigError
from moe_serve.model.all2all.choose import Machine, settle_backend

HERE = Machine("Linux", "x86_64", has_gpu=False)
TWO: dict[str, object] = {"data_parallel_size": 2}


def settled(
    options: dict[str, object],
    *,
    executor: str = "uni",
    device: str = "auto",
    machine: Machine = HERE,
    local: str = "2",
) -> tuple[str, str]:
    return settle_backend(
        Config.from_flat(options).parallel,
        executor=executor,
        device=device,
        machine=machine,
        environment={"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": local},
    )


@pytest.mark.parametrize(
    ("options", "said", "why"),
    [
        (TWO, {}, "all 2 ranks are on the CPUs of this machine"),
        ({"tensor_parallel_size": 4}, {"executor": "mp"}, "all 4 ranks"),
        (TWO, {"device": "cpu", "machine": replace(HERE, has_gpu=True)}, "all 2 ranks"),
        (TWO, {"executor": "external_launcher"}, "all 2 ranks"),
    ],
)
def test_cpu_ranks_of_one_machine_share_memory(options: dict[str, object], said: dict[str, object], why: str) -> None:
    name, reason = settled(options, **said)  # type: ignore[arg-type]
    assert name == "shm"
    assert why in reason


@pytest.mark.parametrize(
    ("options", "said", "why"),
    [
        ({}, {}, "one rank has nobody"),
        ({"pipeline_parallel_size": 2}, {"executor": "mp"}, "one rank has nobody"),
        (TWO | {"data_parallel_rank": 0}, {}, "started apart"),
        (TWO | {"data_parallel_size_local": 1}, {}, "started apart"),
        (TWO, {"executor": "ray"}, "the executor ray may have ranks"),
        (TWO | {"data_parallel_backend": "ray"}, {}, "Ray may have put engines on several machines"),
        (TWO, {"executor": "theirs:Executor"}, "the executor theirs:Executor may"),
        (TWO, {"executor": "external_launcher", "local": "1"}, "on several machines"),
        (TWO, {"device": "cuda"}, "GPUs"),
        (TWO, {"machine": replace(HERE, has_gpu=True)}, "GPUs"),
        (TWO, {"machine": replace(HERE, processor="aarch64")}, "this is aarch64"),
        (TWO, {"machine": replace(HERE, system="Darwin")}, "this is Darwin"),
    ],
)
def test_all_others_use_the_network(options: dict[str, object], said: dict[str, object], why: str) -> None:
    name, reason = settled(options, **said)  # type: ignore[arg-type]
    assert name == "allgather_reducescatter"
    assert why in reason


def test_what_was_asked_for_is_kept_or_refused_with_the_reason() -> None:
    assert settled({"all2all_backend": "naive", **TWO}) == ("naive", "")
    assert settled({"all2all_backend": "shm", **TWO, "data_parallel_rank": 1}) == ("shm", "")
    with pytest.raises(ConfigError, match=r"--all2all-backend shm cannot run here: .* this is aarch64; choose auto"):
        settled({"all2all_backend": "shm", **TWO}, machine=replace(HERE, processor="aarch64"))
