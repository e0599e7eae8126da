"""A deterministic executor without torch that checks the protocol between an engine and its workers.

Its "model" reads what earlier steps wrote to the KV blocks, so a wrong block, a stale prefix or a skipped token
changes every token after it, as with a real model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from moe_serve.base.commands import (
    AllocateKV,
    Command,
    Done,
    LoadModel,
    NewRequest,
    PollStage,
    Reply,
    Sampled,
    Scheduled,
    SetShares,
    StageExperts,
    StepPlan,
    StepResult,
    TokenLogprob,
    WorkerFacts,
)
from moe_serve.base.config import Config
from moe_serve.base.progress import Progress
from moe_serve.base.sampling import SamplingParams

VOCAB_SIZE = 50
NOTHING = b""
"""What the fake model knows before the first token."""


def absorb(past: bytes, token_id: int) -> bytes:
    """What the fake model knows after one more token."""
    return hashlib.blake2b(past + token_id.to_bytes(4, "little"), digest_size=8).digest()


def choose(past: bytes, *, seed: int | None, banned: Collection[int], vocab_size: int) -> int:
    """The fake model's next token; greedy requests have no seed."""
    mixed = hashlib.blake2b(past + repr(seed).encode(), digest_size=8).digest()
    token = int.from_bytes(mixed, "little") % vocab_size
    while token in banned:
        token = (token + 1) % vocab_size
    return token


def logprob_of(past: bytes, token_id: int, num_top: int) -> TokenLogprob:
    """A made-up log-probability that depends on everything before the token."""
    value = -float(int.from_bytes(absorb(past, token_id)[:2], "little")) / 1000
    return TokenLogprob(token_id, value, 1, [(token_id, value)] * num_top)


def expected_answer(
    prompt: Sequence[int],
    sampling: SamplingParams,
    *,
    max_model_len: int,
    eos_token_ids: Collection[int] = (),
    vocab_size: int = VOCAB_SIZE,
) -> tuple[list[int], str]:
    """What a request gives when it is alone, worked out without an engine: its tokens and why it ends."""
    past = NOTHING
    for token in prompt:
        past = absorb(past, token)
    ends = {*sampling.stop_token_ids, *(() if sampling.ignore_eos else eos_token_ids)}
    answer: list[int] = []
    while True:
        banned = ends if len(answer) < sampling.min_tokens else ()
        seed = None if sampling.greedy else sampling.seed
        answer.append(choose(past, seed=seed, banned=banned, vocab_size=vocab_size))
        past = absorb(past, answer[-1])
        if answer[-1] in ends and not banned:
            return answer, "stop"
        if len(answer) == sampling.max_tokens or len(prompt) + len(answer) >= max_model_len:
            return answer, "length"


@dataclass(slots=True)
class Known:
    """What a worker knows of a request."""

    new: NewRequest
    tokens: list[int]
    blocks: list[int]


class FakeExecutor:
    """Answers at once, or with `failure`, or (`silent`) never. Block size and budgets come from `config`.

    `reverts`: plans may be put back, so that requests are dropped which these workers never met.
    `wrong` may be set to a StepResult that is given instead of the right one. `plans` keeps what was asked.
    """

    def __init__(
        self,
        config: Config,
        meeting: object = None,
        progress: Progress | None = None,
        *,
        num_blocks: int = 64,
        vocab_size: int = VOCAB_SIZE,
        reverts: bool = False,
    ) -> None:
        self.config = config
        self.reverts = reverts
        self.num_blocks = num_blocks
        self.vocab_size = vocab_size
        self.plans: list[StepPlan] = []
        self.silent = False
        self.failure: Exception | None = None
        self.wrong: Reply | None = None
        self.closed = False
        self._block_size = config.cache.block_size
        self._known: dict[str, Known] = {}
        self._holders: dict[int, set[str]] = {}
        self._kv: dict[int, bytes] = {}

    def start(self) -> WorkerFacts:
        return WorkerFacts(
            device="fake",
            dtype="float32",
            kernels="torch",
            all2all="none",
            tensor_parallel="none",
            kv_blocks=self.num_blocks,
            kv_block_bytes=1,
            weight_bytes=0,
            expert_bytes=0,
            checkpoint_bytes_read=0,
            checkpoint_bytes_total=0,
            load_seconds={},
        )

    def submit(self, command: Command) -> Future[Reply]:
        future: Future[Reply] = Future()
        if self.failure is not None:
            future.set_exception(self.failure)
        elif not self.silent:
            reply = self._answer(command)
            future.set_result(self.wrong or reply)
        return future

    def close(self) -> None:
        self.closed = True

    def _answer(self, command: Command) -> Reply:
        match command:
            case LoadModel():
                return self.start()
            case AllocateKV(num_blocks):
                self.num_blocks = num_blocks
                return Done()
            case StageExperts() | SetShares() | PollStage():
                return Done()
            case StepPlan():
                return self._step(command)

    def _step(self, plan: StepPlan) -> StepResult:
        self.plans.append(plan)
        limits = self.config.scheduler
        assert plan.num_tokens <= limits.max_num_batched_tokens, "more tokens than a step may have"
        assert len(plan.scheduled) <= limits.max_num_seqs, "more requests than a step may have"
        assert plan.num_tokens in plan.tokens_by_dp_rank
        ids = [part.request_id for part in plan.scheduled]
        assert len(set(ids)) == len(ids), "a request is scheduled twice in a step"
        new = {request.request_id for request in plan.new}
        assert new <= set(ids), "a new request is not scheduled"
        for request_id in plan.dropped:
            self._forget(request_id)
        for request in plan.new:
            self._learn(request)
        for part in plan.scheduled:
            self._extend(part, is_new=part.request_id in new)
        sampled: list[Sampled] = []
        prompt_logprobs: dict[str, list[TokenLogprob]] = {}
        for part in plan.scheduled:
            self._compute(part, sampled, prompt_logprobs)
        return StepResult(step=plan.step, sampled=sampled, prompt_logprobs=prompt_logprobs)

    def _forget(self, request_id: str) -> None:
        if self.reverts and request_id not in self._known:
            return
        assert request_id in self._known, f"{request_id} is dropped but not known"
        for block in self._known.pop(request_id).blocks:
            self._holders[block].remove(request_id)

    def _learn(self, new: NewRequest) -> None:
        assert new.request_id not in self._known, f"{new.request_id} is new but already known"
        assert 0 < new.num_prompt_tokens <= len(new.token_ids)
        self._known[new.request_id] = Known(new, new.token_ids.copy(), [])
        self._hold(new.request_id, new.block_ids)

    def _extend(self, part: Scheduled, *, is_new: bool) -> None:
        assert not (is_new and (part.new_token_ids or part.new_block_ids)), "a new request brings everything itself"
        self._known[part.request_id].tokens += part.new_token_ids
        self._hold(part.request_id, part.new_block_ids)

    def _hold(self, request_id: str, blocks: list[int]) -> None:
        for block in blocks:
            assert 0 <= block < self.num_blocks, f"there is no block {block}"
            assert block not in self._known[request_id].blocks, f"{request_id} has block {block} twice"
            self._known[request_id].blocks.append(block)
            self._holders.setdefault(block, set()).add(request_id)

    def _compute(self, part: Scheduled, sampled: list[Sampled], prompt_logprobs: dict[str, list[TokenLogprob]]) -> None:
        known = self._known[part.request_id]
        end = part.start + part.num_tokens
        assert part.num_tokens > 0, "a scheduled request has nothing to compute"
        assert end <= len(known.tokens), "tokens are scheduled that nobody has told"
        assert len(known.blocks) * self._block_size >= end, "the block table is too short"
        assert part.sample == (end == len(known.tokens)), "sample goes with the last known token"
        past = self._read(known, part.start)
        for position in range(part.start, end):
            past = absorb(past, known.tokens[position])
            self._write(part.request_id, known, position, past)
            following = position + 1
            if part.prompt_logprobs is not None and following < known.new.num_prompt_tokens:
                entry = logprob_of(past, known.tokens[following], part.prompt_logprobs)
                prompt_logprobs.setdefault(part.request_id, []).append(entry)
        if part.sample:
            sampled.append(self._sample(part.request_id, known, past))

    def _sample(self, request_id: str, known: Known, past: bytes) -> Sampled:
        sampling = known.new.sampling
        generated = len(known.tokens) - known.new.num_prompt_tokens
        token = choose(
            past,
            seed=None if sampling.greedy else known.new.sampling_seed,
            banned=known.new.stop_ids if generated < sampling.min_tokens else (),
            vocab_size=self.vocab_size,
        )
        logprob = None if sampling.logprobs is None else logprob_of(past, token, sampling.logprobs)
        return Sampled(request_id, token, logprob)

    def _read(self, known: Known, start: int) -> bytes:
        """The past before `start`, out of the cache: right only if its owner, or a sharer, computed it all."""
        truth = NOTHING
        for position in range(start):
            truth = absorb(truth, known.tokens[position])
            assert self._kv.get(self._slot(known, position)) == truth, f"position {position} is not computed"
        return truth

    def _write(self, request_id: str, known: Known, position: int, past: bytes) -> None:
        holders = self._holders[known.blocks[position // self._block_size]]
        assert holders == {request_id}, f"{request_id} writes to a block of {holders}"
        self._kv[self._slot(known, position)] = past

    def _slot(self, known: Known, position: int) -> int:
        return known.blocks[position // self._block_size] * self._block_size + position % self._block_size
