"""What is settled about Ray where Ray itself is not loaded: options, environment, the executor chosen by default."""

from __future__ import annotations

import importlib.machinery
import subprocess
import sys
import types
from pathlib import Path

import pytest

from moe_serve.base.config import Config
from moe_serve.base.errors import ConfigError, MissingExtra
from moe_serve.base.model_config import load_model_config
from moe_serve.base.parallel_config import ParallelConfig
from moe_serve.engine.alone import OneEngine
from moe_serve.executor import ray_settings
from moe_serve.executor.choose import default_executor, settle_executor
from moe_serve.executor.devices import gpus_here
from moe_serve.executor.ray_settings import (
    Surroundings,
    carried_environment,
    runtime_environment,
    settle_ray,
    surroundings,
)
from moe_serve.launch.resolve import default_model

GROUP = "ab" * 18
AROUND = Surroundings("10.0.0.1:6379", GROUP)


def parallel(**options: object) -> ParallelConfig:
    return Config.from_flat({"tensor_parallel_size": 2, **options}).parallel


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the extra is installed, whether it is or not."""
    ray = types.ModuleType("ray")
    ray.__spec__ = importlib.machinery.ModuleSpec("ray", None)
    ray.is_initialized = lambda: False  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def test_ray_is_chosen_inside_a_placement_group_alone() -> None:
    assert default_executor(parallel(), AROUND) == "ray"
    assert default_executor(parallel(), Surroundings("10.0.0.1:6379")) == "mp"
    assert default_executor(parallel(), Surroundings()) == "mp"
    assert default_executor(Config().parallel, AROUND) == "uni"


@pytest.mark.usefixtures("installed")
def test_ray_is_chosen_where_the_gpus_of_this_machine_are_too_few_for_an_engine() -> None:
    eight = parallel(tensor_parallel_size=8, data_parallel_size=2)
    assert [default_executor(eight, Surroundings(), gpus=gpus) for gpus in (0, 4, 8)] == ["mp", "ray", "mp"]
    assert settle_executor(eight, gpus=7)["distributed_executor_backend"] == "ray"
    told = parallel(tensor_parallel_size=8, distributed_executor_backend="mp")
    assert settle_executor(told, gpus=4)["distributed_executor_backend"] == "mp", "ranks share GPUs where that was said"


def test_an_engine_that_must_lie_over_several_nodes_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(
        MissingExtra,
        match=r"an engine of 8 ranks \(pipeline x tensor\), which must lie over several nodes as .* fewer GPUs \(4\), "
        r"needs .*pip install 'moe-serve\[ray\]', start a cluster, or say --distributed-executor-backend mp",
    ):
        default_executor(parallel(tensor_parallel_size=8), Surroundings(), gpus=4)


@pytest.mark.parametrize(
    ("named", "gpus"), [(None, 3), ("0,1", 2), ("", 0), ("-1", 0), ("0,1,2,3,4", 3), ("GPU-aa, GPU-bb", 2)]
)
def test_gpus_are_counted_by_their_files_and_what_may_be_seen(tmp_path: Path, named: str | None, gpus: int) -> None:
    for name in ("nvidia0", "nvidia1", "nvidia7", "nvidiactl", "nvidia-uvm", "null"):
        (tmp_path / name).touch()
    assert gpus_here({} if named is None else {"CUDA_VISIBLE_DEVICES": named}, tmp_path) == gpus


@pytest.mark.usefixtures("installed")
def test_the_surrounding_cluster_and_group_are_settled_for_processes_that_they_do_not_surround() -> None:
    assert settle_ray(parallel(), AROUND) == {"ray_address": AROUND.address, "ray_placement_group": GROUP}
    assert settle_ray(parallel(), Surroundings()) == {"ray_address": None, "ray_placement_group": None}
    chosen = parallel(ray_placement_group="cd" * 18)
    assert settle_ray(chosen, AROUND)["ray_placement_group"] == "cd" * 18
    elsewhere = settle_ray(parallel(ray_address="10.9.9.9:6379"), AROUND)
    assert elsewhere == {"ray_address": "10.9.9.9:6379", "ray_placement_group": None}


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ray_bundle_indices": "0,1,2"}, "names 3 bundles for 2 ranks"),
        ({"ray_bundle_indices": "0,0"}, "names 0 more than once"),
        (
            {"ray_runtime_env": {"env_vars": 3}},
            r"its env_vars are 3, not names and their texts \(option --ray-runtime-env",
        ),
        ({"ray_runtime_env": {"env_vars": {"A": 3}}}, "not names and their texts"),
        ({"ray_bundle_indices": "0,1", "data_parallel_size": 2}, "names 2 bundles for 4 ranks"),
        ({"ray_address": "ray://10.0.0.1:10001"}, "for Ray's client, which cannot hold workers; give HOST:PORT"),
        ({"ray_bundle_indices": "0,1", "ray_address": "h:1"}, "needs a placement group: .*--ray-placement-group"),
    ],
)
def test_options_of_ray_that_cannot_be_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settle_ray(parallel(**options), AROUND)


ENGINES = {"data_parallel_size": 2, "data_parallel_backend": "ray"}


@pytest.mark.usefixtures("installed")
def test_engines_of_rays_have_their_workers_in_its_bundles() -> None:
    assert settle_executor(parallel(**ENGINES))["distributed_executor_backend"] == "ray"
    assert settle_executor(parallel(**ENGINES, tensor_parallel_size=1))["distributed_executor_backend"] == "uni"
    given = parallel(**ENGINES, tensor_parallel_size=1, ray_placement_group=GROUP)
    assert settle_executor(given)["ray_placement_group"] == GROUP
    assert given.dp_ranks_here == (0, 1)
    split = parallel(**ENGINES, data_parallel_size_local=1)
    assert split.dp_ranks_here == (0, 1)
    assert not split.is_apart, "nobody starts another command, so there is no secret to be given"


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"data_parallel_size": 1},
            "data_parallel_backend ray needs data_parallel_size > 1; the workers of one",
        ),
        (
            {"data_parallel_rank": 1},
            "data_parallel_rank: with data_parallel_backend ray one command starts all",
        ),
        (
            {"data_parallel_hybrid_lb": True, "data_parallel_size_local": 1},
            "data_parallel_hybrid_lb: with data_parallel_backend ray",
        ),
        (
            {"data_parallel_start_rank": 1, "data_parallel_size_local": 1, "headless": True},
            "data_parallel_start_rank and headless: with data_parallel_backend ray",
        ),
        ({"data_parallel_multi_port_external_lb": True}, "data_parallel_multi_port_external_lb: with"),
        (
            {"distributed_executor_backend": "mp"},
            "distributed_executor_backend mp does not go with data_par",
        ),
        ({"ray_bundle_indices": "0,1", "ray_placement_group": GROUP}, "names 2 bundles for 4 ranks"),
        (
            {"data_parallel_size_local": 1, "ray_bundle_indices": "0,1,2,3"},
            "data_parallel_size_local and ray_bundle_indices both say where engines go; leave out one",
        ),
    ],
    ids=str,
)
def test_what_does_not_go_with_engines_of_rays_is_refused_by_name(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settle_executor(parallel(**{**ENGINES, **options}))


def test_options_of_ray_are_refused_where_another_executor_runs() -> None:
    with pytest.raises(ConfigError, match="--ray-address, --ray-bundle-indices has no effect with the mp executor"):
        settle_executor(parallel(ray_address="h:1", ray_bundle_indices="0,1"))
    with pytest.raises(ConfigError, match="--ray-runtime-env, --ray-workers-use-nsight has no effect"):
        settle_executor(parallel(ray_runtime_env={}, ray_workers_use_nsight=True))


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtra, match=r"pip install 'moe-serve\[ray\]', or choose mp"):
        settle_executor(parallel(distributed_executor_backend="ray"))
    with pytest.raises(MissingExtra, match="--data-parallel-backend ray needs the Python package 'ray'"):
        settle_executor(parallel(**ENGINES))


def test_the_server_refuses_ray_without_the_extra_with_code_2() -> None:
    program = "import sys; sys.modules['ray'] = None\nfrom moe_serve.cli.main import main\nsys.exit(main(sys.argv[1:]))"
    arguments = ["serve", "-tp", "2", "--distributed-executor-backend", "ray"]
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert "needs the Python package 'ray', which is not installed here" in done.stderr
    assert "Traceback" not in done.stderr


def test_nothing_is_looked_up_where_ray_was_not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    before = set(sys.modules)
    assert surroundings() == Surroundings()
    assert "ray" not in set(sys.modules) - before


def test_of_the_environment_only_settings_of_libraries_and_the_hubs_token_travel() -> None:
    kept = {"HF_TOKEN": "t", "HF_HOME": "/h", "NCCL_DEBUG": "INFO", "GLOO_SOCKET_IFNAME": "e", "GOMP_SPINCOUNT": "9"}
    own = {
        "RANK": "1",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "h",
        "CUDA_VISIBLE_DEVICES": "3",
        "MOE_SERVE_MEMBER": "{}",
        "MOE_SERVE_WORLD_TOKEN": "secret",
        "MOE_SERVE_API_KEY": "secret",
        "TORCHELASTIC_RUN_ID": "1",
        "RAY_JOB_ID": "1",
        "PATH": "/bin",
        "AWS_SECRET_ACCESS_KEY": "secret",
    }
    assert carried_environment(kept | own) == kept


def test_a_runtime_environment_goes_before_what_is_carried_and_keeps_the_import_path(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ray_settings, "HOME", Path("/somewhere/checkout"))
    told = {"env_vars": {"NCCL_DEBUG": "WARN", "PYTHONPATH": "/mine"}, "pip": ["thing"]}
    given = parallel(ray_runtime_env=told)
    variables = {"NCCL_DEBUG": "WARN", "PYTHONPATH": "/somewhere/checkout:/mine"}
    assert runtime_environment(given, computes=True) == {"env_vars": variables, "pip": ["thing"]}
    assert carried_environment({"NCCL_DEBUG": "INFO", "HF_HOME": "/h"}, told) == {"HF_HOME": "/h"}
    assert set(runtime_environment(parallel(), computes=False)["env_vars"]) == {"PYTHONPATH"}


@pytest.mark.usefixtures("installed")
def test_actors_that_compute_and_no_others_run_under_nsight_where_it_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = parallel(distributed_executor_backend="ray", ray_workers_use_nsight=True)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"nsys is not on the PATH here; install it, or leave out --ray-workers-use"):
        settle_executor(asked)
    (tmp_path / "nsys").write_text("#!/bin/sh\n")
    (tmp_path / "nsys").chmod(0o755)
    settle_executor(asked)
    assert runtime_environment(asked, computes=True)["nsight"]["t"] == "cuda,cudnn,cublas"
    assert "nsight" not in runtime_environment(asked, computes=False)
    doubled = parallel(ray_workers_use_nsight=True, ray_runtime_env={"nsight": "default"})
    with pytest.raises(ConfigError, match="nsight in ray_runtime_env say the same"):
        settle_ray(doubled, AROUND)


def test_a_checkout_is_found_by_workers_and_an_installed_package_needs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_settings, "HOME", Path("/somewhere/checkout"))
    assert ray_settings.import_path() == {"PYTHONPATH": "/somewhere/checkout:${PYTHONPATH}"}
    monkeypatch.setattr(ray_settings, "HOME", Path("/venv/lib/python3.11/site-packages"))
    assert ray_settings.import_path() == {}


@pytest.mark.parametrize("name", ["mp", "ray"])
def test_one_rank_alone_is_not_put_elsewhere(name: str) -> None:
    config = Config.from_flat({"distributed_executor_backend": name})
    with pytest.raises(ConfigError, match=f"the {name} executor is for the engines of a world"):
        OneEngine(config, load_model_config(default_model()))
