"""/config says what runs where an option left the choice open, or could not have what it asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
from moe_kernels.paths import available

from moe_serve.cli.random_model import make_model
from moe_serve.model.kernels import BY_NAME_ONLY
from tests.support.server import serving

pytestmark = [pytest.mark.ranks, pytest.mark.long]
WORLD = ("-dp", "2", "-ep", "--max-model-len", "256", "--kv-cache-memory-bytes", "8388608", "--shutdown-timeout", "1")
HAS_NONE = ("--worker-cls", "tests.support.worker_classes.WithoutMemory")


@pytest.mark.parametrize(("options", "runs"), [((), "shm"), (HAS_NONE, "allgather_reducescatter")])
def test_config_names_the_backend_that_runs(tmp_path: Path, options: tuple[str, ...], runs: str) -> None:
    model = make_model(tmp_path / "tiny")
    with serving(str(model), *WORLD, "--dtype", "bfloat16", *options) as server:
        shown = server.get("/config").json()
        assert shown["parallel"]["all2all_backend"] == "shm"
        kernels = next(path for path in available() if path not in BY_NAME_ONLY)
        each = {"device": "cpu", "dtype": "bfloat16", "kernels": kernels, "all2all_backend": runs}
        each["tensor_parallel"] = "none"
        assert shown["running"] == {"0": each, "1": each}
        assert ("allgather_reducescatter is used instead" in server.log()) == (options == HAS_NONE)


def test_a_rank_that_is_alone_exchanges_with_nobody(tmp_path: Path) -> None:
    model = make_model(tmp_path / "tiny")
    with serving(str(model), "--max-model-len", "256", "--kv-cache-memory-bytes", "8388608") as server:
        assert server.get("/config").json()["running"]["0"]["all2all_backend"] == "none"


@pytest.mark.parametrize(("options", "runs"), [((), "shm"), (HAS_NONE, "gloo")])
def test_config_names_what_tensor_parallel_sums_travel_with(
    tmp_path: Path, options: tuple[str, ...], runs: str
) -> None:
    model = make_model(tmp_path / "tiny")
    with serving(str(model), "-tp", "2", *WORLD[2:], "--dtype", "bfloat16", *options) as server:
        assert server.get("/config").json()["running"]["0"]["tensor_parallel"] == runs
        assert ("ranks 0, 1 add up over the network: rank 0 cannot have it: File too large" in server.log()) == (
            options == HAS_NONE
        )
        assert server.complete("x", max_tokens=3)["usage"]["completion_tokens"] == 3
