"""The engine in a process that somebody else started as one of several: no coordinator, no front-end, no driver.

generate() is everybody's: each process calls it as often as the others, with the requests of its own DP rank, and
returns once all ranks are done; who has no work left keeps stepping, because the others' tokens need its experts.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import msgspec
import torch

from moe_serve.base.commands import WorkerFacts
from moe_serve.base.config import Config
from moe_serve.base.engine_messages import Generate
from moe_serve.base.errors import ConfigError, EngineError
from moe_serve.base.launched import LaunchedProcess
from moe_serve.base.model_config import ModelConfig
from moe_serve.base.progress import Progress
from moe_serve.engine.alone import OnEvent
from moe_serve.engine.build import build_core
from moe_serve.engine.core import EngineCore
from moe_serve.engine.dp import DPRank
from moe_serve.engine.gathering import REMIND_SECONDS, SEED_BITS, Gathering
from moe_serve.eplb.first_placement import placement_digest
from moe_serve.executor.choose import choose_executor

log = logging.getLogger(__name__)
_worlds = itertools.count(1)
"""Of this process: every process makes as many, in the same order."""


class Closable(Protocol):
    def close(self) -> None: ...


class LaunchedEngine:
    """`process` what this one was told; `token` the secret that all of them know, "" where there is none.

    Raises ConfigError where the processes were given different options, RankTimeout naming who has not come.
    """

    def __init__(self, config: Config, model: ModelConfig, process: LaunchedProcess, *, token: str) -> None:
        self._process = process
        self._topology = config.parallel.topology
        patience = config.parallel.start_timeout_seconds
        gathering = self._gathering = Gathering(
            process,
            self._topology,
            config.agreement() | {"expert_placement": placement_digest(config.parallel, model)},
            token=f"{token} {process.run} {next(_worlds)}",
            patience=patience,
        )
        self._executor = choose_executor(config)(config, gathering.meeting(), Progress())
        owned: list[Closable] = [self._executor]
        # torch ends the process by a signal where its groups outlive the interpreter, as in a script that keeps its LLM
        # in a global and never closes it.
        self.close = weakref.finalize(self, _close_all, owned)
        facts = self._executor.start()
        voters = process.voters(self._topology)
        self._votes = gathering.group("engines", voters, config.scheduler.step_timeout_seconds * 1.5)
        owned.append(self._votes)
        self._calls = gathering.group("calls", range(process.size), patience)
        owned += [self._calls, gathering]
        self._rank = self._make_rank(config, model, facts)
        gathering.shut_doors()

    def run(self, sequences: list[Generate], on_event: OnEvent) -> None:
        """See OneEngine.run; returns when all processes are done. ConfigError, in all of them, if ranks of one engine
        were given different sequences."""
        self._compare(sequences)
        core = self._rank.core
        names = [sequence.request_id for sequence in sequences]
        failure: Exception | None = None
        try:
            for sequence in sequences:
                core.add(sequence.request_id, sequence.token_ids, sequence.sampling)
            self._until_all_done(on_event)
        except EngineError:
            raise
        except Exception as error:  # noqa: BLE001 - the caller's: the others go on, and need this rank's experts
            core.abort(names)
            self._until_all_done(lambda _: True)
            failure = error
        except BaseException:
            core.abort(names)
            raise
        self._part()
        if failure is not None:
            raise failure

    @property
    def core(self) -> EngineCore:
        """For whoever wants to look."""
        return self._rank.core

    def _make_rank(self, config: Config, model: ModelConfig, facts: WorkerFacts) -> DPRank:
        core = build_core(
            self._executor,
            config,
            model,
            facts,
            num_blocks=self._calls.sync_kv_cache_blocks(facts.kv_blocks),
            draw_seed=seeds(self._gathering.run_seed, self._process.dp_rank(self._topology)),
        )
        return DPRank(core, self._votes, progress=Progress())

    # -- one call of all --

    def _compare(self, sequences: Sequence[Generate]) -> None:
        """Wait until every process has come with its sequences; those of one engine must have the same."""
        own = digest(sequences)
        digests = {self._process.number: own}
        with _reminding(lambda: min(set(range(self._process.size)) - set(digests), default=self._process.number)):
            for number, answer in self._ask_all(own):
                if isinstance(answer, EngineError):
                    raise type(answer)(
                        f"process {number} did not come to this call of generate(): {answer}"
                    ) from answer
                digests[number] = answer
        for first in range(0, self._process.size, len(self._process.engine_processes(self._topology))):
            check_same(digests, range(first, first + len(self._process.engine_processes(self._topology))))

    def _until_all_done(self, on_event: OnEvent) -> None:
        rank = self._rank
        while not rank.naps.asleep:
            for event in rank.turn():
                if on_event(event) and event.finish_reason is None:
                    rank.core.abort([event.request_id])
        rank.naps.wake_up()

    def _part(self) -> None:
        """Whoever returns may end its process, so first all must have everybody's last vote. Who is gone had it."""
        for _ in self._ask_all(0):
            pass

    def _ask_all(self, value: int) -> Iterator[tuple[int, int | EngineError]]:
        """Tell all others a number; the number of each, or why there is none: so who is missing has a name."""
        group = self._calls.group
        told = torch.tensor([value], dtype=torch.int64)
        others = [place for place in range(group.size) if place != group.rank]
        sent = []
        for place in others:
            with contextlib.suppress(EngineError):  # receiving says it
                sent.append(group.start_send(told, place))
        for place in others:
            try:
                yield place, int(group.receive(torch.empty(1, dtype=torch.int64), place).item())
            except EngineError as error:
                yield place, error
        for pending in sent:
            with contextlib.suppress(EngineError):
                pending.wait()


def _close_all(owned: Sequence[Closable]) -> None:
    for each in owned:
        each.close()


def seeds(run_seed: int, dp: int) -> Callable[[], int]:
    """For requests that bring none: other seeds in every run and DP rank, the same in all ranks of an engine."""
    numbers = itertools.count()

    def draw() -> int:
        return _number(f"{run_seed} {dp} {next(numbers)}".encode())

    return draw


def digest(sequences: Sequence[Generate]) -> int:
    """A number that stands for sequences: their names, tokens and sampling parameters, in order."""
    return _number(msgspec.msgpack.encode(list(sequences)))


def check_same(digests: Mapping[int, int], processes: Sequence[int]) -> None:
    """ConfigError if one of these processes, which are one engine, has another digest than the first."""
    first = processes[0]
    others = [number for number in processes if digests[number] != digests[first]]
    if others:
        raise ConfigError(
            f"generate() was given other requests in {_named(others)} than in process {first}: tensor- and "
            f"pipeline-parallel ranks of one data-parallel rank ({_named(processes)}) must all be given the same "
            "prompts and sampling parameters, in the same order, as often"
        )


@contextlib.contextmanager
def _reminding(missing: Callable[[], int]) -> Iterator[None]:
    """Say now and then for which process this one waits, meanwhile."""
    over = threading.Event()

    def remind() -> None:
        begun = time.monotonic()
        while not over.wait(REMIND_SECONDS):
            waited = time.monotonic() - begun
            log.warning("waiting for process %d to call generate(), as all must, %.0f s", missing(), waited)

    threading.Thread(target=remind, name="reminder", daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _named(processes: Sequence[int]) -> str:
    return ("processes " if len(processes) > 1 else "process ") + ", ".join(map(str, processes))


def _number(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest()) >> (64 - SEED_BITS)
