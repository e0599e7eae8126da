"""One script of steps through every executor, and what becomes of an engine's workers when something dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import msgspec
import psutil
import pytest
import zmq

from moe_serve.base.commands import AllocateKV, NewRequest, Scheduled, StepPlan, WorkerFacts
from moe_serve.base.config import Config
from moe_serve.base.errors import CheckpointError, ConfigError, EngineError, RankTimeout, WorkerDied
from moe_serve.base.progress import Progress
from moe_serve.base.sampling import SamplingParams
from moe_serve.base.sockets import prepare
from moe_serve.base.topology import Topology
from moe_serve.executor.choose import choose_executor
from moe_serve.executor.mp import MultiprocessExecutor
from moe_serve.executor.remote import RemoteExecutor
from moe_serve.executor.starting import RunsAlready
from moe_serve.executor.uni import UniExecutor
from moe_serve.worker import wire
from tests.support.dummy_model import dummy_model
from tests.support.worker_classes import GREETINGS
from tests.support.world import World

EXTENSION = "tests.support.worker_classes.Greeting"
WAIT = 60.0
BLOCK = 4
GREEDY = SamplingParams(temperature=0, max_tokens=20)
PROMPTS = {"a": [5, 6, 7, 8, 9], "b": list(range(30, 41)), "c": [99, 3], "again": [12, 13, 14, 15, 16, 17]}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return dummy_model(tmp_path_factory.mktemp("model"))


def config_for(model, **options):
    return Config.from_flat(
        {
            "model": str(model),
            "load_format": "dummy",
            "block_size": BLOCK,
            "device": "cpu",
            "all2all_backend": "allgather_reducescatter",  # nothing resolves "auto" here
        }
        | options
    )


def test_a_worker_class_of_somebody_elses_is_the_one_that_works(model, tmp_path, monkeypatch):
    monkeypatch.setenv(GREETINGS, str(tmp_path))
    chosen = {"worker_cls": "tests.support.worker_classes.NamedWorker", "worker_extension_cls": EXTENSION}
    with World(Topology()) as world:
        executor = UniExecutor(config_for(model, **chosen), world.meeting, Progress())
        executor.start()
        executor.close()
    assert (tmp_path / str(os.getpid())).read_text() == "hello from NamedWorkerWithGreeting"


@pytest.mark.long
def test_a_class_that_cannot_be_is_an_operators_mistake_in_processes_too(model):
    config = config_for(model, worker_extension_cls=EXTENSION.replace("Greeting", "Clashing"))
    with World(config.parallel.topology) as world:
        executor = MultiprocessExecutor(config, world.meeting, Progress())
        with pytest.raises(ConfigError, match="Clashing' has close, handle, as the worker class Worker has"):
            executor.start()
        executor.close()


class Script:
    """Steps as a scheduler plans them: whole prompts, chunks, decodes, an end, blocks used again, a dummy step."""

    def __init__(self, executor):
        self.executor = executor
        self.step = 0
        self.known = {name: list(prompt) for name, prompt in PROMPTS.items()}
        self.computed = dict.fromkeys(PROMPTS, 0)
        self.told = dict.fromkeys(PROMPTS, (0, 0))
        self.blocks = {"a": [7, 2, 4], "b": [1, 6, 3, 0], "c": [5, 8], "again": [4, 7, 2]}
        self.sampling = {
            "a": GREEDY,
            "b": SamplingParams(temperature=0.8, top_p=0.9, logprobs=2, max_tokens=20),
            "c": SamplingParams(temperature=0, prompt_logprobs=1, repetition_penalty=1.4, max_tokens=20),
            "again": GREEDY,
        }

    def part(self, name, count=None):
        start = self.computed[name]
        end = self.computed[name] = len(self.known[name]) if count is None else start + count
        num_tokens, num_blocks = self.told[name]
        self.tell(name)
        return Scheduled(
            request_id=name,
            start=start,
            num_tokens=end - start,
            new_token_ids=self.known[name][num_tokens:],
            new_block_ids=self.blocks[name][num_blocks : self.told[name][1]],
            sample=end == len(self.known[name]),
            prompt_logprobs=self.sampling[name].prompt_logprobs if start == 0 else None,
        )

    def new(self, name):
        self.tell(name)
        return NewRequest(
            request_id=name,
            token_ids=list(self.known[name]),
            num_prompt_tokens=len(PROMPTS[name]),
            block_ids=self.blocks[name][: self.told[name][1]],
            sampling=self.sampling[name],
            sampling_seed=77,
        )

    def tell(self, name):
        self.told[name] = len(self.known[name]), -(-len(self.known[name]) // BLOCK)

    def plan(self, *parts, new=(), dropped=()):
        self.step += 1
        news = [self.new(name) for name in new]
        scheduled = [self.part(*part) if isinstance(part, tuple) else self.part(part) for part in parts]
        return StepPlan(
            step=self.step,
            scheduled=scheduled,
            new=news,
            dropped=list(dropped),
            tokens_by_dp_rank=[sum(part.num_tokens for part in scheduled)],
        )

    def run(self):
        """Every StepResult, in order."""
        assert self.executor.submit(AllocateKV(9)).result(WAIT)
        results = [
            self.take(self.plan("a", ("b", 4), new=["a", "b"])),
            self.take(self.plan("a", ("b", 5))),
            self.take(self.plan("a", "b", "c", new=["c"])),
            self.take(self.plan()),
            self.take(self.plan("b", "c", dropped=["a"])),
            self.take(self.plan("again", "b", "c", new=["again"])),
        ]
        return results + [self.take(self.plan("again", "b", "c")) for _ in range(2)]

    def take(self, plan):
        result = self.executor.submit(plan).result(WAIT)
        assert result.step == plan.step
        assert [each.request_id for each in result.sampled] == [p.request_id for p in plan.scheduled if p.sample]
        for each in result.sampled:
            self.known[each.request_id].append(each.token_id)
        return result


@pytest.fixture(scope="module")
def alone(model):
    """(facts, results) of the script in one process."""
    config = config_for(model)
    with World(Topology()) as world:
        executor = UniExecutor(config, world.meeting, Progress())
        facts = executor.start()
        results = Script(executor).run()
        executor.close()
    return facts, results


def tokens_of(results):
    return [[(each.request_id, each.token_id) for each in result.sampled] for result in results]


def logprobs_of(result):
    chosen = [each.logprob for each in result.sampled if each.logprob]
    return chosen + [each for found in result.prompt_logprobs.values() for each in found]


class Pair:
    """An engine of two tensor-parallel workers. Outsiders come to the door while it starts."""

    def __init__(self, model, **options):
        self.config = config_for(model, tensor_parallel_size=2, enable_expert_parallel=True, **options)
        self.world = World(Topology(tp=2))

    def __enter__(self):
        self.world.__enter__()
        self.before = set(psutil.Process().children())
        self.executor = MultiprocessExecutor(self.config, self.world.meeting, Progress())
        return self

    def __exit__(self, *_):
        self.executor.close()
        self.world.__exit__()
        assert not self.children()

    def children(self):
        return set(psutil.Process().children()) - self.before

    def workers(self):
        return sorted(self.children(), key=lambda process: invitation_of(process).worker)


def invitation_of(process):
    return wire.Invitation.from_environment(process.environ())


def first_invitation(pair):
    """What the first worker was told, as soon as it runs its own program."""
    deadline = time.monotonic() + WAIT
    while time.monotonic() < deadline:
        told = [child for child in pair.children() if wire.ENVIRONMENT in child.environ()]
        if told:
            return invitation_of(told[0])
        time.sleep(0.001)
    raise TimeoutError("no worker was started")


@pytest.fixture(scope="module")
def pair(model):
    """A pair that has run the script; tests look at what came of it and need not leave it alive."""
    with Pair(model) as pair:
        answers = {}
        knocking = threading.Thread(target=knock, args=(pair, answers))
        knocking.start()
        pair.facts = pair.executor.start()
        knocking.join(WAIT)
        pair.answers = answers
        pair.results = Script(pair.executor).run()
        yield pair


@pytest.mark.ranks
def test_two_tensor_ranks_give_the_tokens_of_one(pair, alone):
    facts, results = alone
    assert tokens_of(pair.results) == tokens_of(results)
    assert isinstance(pair.facts, WorkerFacts)
    assert pair.facts.kv_block_bytes == facts.kv_block_bytes
    assert facts.weight_bytes < pair.facts.weight_bytes < 1.5 * facts.weight_bytes


@pytest.mark.ranks
def test_log_probabilities_come_from_the_first_rank_and_are_close(pair, alone):
    for here, there in zip(pair.results, alone[1], strict=True):
        ours, theirs = logprobs_of(here), logprobs_of(there)
        assert [each.token_id for each in ours] == [each.token_id for each in theirs]
        assert [each.logprob for each in ours] == pytest.approx([each.logprob for each in theirs], abs=1e-4)
    assert sum(len(found) for result in pair.results for found in result.prompt_logprobs.values()) == 1


@pytest.mark.ranks
def test_who_has_no_place_is_refused_and_who_does_not_know_the_token_is_not_heard(pair):
    assert pair.answers["wrong token"] is None
    assert isinstance(pair.answers["no such rank"], wire.Rejected)
    assert pair.answers["nonsense"] is None


@pytest.mark.ranks
def test_a_worker_that_fails_says_which_and_why(pair):
    plan = StepPlan(
        step=50,
        scheduled=[Scheduled(request_id="nobody", start=0, num_tokens=1)],
        tokens_by_dp_rank=[1],
    )
    with pytest.raises(EngineError, match=r"worker rank \d \(dp 0, tp \d\).*KeyError"):
        pair.executor.submit(plan).result(WAIT)


def knock(pair, answers):
    """Say hello as nobody should, before the real workers (which first import torch) do."""
    address = first_invitation(pair).address
    token = pair.world.meeting.token
    hellos = {
        "wrong token": ("some other token", wire.encode(wire.Join(worker=0, pid=1, host="h"))),
        "no such rank": (token, wire.encode(wire.Join(worker=2, pid=1, host="h"))),
        "nonsense": (token, b"\x80\x04cos\nsystem\n"),
    }
    with zmq.Context() as context:
        for name, (token, hello) in hellos.items():
            with prepare(context.socket(zmq.DEALER), token, listens=False) as door:
                door.connect(address)
                door.send(hello)
                patience = 10_000 if name == "no such rank" else 500
                answers[name] = wire.decode_to_worker.decode(door.recv()) if door.poll(patience) else None


@pytest.mark.ranks
def test_a_stopped_worker_is_named_when_a_step_takes_too_long_and_a_killed_one_at_once(model):
    with Pair(model) as pair:
        pair.executor.start()
        first, second = pair.workers()
        assert pair.executor.submit(AllocateKV(8)).result(WAIT)
        second.send_signal(signal.SIGSTOP)
        step = pair.executor.submit(StepPlan(step=1, scheduled=[], tokens_by_dp_rank=[0]))
        with pytest.raises(RankTimeout) as late:
            step.result(1.0)
        assert f"rank 1 (dp 0, tp 1), pid {second.pid}" in str(late.value)
        assert f"pid {first.pid}" not in str(late.value)
        assert "step 1" in str(late.value)
        second.kill()
        started = time.monotonic()
        with pytest.raises(WorkerDied, match=rf"rank 1 \(dp 0, tp 1\), pid {second.pid}.*SIGKILL"):
            step.result(WAIT)
        assert time.monotonic() - started < 5
        with pytest.raises(WorkerDied, match="SIGKILL"):
            pair.executor.submit(StepPlan(step=2, scheduled=[], tokens_by_dp_rank=[0])).result(WAIT)


@pytest.mark.ranks
def test_the_operators_mistakes_in_a_worker_come_out_as_such(model, tmp_path):
    with Pair(model, load_format="auto") as pair, pytest.raises(CheckpointError, match="safetensors"):
        pair.executor.start()


class Elsewhere:
    """Workers that somebody else starts, who was told nothing but the invitations."""

    def __init__(self, model):
        self.config = config_for(model, tensor_parallel_size=2, enable_expert_parallel=True)
        self.world = World(Topology(tp=2))
        self.processes = {}

    def start(self, worker, invitation):
        self.processes[worker] = subprocess.Popen(
            [sys.executable, "-m", "moe_serve.worker.process"], env=invitation.to_environment()
        )

    def __enter__(self):
        self.world.__enter__()
        self.executor = RemoteExecutor(self.config, self.world.meeting, Progress(), RunsAlready(self.start))
        return self

    def __exit__(self, *_):
        self.executor.close()
        self.world.__exit__()
        for process in self.processes.values():
            process.kill()
            process.wait()


@pytest.mark.ranks
@pytest.mark.long
def test_workers_that_somebody_else_started_serve_as_well_and_go_when_the_engine_is_done(model, alone):
    with Elsewhere(model) as elsewhere:
        assert elsewhere.executor.start().kv_block_bytes == alone[0].kv_block_bytes
        assert tokens_of(Script(elsewhere.executor).run()) == tokens_of(alone[1])
        elsewhere.executor.close()
        assert [process.wait(5) for process in elsewhere.processes.values()] == [0, 0]


@pytest.mark.ranks
@pytest.mark.long
def test_a_killed_worker_of_somebody_elses_is_named_by_its_closed_connection(model):
    with Elsewhere(model) as elsewhere:
        elsewhere.executor.start()
        assert elsewhere.executor.submit(AllocateKV(8)).result(WAIT)
        victim = elsewhere.processes[1]
        victim.send_signal(signal.SIGSTOP)
        step = elsewhere.executor.submit(StepPlan(step=1, scheduled=[], tokens_by_dp_rank=[0]))
        victim.kill()
        started = time.monotonic()
        with pytest.raises(WorkerDied, match=rf"rank 1 \(dp 0, tp 1\), pid {victim.pid} on .* closed its connection"):
            step.result(WAIT)
        assert time.monotonic() - started < 5
        with pytest.raises(WorkerDied, match=rf"pid {victim.pid}"):
            elsewhere.executor.submit(StepPlan(step=2, scheduled=[], tokens_by_dp_rank=[0])).result(WAIT)


def test_workers_that_never_come_are_named_when_patience_ends(model):
    config = config_for(model, tensor_parallel_size=2)
    told = {}
    with World(Topology(tp=2)) as world:
        executor = RemoteExecutor(config, world.meeting, Progress(), RunsAlready(told.__setitem__), join_seconds=0.2)
        with pytest.raises(RankTimeout, match=r"did not join within 0.2 s: worker rank 0 .* by somebody else; "):
            executor.start()
        executor.close()
    assert [told[worker].worker for worker in range(2)] == [0, 1]


ENGINE = """
import sys
from pathlib import Path
import msgspec
from moe_serve.base.commands import Meeting
from moe_serve.base.config import Config
from moe_serve.base.progress import Progress
from moe_serve.executor.mp import MultiprocessExecutor
meeting = msgspec.json.decode(sys.argv[1], type=Meeting)
executor = MultiprocessExecutor(Config.model_validate_json(sys.argv[2]), meeting, Progress())
executor.start()
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.mark.ranks
@pytest.mark.long
def test_workers_end_when_their_engine_is_killed(model):
    config = config_for(model, tensor_parallel_size=2)
    with World(Topology(tp=2)) as world:
        command = [sys.executable, "-c", ENGINE, msgspec.json.encode(world.meeting).decode(), config.to_json()]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as engine:
            assert engine.stdout.readline() == b"ready\n"
            workers = psutil.Process(engine.pid).children()
            assert len(workers) == 2
            os.kill(engine.pid, signal.SIGKILL)
            engine.wait(WAIT)
        _, alive = psutil.wait_procs(workers, timeout=5)
        for worker in alive:
            worker.kill()
        assert not alive


def test_one_rank_runs_in_process_and_several_in_processes_of_their_own():
    assert choose_executor(Config()) is UniExecutor
    assert choose_executor(Config.from_flat({"tensor_parallel_size": 2})) is MultiprocessExecutor


def test_the_executor_of_one_rank_refuses_several(model):
    config = config_for(model, tensor_parallel_size=2)
    with World(Topology(tp=2)) as world, pytest.raises(ConfigError, match="mp"):
        UniExecutor(config, world.meeting, Progress())


def test_a_closed_executor_says_so(model):
    with World(Topology()) as world:
        executor = UniExecutor(config_for(model), world.meeting, Progress())
        executor.close()
        executor.close()
        with pytest.raises(EngineError, match="closed"):
            executor.submit(AllocateKV(1)).result(WAIT)
