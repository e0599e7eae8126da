"""One engine's loop: schedule, begin a flight, end it. Knows no sockets and no other ranks; one thread uses it.

With pipeline stages as many flights are in the air as there are stages, so that each has one to compute.
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Callable, Collection, Iterable

import msgspec

from moe_serve.base.commands import Failed, Reply, StepPlan, StepResult
from moe_serve.base.config import Config
from moe_serve.base.engine_messages import LoadReport, TokenEvent
from moe_serve.base.errors import ConfigError, EngineError, RankTimeout, RequestError
from moe_serve.base.sampling import SamplingParams
from moe_serve.engine.block_pool import BlockPool
from moe_serve.engine.flight import Flight, StepOutcome
from moe_serve.engine.halving import Thresholds
from moe_serve.engine.request import check_request, make_request
from moe_serve.engine.scheduler import Scheduler
from moe_serve.executor.base import Executor


def draw_seed() -> int:
    """A seed for a request that brings none; not guessable from other requests' seeds."""
    return secrets.randbits(63)


class EngineCore:
    """`name` is how messages call this engine's workers. `max_flights` in the air at once; None: one for each stage.

    After an EngineError of `end` the flight is still in the air: `revert` it, or let the core go.
    """

    def __init__(
        self,
        executor: Executor,
        *,
        config: Config,
        num_blocks: int,
        max_model_len: int,
        vocab_size: int,
        eos_token_ids: Collection[int],
        step_timeout: float | None = None,
        name: str = "this engine",
        draw_seed: Callable[[], int] = draw_seed,
        max_flights: int | None = None,
    ) -> None:
        block_size = config.cache.block_size
        if num_blocks * block_size < max_model_len:
            raise ConfigError(
                f"{num_blocks} KV blocks of {block_size} tokens cannot hold one sequence of max_model_len "
                f"({max_model_len}) tokens; lower --max-model-len or raise --kv-cache-memory-bytes"
            )
        self.executor = executor
        self.max_model_len = max_model_len
        self.vocab_size = vocab_size
        self.eos_token_ids = frozenset(token for token in eos_token_ids if 0 <= token < vocab_size)
        self.step_timeout = step_timeout or config.scheduler.step_timeout_seconds
        self.name = name
        self.draw_seed = draw_seed
        self.max_flights = max_flights or config.parallel.pipeline_parallel_size
        self.in_air: deque[Flight] = deque()  # oldest first
        self.pool = BlockPool(num_blocks, block_size, caching=config.cache.enable_prefix_caching)
        self.scheduler = Scheduler(
            self.pool,
            max_num_seqs=config.scheduler.max_num_seqs,
            max_num_batched_tokens=config.scheduler.max_num_batched_tokens,
            max_flights=self.max_flights,
        )
        self._halving = Thresholds.of(config.parallel)
        self._load = LoadReport()
        self._begun = 0

    @property
    def has_work(self) -> bool:
        """Requests to serve, or flights in the air (of requests that were aborted, say)."""
        return self.scheduler.has_work or bool(self.in_air)

    @property
    def is_full(self) -> bool:
        """No stage would be free for another flight."""
        return len(self.in_air) >= self.max_flights

    def step(self) -> list[TokenEvent]:
        """One step without other DP ranks: begin a flight, and end the oldest if no other can be begun."""
        plan = self.schedule()
        if plan.scheduled:
            self._begun += 1
            self.begin(msgspec.structs.replace(plan, step=self._begun))
        if self.in_air and (self.is_full or not plan.scheduled):
            return self.end(self.in_air[0]).events
        return []

    def schedule(self) -> StepPlan:
        """The next step, in halves if this engine alone had to decide that."""
        plan = self.scheduler.schedule()
        return msgspec.structs.replace(plan, in_halves=True) if self._halving.wants_halves(plan) else plan

    def begin(self, plan: StepPlan) -> Flight:
        """Give a plan (a dummy one too) to the workers, who carry plans out in the order in which they get them."""
        self.in_air.append(Flight(plan, self.executor.submit(plan)))
        return self.in_air[-1]

    def end(self, flight: Flight) -> StepOutcome:
        """Wait for what a flight gave and book it; flights may end in another order than they began."""
        plan, result = flight.plan, self._wait(flight)
        self.in_air.remove(flight)
        load = self._load
        self._load = msgspec.structs.replace(
            load,
            step=max(load.step, plan.step),
            steps=load.steps + 1,
            dummy_steps=load.dummy_steps + (not plan.scheduled),
            all2all_seconds=load.all2all_seconds + result.all2all_seconds,
            padding_tokens=load.padding_tokens + result.padding_rows,
        )
        return StepOutcome(self.scheduler.update(plan, result), result)

    def revert(self, flight: Flight) -> None:
        """Put a flight back that failed or is given up: its requests are computed again and give the same tokens.

        Needs workers whose KV cache still holds what earlier flights wrote.
        """
        self.in_air.remove(flight)
        self.scheduler.revert(flight.plan)

    def add(self, request_id: str, token_ids: list[int], sampling: SamplingParams, *, group: str = "") -> None:
        """Queue a request; RequestError says why it cannot be served. Others are not disturbed."""
        self._check(request_id, token_ids, sampling)
        self.scheduler.add(
            make_request(
                request_id,
                token_ids,
                sampling,
                max_model_len=self.max_model_len,
                eos_token_ids=self.eos_token_ids,
                draw_seed=self.draw_seed,
                group=group,
            )
        )

    def abort(self, request_ids: Iterable[str]) -> None:
        """Forget requests and free their blocks at once; unknown ones are ignored. Gives no event."""
        self.scheduler.abort(request_ids)

    def report(self) -> LoadReport:
        """How this engine stands; what belongs to the DP group (votes, naps) is left at 0."""
        return msgspec.structs.replace(
            self._load,
            num_running=len(self.scheduler.running),
            num_waiting=len(self.scheduler.waiting),
            waiting_tokens=self.scheduler.waiting_tokens,
            free_blocks=self.pool.num_free,
            num_preemptions=self.scheduler.num_preemptions,
            prefix_cache_queries=self.pool.prefix_queries,
            prefix_cache_hits=self.pool.prefix_hits,
        )

    def _wait(self, flight: Flight) -> StepResult:
        plan = flight.plan
        try:
            reply: Reply = flight.reply.result(timeout=self.step_timeout)
        except EngineError:
            raise  # a RankTimeout of the executor's own is a TimeoutError too, and knows more
        except TimeoutError as error:
            raise RankTimeout(
                f"the workers of {self.name} did not answer step {plan.step} ({plan.num_tokens} tokens) "
                f"within {self.step_timeout:g} s (--step-timeout-seconds)"
            ) from error
        if isinstance(reply, Failed):
            raise EngineError(f"the workers of {self.name} could not run step {plan.step}: {reply.message}")
        if not isinstance(reply, StepResult):
            raise EngineError(f"the workers of {self.name} sent {type(reply).__name__} for step {plan.step}")
        return reply

    def _check(self, request_id: str, token_ids: list[int], sampling: SamplingParams) -> None:
        if self.scheduler.knows(request_id):
            raise RequestError(f"request id {request_id!r} is already in use", param="request_id")
        check_request(
            token_ids,
            sampling,
            max_model_len=self.max_model_len,
            vocab_size=self.vocab_size,
            eos_token_ids=self.eos_token_ids,
        )
