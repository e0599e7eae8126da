"""Whole worlds whose workers are actors of a real Ray: LLM, a server, LLM inside a placement group; their ends."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

pytest.importorskip("ray")

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from moe_serve import LLM, SamplingParams
from moe_serve.base.config import Config
from moe_serve.base.errors import ConfigError
from moe_serve.cli.random_model import make_model
from moe_serve.executor.ray_settings import import_path
from moe_serve.launch.ray_engines import RayEngines
from moe_serve.launch.resolve import resolve
from tests.support.ray_cluster import NODES, RayNodes, groups_that_stand, wait_clean, worker_processes
from tests.support.server import Server, serving
from tests.support.worker_classes import GREETINGS

pytestmark = [
    pytest.mark.long,
    pytest.mark.ranks,
    pytest.mark.filterwarnings("ignore"),  # Ray's own
]
Answer = tuple[list[int], str]
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
PROMPTS = [[5, 6, 7, 8, 9], list(range(30, 60)), [99, 3]]
NAMED_SECONDS = 10.0
RAY_ENGINES = ("--data-parallel-backend", "ray", "--dtype", "float32")
RAY = ("--distributed-executor-backend", "ray", "--dtype", "float32")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_model(tmp_path_factory.mktemp("ray") / "tiny"))


@pytest.fixture(scope="module")
def nodes() -> Iterator[RayNodes]:
    with RayNodes() as nodes:
        yield nodes


@pytest.fixture(scope="module")
def alone(model: str) -> list[Answer]:
    return answers(model)[1]


def answers(model: str, **options: Any) -> tuple[str | None, list[Answer]]:
    """The executor that was chosen, and what it gave."""
    with LLM(model, dtype="float32", **options) as llm:
        outputs = [output.outputs[0] for output in llm.generate(PROMPTS, GREEDY, show_progress=False)]
        backend = llm.config.parallel.distributed_executor_backend
    return backend, [(list(output.token_ids), output.text) for output in outputs]


@pytest.mark.parametrize(
    "options",
    [
        {"tensor_parallel_size": 2, "enable_expert_parallel": True},
        {"pipeline_parallel_size": 2},
        {"data_parallel_size": 2, "tensor_parallel_size": 2, "enable_expert_parallel": True},
    ],
    ids=lambda options: " ".join(f"{name.split('_')[0]}={size}" for name, size in options.items()),
)
def test_llm_gives_the_tokens_of_one_rank_and_leaves_nothing(
    nodes: RayNodes, model: str, alone: list[Answer], options: dict[str, Any]
) -> None:
    before = groups_that_stand()
    assert answers(model, distributed_executor_backend="ray", **options) == ("ray", alone)
    wait_clean(before)


def test_engines_on_two_nodes_give_the_tokens_of_one_rank_drain_and_leave_nothing(
    nodes: RayNodes, model: str, alone: list[Answer]
) -> None:
    sizes = ("-dp", "2", "-dpl", "1", "-tp", "2", "--enable-expert-parallel")
    with serving(model, *sizes, *RAY_ENGINES, "--ray-address", nodes.address) as server:
        assert places_of_engines(server.log()) == [("0", NODES[0]), ("1", NODES[1])]
        assert sorted(kind_of(each) for each in worker_processes()) == ["EngineActor"] * 2 + ["WorkerActor"] * 4
        assert [node_of(engine_pid(server, dp)) for dp in (0, 1)] == list(NODES)
        for rank in ("0", "1"):
            for prompt, (_, text) in zip(PROMPTS, alone, strict=True):
                assert complete_at(server, rank, prompt) == text
        assert token_is_nowhere(server.token)
        with ThreadPoolExecutor() as pool:
            long = pool.submit(server.complete, PROMPTS[0], max_tokens=100, ignore_eos=True)
            while not running(server):
                assert not long.done()
            assert server.terminate() == 0
            assert long.result()["usage"]["completion_tokens"] == 100
        assert "*** SIGTERM" not in server.log()
        assert not re.search(r"ERROR +\[", server.log()), "but for what Ray says of actors that end themselves"
        wait_clean(set())


def places_of_engines(log: str) -> list[tuple[str, str]]:
    """DP rank and node, as the launcher says them."""
    return re.findall(r"engine dp (\d) goes to (\S+), bundles", log)


def node_of(pid: int) -> str:
    """By the Ray process that started it."""
    parent = psutil.Process(pid).parent()
    assert parent is not None
    return re.findall(r"--node_ip_address=(\S+)", " ".join(parent.cmdline()))[0]


def kind_of(process: psutil.Process) -> str:
    """The actor's class."""
    return str(process.cmdline()[0].removeprefix("ray::").partition(".")[0])


def complete_at(server: Server, rank: str, prompt: list[int]) -> str:
    body = {"prompt": prompt, "temperature": 0, "max_tokens": 24, "ignore_eos": True}
    response = server.post("/v1/completions", body, {"X-data-parallel-rank": rank})
    return str(response.json()["choices"][0]["text"])


def running(server: Server) -> float:
    """Requests in the engines, by the metrics."""
    found = re.findall(r"^\S*num_requests_running\S* (\S+)$", server.get("/metrics").text, re.MULTILINE)
    return sum(map(float, found))


def test_engines_in_a_given_group_are_whole_on_a_node_first_and_workers_are_what_python_says(
    nodes: RayNodes, model: str, alone: list[Answer], tmp_path: Path
) -> None:
    """The second engine lies over both nodes."""
    group = placement_group([{"CPU": 0.05, f"node:{NODES[at]}": 0.01} for at in (1, 0, 0, 0)])
    assert group.wait(30)
    options = {"data_parallel_size": 2, "pipeline_parallel_size": 2, "data_parallel_backend": "ray"}
    engines = RayEngines(settled(model, ray_placement_group=group.id.hex(), **options))
    assert engines.prepare().parallel.ray_bundle_indices == "1,2,3,0"
    engines.close()
    given: dict[str, Any] = {
        "ray_placement_group": group,
        "ray_runtime_env": {"env_vars": {GREETINGS: str(tmp_path)}},
        "worker_cls": "tests.support.worker_classes.NamedWorker",
        "worker_extension_cls": "tests.support.worker_classes.Greeting",
    }
    assert answers(model, **given, **options) == ("ray", alone)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["hello from NamedWorkerWithGreeting"] * 4
    wait_clean({group.id.hex()})
    remove_placement_group(group)


def settled(model: str, **options: Any) -> Config:
    return resolve(Config.from_flat({"model": model, "dtype": "float32", **options}))[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cuda"}, r"has room for 0 of 2 engines of 1 worker \(nodes: 127.0.0.2 for 0, 127.0.0.3 for 0\)"),
        ({"data_parallel_size": 3, "data_parallel_size_local": 1}, "has room for 2 of 3 engines .*, at most 1 on a"),
        ({"ray_placement_group": "ab" * 18}, "has no placement group"),
        ({"ray_runtime_env": {"evn_vars": {}}}, "ray_runtime_env cannot be: Ray knows no evn_vars there"),
        ({"ray_runtime_env": {"working_dir": "/tmp"}}, "ray_runtime_env cannot be: /tmp is not a valid URI"),
    ],
    ids=str,
)
def test_engines_without_room_are_refused_and_nothing_is_made(
    nodes: RayNodes, model: str, options: dict[str, Any], message: str
) -> None:
    given = {"data_parallel_size": 2, "data_parallel_backend": "ray", **options}
    with pytest.raises(ConfigError, match=message):
        RayEngines(settled(model, **given)).prepare()
    assert groups_that_stand() == set()


def test_a_group_with_too_few_bundles_and_nodes_that_share_an_address_are_refused(nodes: RayNodes, model: str) -> None:
    options = {"data_parallel_size": 3, "data_parallel_backend": "ray"}
    third = nodes.add(NODES[1])
    try:
        with pytest.raises(ConfigError, match=r"share an address \(127.0.0.2: \w{8}; 127.0.0.3: \w{8}, \w{8}\)"):
            RayEngines(settled(model, **options)).prepare()
        group = placement_group([{"CPU": 0.1}] * 2)
        assert group.wait(30)
        with pytest.raises(ConfigError, match=r"has 2 bundles, 2 of them with 0.01 of a CPU, but 3 ranks"):
            RayEngines(settled(model, ray_placement_group=group.id.hex(), **options)).prepare()
        assert groups_that_stand() == {group.id.hex()}
        remove_placement_group(group)
    finally:
        nodes.cluster.remove_node(third)


def test_a_killed_engine_of_rays_is_named_with_its_node_and_nothing_stays(
    nodes: RayNodes, model: str, alone: list[Answer]
) -> None:
    server = Server(model, "-dp", "2", "-dpl", "1", *RAY_ENGINES, "--ray-address", nodes.address)
    try:
        server.wait_ready()
        assert complete_at(server, "1", PROMPTS[1]) == alone[1][1]
        pid = engine_pid(server, 1)
        os.kill(pid, signal.SIGKILL)
        assert server.process.wait(NAMED_SECONDS) == 1
        assert re.search(rf"engine dp 1 \(pid {pid} on \S+\) died", server.log())
        assert re.search(rf"engine dp 1 \(Ray actor \w+ on {NODES[1]}\) was killed or crashed", server.log())
        wait_clean(set())
        assert not server.wait_gone(NAMED_SECONDS)
    finally:
        server.end()


def engine_pid(server: Server, dp: int) -> int:
    members = server.get("/world").json()["world"]["members"]
    return next(int(each["pid"]) for each in members if each["role"] == "engine" and each["dp"] == dp)


class Holder:
    """A program of somebody's inside a placement group, which asks for no executor."""

    def run(self, model: str) -> tuple[str | None, list[Answer]]:
        return answers(model, tensor_parallel_size=2)


def test_llm_inside_a_placement_group_uses_it_by_itself(nodes: RayNodes, model: str, alone: list[Answer]) -> None:
    group = placement_group([{"CPU": 0.5}, {"CPU": 0.5}], strategy="STRICT_SPREAD")
    assert group.wait(30)
    holder: Any = (
        ray.remote(Holder)
        .options(
            num_cpus=0.5,
            runtime_env={"env_vars": import_path()},
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0),
        )
        .remote()
    )
    running = holder.run.remote(model)
    assert ray.get(running, timeout=120) == ("ray", alone)
    ray.kill(holder)
    wait_clean({group.id.hex()})
    remove_placement_group(group)


def test_a_server_gives_the_tokens_of_one_rank_in_named_bundles_and_its_end_leaves_nothing(
    nodes: RayNodes, model: str, alone: list[Answer]
) -> None:
    group = placement_group([{"CPU": 0.2}, {"CPU": 0.2}, {"CPU": 0.2}])
    assert group.wait(30)
    where = ("--ray-address", nodes.address, "--ray-placement-group", group.id.hex())
    environment = {**os.environ, "MOE_SERVE_RAY_BUNDLE_INDICES": "2,0"}
    with serving(model, "-tp", "2", *RAY, *where, environment=environment) as server:
        for prompt, (_, text) in zip(PROMPTS, alone, strict=True):
            assert server.complete(prompt, max_tokens=24, ignore_eos=True)["choices"][0]["text"] == text
        assert len(worker_processes()) == 2
        assert sorted(re.findall(r"worker \d goes to bundle (\d)", server.log())) == ["0", "2"]
        assert token_is_nowhere(server.token)
        assert server.terminate() == 0
        wait_clean({group.id.hex()})
    remove_placement_group(group)


def token_is_nowhere(token: str) -> bool:
    """In no environment or command line of a worker's process, and in none of Ray's logs."""
    logs = Path(ray._private.worker._global_node.get_logs_dir_path())
    told = [" ".join([*each.cmdline(), *each.environ().values()]) for each in worker_processes()]
    told += [file.read_text(errors="replace") for file in logs.rglob("*") if file.is_file()]
    return not any(token in text for text in told)


@pytest.mark.parametrize("who", ["worker", "engine", "launcher"])
def test_whoever_is_killed_is_named_in_time_and_nothing_stays(nodes: RayNodes, model: str, who: str) -> None:
    server = Server(model, "-tp", "2", *RAY, "--ray-address", nodes.address)
    try:
        server.wait_ready()
        workers = worker_processes()
        victim = {
            "worker": lambda: workers[0],
            "engine": lambda: server.member("engine.process"),
            "launcher": lambda: psutil.Process(server.process.pid),
        }[who]()
        os.kill(victim.pid, signal.SIGKILL)
        code = server.process.wait(NAMED_SECONDS)
        if who != "launcher":
            assert code == 1
            assert f"pid {victim.pid}" in server.log()
        wait_clean(set())
        assert not server.wait_gone(NAMED_SECONDS)
    finally:
        server.end()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--device", "cuda"), "the Ray cluster has 0 GPUs, 0 of them free, but 2 workers need one each"),
        (("--ray-placement-group", "ab" * 18), "the Ray cluster has no placement group"),
        (("--ray-address", "127.0.0.1:1"), "no Ray cluster answers at 127.0.0.1:1"),
        (("-dp", "2", "-dpb", "ray", "--device", "cuda"), "the Ray cluster has room for 0 of 2 engines of 2 workers"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_what_only_the_cluster_can_say_is_refused_with_code_2(
    nodes: RayNodes, model: str, options: tuple[str, ...], message: str
) -> None:
    server = Server(model, "-tp", "2", *RAY, "--ray-address", nodes.address, *options)
    try:
        assert server.process.wait(60) == 2, server.log()
        assert message in server.log()
        assert "Traceback" not in server.log()
        wait_clean(set())
        assert not server.wait_gone(NAMED_SECONDS)
    finally:
        server.end()


def test_a_mistake_of_the_cluster_reaches_the_caller_of_llm(nodes: RayNodes, model: str) -> None:
    with pytest.raises(ConfigError, match="the Ray cluster has 0 GPUs"):
        answers(model, tensor_parallel_size=2, distributed_executor_backend="ray", device="cuda")
    wait_clean(set())
