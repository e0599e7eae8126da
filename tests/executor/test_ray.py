"""The script of test_executors.py through actors of a real Ray of two nodes; deaths; what cannot be."""

from __future__ import annotations

import os
import signal
import time

import pytest

pytest.importorskip("ray")

import ray
from ray.util.placement_group import placement_group, remove_placement_group

from moe_serve.base.commands import AllocateKV, StepPlan
from moe_serve.base.errors import ConfigError, WorkerDied
from moe_serve.base.progress import Progress
from moe_serve.base.topology import Topology
from moe_serve.executor.ray import RayExecutor
from moe_serve.executor.uni import UniExecutor
from tests.executor.test_executors import Script, config_for, tokens_of
from tests.support.dummy_model import dummy_model
from tests.support.ray_cluster import NODES, RayNodes, groups_that_stand, wait_clean, worker_processes
from tests.support.world import World

pytestmark = [
    pytest.mark.long,
    pytest.mark.ranks,
    pytest.mark.filterwarnings("ignore"),  # Ray's own
]
WAIT = 60.0
IDLE = StepPlan(step=1, scheduled=[], tokens_by_dp_rank=[0])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return dummy_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def alone(model):
    """(facts, results) of the script in one process."""
    with World(Topology()) as world:
        executor = UniExecutor(config_for(model), world.meeting, Progress())
        facts = executor.start()
        results = Script(executor).run()
        executor.close()
    return facts, results


@pytest.fixture(scope="module")
def nodes():
    with RayNodes() as nodes:
        yield nodes


@pytest.fixture
def spread(nodes):
    """A placement group of somebody else's: bundles 0 and 1 on a node each, 2 without a CPU, 3 on one of them."""
    bundles = [
        {"CPU": 0.1, f"node:{NODES[1]}": 0.01},
        {"CPU": 0.1, f"node:{NODES[0]}": 0.01},
        {"memory": 1},
        {"CPU": 0.1},
    ]
    group = placement_group(bundles)
    assert group.wait(WAIT)
    yield group
    remove_placement_group(group)


class OnRay:
    """An engine of two tensor-parallel workers on the Ray that surrounds this process."""

    def __init__(self, model, **options):
        options = {"tensor_parallel_size": 2, "distributed_executor_backend": "ray"} | options
        self.config = config_for(model, **options)
        self.world = World(self.config.parallel.topology)

    def __enter__(self):
        self.before = groups_that_stand()
        self.world.__enter__()
        self.executor = RayExecutor(self.config, self.world.meeting, Progress())
        return self

    def __exit__(self, *_):
        self.executor.close()
        self.executor.close()
        self.world.__exit__()
        wait_clean(self.before)

    def places(self):
        return [place.address for place in self.executor._actors._places]

    def pids(self):
        return [seat.join.pid for seat in self.executor._seats]


def test_workers_in_a_group_of_the_engines_own_give_the_tokens_of_one(nodes, model, alone):
    with OnRay(model, enable_expert_parallel=True) as engine:
        assert engine.executor.start().kv_block_bytes == alone[0].kv_block_bytes
        assert tokens_of(Script(engine.executor).run()) == tokens_of(alone[1])
        assert engine.places()[0] == NODES[0]
        assert len(groups_that_stand()) == len(engine.before) + 1
        assert len(worker_processes()) == 2


@pytest.mark.parametrize("indices", [None, "3,1"], ids=["the first that hold a CPU", "those named"])
def test_workers_in_a_given_group_are_sorted_by_node_and_the_group_is_left_alone(
    nodes,
    model,
    alone,
    spread,
    indices,
):
    given = {"ray_placement_group": spread.id.hex(), "ray_bundle_indices": indices}
    with OnRay(model, pipeline_parallel_size=2, tensor_parallel_size=1, **given) as engine:
        engine.executor.start()
        assert tokens_of(Script(engine.executor).run()) == tokens_of(alone[1])
        chosen = [place.bundle for place in engine.executor._actors._places]
        assert set(chosen) == ({0, 1} if indices is None else {1, 3})
        assert engine.places()[0] == NODES[0]
        if indices is None:
            assert chosen == [1, 0]
            assert engine.places() == list(NODES)
    assert spread.id.hex() in groups_that_stand()


@pytest.mark.parametrize("way", ["SIGKILL", "ray.kill"])
def test_a_killed_worker_is_named_at_once(nodes, model, way):
    with OnRay(model) as engine:
        engine.executor.start()
        assert engine.executor.submit(AllocateKV(8)).result(WAIT)
        victim = engine.pids()[1]
        os.kill(victim, signal.SIGSTOP)  # so that the step is under way
        step = engine.executor.submit(IDLE)
        started = time.monotonic()
        if way == "SIGKILL":
            os.kill(victim, signal.SIGKILL)
        else:
            ray.kill(engine.executor._actors._cluster._actors[1])
        with pytest.raises(
            WorkerDied, match=rf"rank 1 \(dp 0, tp 1\), pid {victim} on .* was killed or crashed \(Ray: "
        ):
            step.result(WAIT)
        assert time.monotonic() - started < 5


def test_the_workers_of_a_node_that_ends_are_named(nodes, model):
    third = nodes.add("127.0.0.4")
    group = placement_group([{"CPU": 0.1, f"node:{address}": 0.01} for address in (NODES[0], "127.0.0.4")])
    assert group.wait(WAIT)
    with OnRay(model, ray_placement_group=group.id.hex()) as engine:
        engine.executor.start()
        assert engine.places() == [NODES[0], "127.0.0.4"]
        assert engine.executor.submit(AllocateKV(8)).result(WAIT)
        started = time.monotonic()
        nodes.cluster.remove_node(third, allow_graceful=False)
        with pytest.raises(WorkerDied, match=r"rank 1 \(dp 0, tp 1\)"):
            step_until(engine.executor, started + 10)
    remove_placement_group(group)


def step_until(executor, deadline):
    """Steps that nothing is in: an actor ends when it notices that its node's Ray has."""
    while time.monotonic() < deadline:
        executor.submit(IDLE).result(WAIT)


def test_nodes_that_share_an_address_are_refused(nodes, model):
    third = nodes.add(NODES[1])
    try:
        group = placement_group([{"CPU": 0.1}] * 3, strategy="STRICT_SPREAD")
        assert group.wait(WAIT)
        given = {"ray_placement_group": group.id.hex(), "pipeline_parallel_size": 3, "tensor_parallel_size": 1}
        with (
            OnRay(model, **given) as engine,
            pytest.raises(ConfigError, match=r"share an address \(127.0.0.2: \w{8}; 127.0.0.3: \w{8}, \w{8}\)"),
        ):
            engine.executor.start()
        remove_placement_group(group)
    finally:
        nodes.cluster.remove_node(third)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cuda"}, "the Ray cluster has 0 GPUs, 0 of them free, but 2 workers need one each"),
        ({"ray_placement_group": "ab" * 18}, "the Ray cluster has no placement group '(ab)+'; give the id of one"),
        ({"ray_placement_group": "mine"}, "has no placement group 'mine'"),
        ({"load_format": "auto"}, "safetensors"),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_nothing(nodes, model, options, message):
    with OnRay(model, **options) as engine, pytest.raises(ConfigError, match=message):
        engine.executor.start()
