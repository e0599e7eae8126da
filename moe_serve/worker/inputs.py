"""StepPlan -> tensors. Remembers each request's tokens and blocks, so that a plan carries only what is new.

Runs on the host once per step; plain lists until the end, because most steps are many requests of one token.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_serve.base.commands import NewRequest, Scheduled, StepPlan
from moe_serve.base.topology import Topology, split_range
from moe_serve.model.attention.base import SequenceShape, StepShape
from moe_serve.worker.sampling.sampler import SamplingState

DECODE_BIT = 61


@dataclass(slots=True)
class KnownRequest:
    """A request as this worker knows it. `sampling` only where tokens are sampled."""

    token_ids: list[int]
    num_prompt_tokens: int
    block_ids: list[int]
    sampling: SamplingState | None
    number: int
    """Different for each request id, the same in every run; below 2 ** DECODE_BIT, with room for positions."""

    def hash_rows(self, start: int, end: int, hashes: list[int]) -> None:
        """Append a number for each position in [start, end): bit DECODE_BIT is 1 where its token was generated."""
        middle = min(max(self.num_prompt_tokens, start), end)
        hashes += range(self.number + start, self.number + middle)
        if middle < end:
            first = self.number + (1 << DECODE_BIT)
            hashes += range(first + middle, first + end)


@dataclass(frozen=True, slots=True)
class PromptRows:
    """Rows [first_row, first_row + len(targets)) of a step predict the prompt tokens `targets`."""

    request_id: str
    first_row: int
    targets: list[int]
    num_top: int


@dataclass(frozen=True, slots=True)
class StepInputs:
    """A step on the device. `sample_rows[i]` is the row whose logits give the next token of `sample_ids[i]`.

    Where load is watched: `row_hash_T` int64 differs between requests and positions, whatever the batch; `decode_T`
    int64 is 1 for rows of generated tokens, else 0.
    """

    token_ids_T: Tensor
    positions_T: Tensor
    shape: StepShape
    rows_by_ep_rank: tuple[int, ...]
    sample_rows: list[int]
    sample_ids: list[str]
    prompt_rows: list[PromptRows]
    row_hash_T: Tensor | None
    decode_T: Tensor | None


class RequestTable:
    """All requests of this engine that are running. `samples` false: keep nothing for the sampler.

    `watches_load`: tell rows apart by request and kind for the load balancer.
    """

    def __init__(self, *, block_size: int, samples: bool, device: torch.device, watches_load: bool = False) -> None:
        self._block_size = block_size
        self._watches_load = watches_load
        self._samples = samples
        self._device = device
        self._known: dict[str, KnownRequest] = {}

    def __len__(self) -> int:
        return len(self._known)

    def state(self, request_id: str) -> SamplingState:
        """What the sampler knows of a request."""
        sampling = self._known[request_id].sampling
        assert sampling is not None
        return sampling

    def build(self, plan: StepPlan, rows_by_ep_rank: tuple[int, ...]) -> StepInputs:
        """Take in what the plan says about requests, then lay out its rows."""
        for request_id in plan.dropped:
            self._known.pop(request_id, None)
        for new in plan.new:
            self._known[new.request_id] = self._learn(new)
        token_ids: list[int] = []
        positions: list[int] = []
        sequences: list[SequenceShape] = []
        sample_rows: list[int] = []
        sample_ids: list[str] = []
        prompt_rows: list[PromptRows] = []
        hashes: list[int] = []
        for part in plan.scheduled:
            known = self._known[part.request_id]
            self._extend(known, part)
            first_row, end = len(token_ids), part.start + part.num_tokens
            token_ids += known.token_ids[part.start : end]
            positions += range(part.start, end)
            if self._watches_load:
                known.hash_rows(part.start, end, hashes)
            assert len(token_ids) == first_row + part.num_tokens, f"{part} goes past the known tokens"
            sequences.append(SequenceShape(part.start, part.num_tokens, known.block_ids))
            if part.sample:
                sample_rows.append(len(token_ids) - 1)
                sample_ids.append(part.request_id)
            if part.prompt_logprobs is not None:
                targets = known.token_ids[part.start + 1 : min(end + 1, known.num_prompt_tokens)]
                if targets:
                    prompt_rows.append(PromptRows(part.request_id, first_row, targets, part.prompt_logprobs))
        row_hash_T = self._tensor(hashes) if self._watches_load else None
        return StepInputs(
            token_ids_T=self._tensor(token_ids),
            positions_T=self._tensor(positions),
            shape=StepShape(sequences, self._block_size),
            rows_by_ep_rank=rows_by_ep_rank,
            sample_rows=sample_rows,
            sample_ids=sample_ids,
            prompt_rows=prompt_rows,
            row_hash_T=row_hash_T,
            decode_T=None if row_hash_T is None else row_hash_T >> DECODE_BIT,
        )

    def _learn(self, new: NewRequest) -> KnownRequest:
        sampling = None
        if self._samples:
            sampling = SamplingState(
                new.request_id,
                new.sampling,
                seed=new.sampling_seed,
                token_ids=new.token_ids,
                num_prompt_tokens=new.num_prompt_tokens,
                stop_ids=new.stop_ids,
                device=self._device,
            )
        # Copies: with the uni executor the plan's lists are the scheduler's own.
        number = zlib.crc32(new.request_id.encode()) << 28
        return KnownRequest(list(new.token_ids), new.num_prompt_tokens, list(new.block_ids), sampling, number)

    @staticmethod
    def _extend(known: KnownRequest, part: Scheduled) -> None:
        known.block_ids += part.new_block_ids
        known.token_ids += part.new_token_ids
        if part.new_token_ids and known.sampling is not None:
            known.sampling.append(part.new_token_ids)

    def _tensor(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64).to(self._device, non_blocking=True)


def rows_by_ep_rank(tokens_by_dp_rank: list[int], topology: Topology) -> tuple[int, ...]:
    """Rows each EP rank brings to a MoE layer: every engine's tokens cut over its TP ranks."""
    return tuple(len(split_range(tokens, topology.tp, tp)) for tokens in tokens_by_dp_rank for tp in range(topology.tp))
