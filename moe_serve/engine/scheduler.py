"""Decides what an engine computes next: so many tokens of each request. No phases, no tensors, no clock.

Running requests go first, oldest first. A request is admitted only when blocks for all its known tokens are free;
when a running one cannot grow, the youngest gives up its blocks and is computed again later. So the oldest always
moves on.

Sequences of one HTTP request are a group, and groups take turns (engine/turns.py): who holds least is admitted next,
even in the place of the youngest of the largest group; and beside others a large group gets a part of a step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from moe_serve.base.commands import NewRequest, Sampled, Scheduled, StepPlan, StepResult
from moe_serve.base.engine_messages import FinishReason, TokenEvent
from moe_serve.base.errors import EngineError
from moe_serve.engine.block_pool import BlockPool, extend_chain
from moe_serve.engine.request import Request, State
from moe_serve.engine.turns import StepShares, WaitingLine


class Scheduler:
    """`schedule()` makes a plan; `update()` books its result, or `revert()` puts it back.

    `max_flights` may be in the air, and share what there is. A request is in one of them at a time: its next token
    follows from the last one. Requests may come and be aborted at any moment, also while they are in the air.
    """

    def __init__(
        self, pool: BlockPool, *, max_num_seqs: int, max_num_batched_tokens: int, max_flights: int = 1
    ) -> None:
        self.pool = pool
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_flights = max_flights
        self.running: dict[str, Request] = {}  # oldest first
        self.waiting = WaitingLine()
        self.num_preemptions = 0
        self._waiting_tokens = 0
        self._turn = 0
        self._sizes: Counter[str] = Counter()  # running requests by group
        self._dropped: list[str] = []  # the workers still know these
        self._in_air: dict[str, Request] = {}  # by id: one that was aborted keeps its id busy until it lands

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    @property
    def waiting_tokens(self) -> int:
        """Known tokens still to compute, of waiting requests and of prompts under way; not a decode's one."""
        behind = (len(request.token_ids) - request.num_computed for request in self.running.values())
        return self._waiting_tokens + sum(tokens for tokens in behind if tokens > 1)

    @property
    def unfinished(self) -> list[str]:
        """All requests here, oldest first."""
        return [*self.running, *self.waiting]

    @property
    def num_unfinished(self) -> int:
        return len(self.running) + len(self.waiting)

    def knows(self, request_id: str) -> bool:
        return request_id in self.running or request_id in self.waiting

    def add(self, request: Request) -> None:
        assert not self.knows(request.request_id)
        self.waiting.add(request)
        self._waiting_tokens += len(request.token_ids)

    def abort(self, request_ids: Iterable[str]) -> None:
        """Forget requests; unknown ones are ignored. A step in flight still computes them, for nobody."""
        for request_id in request_ids:
            request = self.running.get(request_id) or self.waiting.get(request_id)
            if request is not None:
                self._finish(request, "abort")

    def schedule(self) -> StepPlan:
        """The next step. The caller fills in `step` and the other ranks' `tokens_by_dp_rank`.

        A plan with nothing scheduled may be thrown away; any other must be handed to update() or revert().
        """
        parts: list[Scheduled] = []
        new: list[NewRequest] = []
        self._make_way()
        preemptions = self.num_preemptions
        self._turn += 1
        shares = StepShares(self.max_num_seqs, self.max_num_batched_tokens, self._sizes + self.waiting.sizes)
        budget = self._schedule_running(parts, new, self.max_num_batched_tokens, shares)
        if preemptions == self.num_preemptions:  # else the head of the queue just had to leave
            budget = self._schedule_waiting(parts, new, budget, shares)
        dropped: list[str] = []
        if parts:  # an empty plan may never reach the workers, so it must not carry news
            dropped, self._dropped = list(dict.fromkeys(self._dropped)), dropped
        return StepPlan(
            step=0,
            scheduled=parts,
            new=new,
            dropped=dropped,
            tokens_by_dp_rank=[self.max_num_batched_tokens - budget],
        )

    def update(self, plan: StepPlan, result: StepResult) -> list[TokenEvent]:
        """Book what the workers computed: tokens, ends, blocks to share; nothing for aborted requests."""
        if result.step != plan.step:
            raise EngineError(f"the workers answered step {result.step} while step {plan.step} was run")
        sampled = {token.request_id: token for token in result.sampled}
        events = []
        for request, part in self._land(plan):
            if request.state is not State.RUNNING:
                continue
            if request.request_id in result.failed:
                events.append(self._fail(request, result.failed[request.request_id]))
                continue
            request.num_computed = part.start + part.num_tokens
            if part.prompt_logprobs is not None and request.prompt_logprobs is not None:
                request.prompt_logprobs += result.prompt_logprobs.get(request.request_id, [])
            self._publish(request)
            if part.sample:
                events.append(self._advance(request, sampled.get(request.request_id)))
        return events

    def revert(self, plan: StepPlan) -> None:
        """Everything as if the plan had never been made, whether the workers have carried it out or not.

        A request keeps its blocks and what was computed before the plan. What the workers know of it is uncertain,
        so they forget it and get it whole with its next part.
        """
        for request, _ in self._land(plan):
            if request.state is State.RUNNING:
                request.sent_tokens = request.sent_blocks = 0
                self._dropped.append(request.request_id)
        # An id that was free when the plan was made may since belong to a request in a later flight.
        self._dropped += [name for name in plan.dropped if not self._is_sent(name)]

    def _land(self, plan: StepPlan) -> list[tuple[Request, Scheduled]]:
        return [(self._in_air.pop(part.request_id), part) for part in plan.scheduled]

    def _is_sent(self, request_id: str) -> bool:
        request = self.running.get(request_id)
        return request is not None and request.sent_tokens > 0

    def _make_way(self) -> None:
        """Let the next in line have places and blocks of the group that holds most, while that has two more than it."""
        if not self.waiting:
            return
        request = self.waiting.first(self._sizes)
        num_blocks = -(-len(request.token_ids) // self.pool.block_size)
        while len(self.running) >= self.max_num_seqs or self.pool.num_free < num_blocks:
            group, most = self._sizes.most_common(1)[0] if self._sizes else ("", 0)
            held = (each for each in reversed(self.running.values()) if each.group == group)
            victim = next((each for each in held if each.request_id not in self._in_air), None)
            if victim is None or most < self._sizes[request.group] + 2:
                return
            self._preempt(victim)

    def _schedule_running(self, parts: list[Scheduled], new: list[NewRequest], budget: int, shares: StepShares) -> int:
        """Give each running request its next tokens; returns what is left of the budget."""
        places = -(-len(self.running) // self.max_flights)
        # Who went without longest is first, of those the oldest.
        for request in sorted(self.running.values(), key=lambda request: request.last_turn):
            if request.request_id in self._in_air:
                continue
            if not budget or len(parts) == places:
                break
            if request.state is not State.RUNNING:
                continue  # preempted by one that was served before it
            num_tokens = shares.allow(request, budget)
            if not num_tokens:
                continue
            if not self._make_room(request, request.num_computed + num_tokens):
                if request.state is State.RUNNING:
                    break
                continue
            budget -= self._plan(request, num_tokens, parts, new, shares)
        return budget

    def _schedule_waiting(self, parts: list[Scheduled], new: list[NewRequest], budget: int, shares: StepShares) -> int:
        places = -(-min(self.max_num_seqs, len(self.running) + len(self.waiting)) // self.max_flights)
        while self.waiting and budget and len(parts) < places and len(self.running) < self.max_num_seqs:
            request = self.waiting.first(self._sizes)
            if not shares.allow(request, budget):
                others = self.waiting.in_turn(self._sizes)
                request = next((each for each in others if shares.allow(each, budget)), request)
            if request.request_id in self._in_air or not shares.allow(request, budget):
                break
            if not self._admit(request):
                break
            budget -= self._plan(request, shares.allow(request, budget), parts, new, shares)
        return budget

    def _plan(
        self,
        request: Request,
        num_tokens: int,
        parts: list[Scheduled],
        new: list[NewRequest],
        shares: StepShares,
    ) -> int:
        shares.take(request, num_tokens)
        request.last_turn = self._turn
        self._introduce(request, new)
        parts.append(self._part(request, num_tokens))
        return num_tokens

    def _introduce(self, request: Request, new: list[NewRequest]) -> None:
        """Tell the workers all about a request that they do not know."""
        if not request.sent_tokens:
            new.append(request.as_new())
            request.sent_tokens, request.sent_blocks = len(request.token_ids), len(request.blocks)

    def _make_room(self, request: Request, num_tokens: int) -> bool:
        """Have blocks for `num_tokens`, at the cost of younger requests; False if it had to go itself or must wait.

        Who is in the air keeps its blocks, since the workers are writing to them. An older one is not taken instead:
        the youngest lands soon.
        """
        missing = -(-num_tokens // self.pool.block_size) - len(request.blocks)
        if missing <= 0:
            return True
        while (blocks := self.pool.allocate(missing)) is None:
            victim = next(reversed(self.running.values()))
            if victim.request_id in self._in_air:
                return False
            self._preempt(victim)
            if victim is request:
                return False
        request.blocks += blocks
        return True

    def _preempt(self, request: Request) -> None:
        self.pool.release(request.blocks)
        request.rewind()
        self._stop_running(request)
        self.waiting.put_back(request)
        self._waiting_tokens += len(request.token_ids)
        self._dropped.append(request.request_id)
        self.num_preemptions += 1

    def _admit(self, request: Request) -> bool:
        """Start a waiting request if blocks for all its known tokens can be had."""
        shared = self._find_prefix(request)
        num_blocks = -(-len(request.token_ids) // self.pool.block_size)
        blocks = self.pool.allocate(num_blocks - len(shared), shared)
        if blocks is None:
            return False
        request.blocks = blocks
        request.num_published = len(shared)
        request.num_computed = len(shared) * self.pool.block_size
        if request.num_cached is None:  # a preempted request that finds its own blocks again is no hit
            request.num_cached = request.num_computed
            if self.pool.caching and request.prompt_logprobs is None:
                self.pool.count_query(request.num_prompt, request.num_cached)
        self.waiting.remove(request)
        self._waiting_tokens -= len(request.token_ids)
        request.state = State.RUNNING
        self.running[request.request_id] = request
        self._sizes[request.group] += 1
        return True

    def _stop_running(self, request: Request) -> None:
        del self.running[request.request_id]
        self._sizes[request.group] -= 1
        if not self._sizes[request.group]:
            del self._sizes[request.group]

    def _find_prefix(self, request: Request) -> list[int]:
        """Published blocks the request can use; its last token is always computed, to give the next one."""
        if not self.pool.caching or request.prompt_logprobs is not None:
            return []
        usable = (len(request.token_ids) - 1) // self.pool.block_size
        extend_chain(request.chain, request.token_ids, usable, self.pool.block_size)
        return self.pool.find(request.chain[:usable])

    def _part(self, request: Request, num_tokens: int) -> Scheduled:
        """The request's line in the plan, with what the workers do not know yet."""
        start, end = request.num_computed, request.num_computed + num_tokens
        part = Scheduled(
            request_id=request.request_id,
            start=start,
            num_tokens=num_tokens,
            new_token_ids=request.token_ids[request.sent_tokens :],
            new_block_ids=request.blocks[request.sent_blocks :],
            sample=end == len(request.token_ids),
            prompt_logprobs=(
                request.sampling.prompt_logprobs
                if request.prompt_logprobs is not None and start + 1 < request.num_prompt
                else None
            ),
        )
        request.sent_tokens, request.sent_blocks = len(request.token_ids), len(request.blocks)
        self._in_air[request.request_id] = request
        return part

    def _publish(self, request: Request) -> None:
        """Share the blocks that are now full."""
        full = request.num_computed // self.pool.block_size
        if full > request.num_published and self.pool.caching:
            extend_chain(request.chain, request.token_ids, full, self.pool.block_size)
            for index in range(request.num_published, full):
                self.pool.publish(request.blocks[index], request.chain[index])
            request.num_published = full

    def _advance(self, request: Request, sampled: Sampled | None) -> TokenEvent:
        """Append the sampled token; end the request if it is the last."""
        event = request.advance(sampled)
        if event.finish_reason is not None:
            self._finish(request, event.finish_reason)
        return event

    def _fail(self, request: Request, why: str) -> TokenEvent:
        """End a request that the workers cannot compute; its blocks may be the cause and are shared with nobody new."""
        self.pool.forget(request.blocks)
        self._finish(request, "error")
        return TokenEvent.of_failure(request.request_id, why)

    def _finish(self, request: Request, reason: FinishReason) -> None:
        if request.state is State.RUNNING:
            self._stop_running(request)
            self.pool.release(request.blocks)
            request.blocks = []
            self._dropped.append(request.request_id)
        else:
            self.waiting.remove(request)
            self._waiting_tokens -= len(request.token_ids)
        request.state = State.FINISHED
        request.finish_reason = reason
