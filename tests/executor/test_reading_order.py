"""Real workers that read a real checkpoint, at most so many at a time, and give the same tokens."""

from __future__ import annotations

import pytest

from moe_serve.base.progress import Phase, Progress
from moe_serve.base.topology import Topology
from moe_serve.executor.remote import RemoteExecutor
from moe_serve.executor.uni import UniExecutor
from tests.executor.test_executors import Script, config_for, tokens_of
from tests.support.slow_reader import LOAD_SECONDS, SlowReaders
from tests.support.tiny_model import tiny_model
from tests.support.world import World

pytestmark = [pytest.mark.ranks, pytest.mark.long]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_model(folder, "qwen3_moe", seed=5)
    return folder


@pytest.fixture(scope="module")
def alone(checkpoint):
    """The tokens of one rank."""
    with World(Topology()) as world:
        executor = UniExecutor(config_for(checkpoint, load_format="auto"), world.meeting, Progress())
        executor.start()
        tokens = tokens_of(Script(executor).run())
        executor.close()
    return tokens


@pytest.mark.parametrize(("pp", "tp", "at_once"), [(1, 2, 1), (2, 1, 1), (2, 2, 1), (2, 2, 3), (1, 2, None)])
def test_at_most_so_many_workers_read_at_a_time_and_the_tokens_are_the_same(
    pp, tp, at_once, checkpoint, alone, tmp_path
):
    limit = {} if at_once is None else {"max_parallel_loading_workers": at_once}
    config = config_for(checkpoint, load_format="auto", pipeline_parallel_size=pp, tensor_parallel_size=tp, **limit)
    readers = SlowReaders(tmp_path)
    with World(Topology(pp=pp, tp=tp)) as world:
        executor = RemoteExecutor(config, world.meeting, Progress(), readers)
        try:
            facts = executor.start()
            assert tokens_of(Script(executor).run()) == alone
        finally:
            executor.close()
    times = [readers.loading(worker) for worker in range(pp * tp)]
    together = max(sum(begin <= moment < end for begin, end in times) for moment, _ in times)
    if at_once is None:
        assert together == pp * tp, "what is looked at here would show that they overlap"
        assert Phase.AWAIT_READERS.value not in facts.load_seconds
    else:
        assert together <= at_once, times
        behind_the_first = -(-pp * tp // at_once) - 1
        assert facts.load_seconds[Phase.AWAIT_READERS.value] > behind_the_first * LOAD_SECONDS - 0.01
