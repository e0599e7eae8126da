"""StepPlan -> tensors. Remembers each request's tokens and blocks, so that a plan carries only what is new.

Runs on the host once per step: a turn of Python for each request; arrays for tokens and blocks, which may be many.
"""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moe_serve.base.commands import NewRequest, Scheduled, StepPlan
from moe_serve.base.topology import Topology, split_range
from moe_serve.model.attention.base import Ints, StepShape
from moe_serve.worker.sampling.sampler import SamplingState

DECODE_BIT = 61


@dataclass(slots=True)
class KnownRequest:
    """A request as this worker knows it. `sampling` only where tokens are sampled.

    `token_ids` 64 bits, `block_ids` 32 bits: arrays that grow, and of which a step takes what it needs as memory.
    """

    token_ids: array[int]
    num_prompt_tokens: int
    block_ids: array[int]
    sampling: SamplingState | None
    number: int
    """Different for each request id, the same in every run; below 2 ** DECODE_BIT, with room for positions."""


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
        token_ids = array("q")
        sequences: list[KnownRequest] = []
        sample_rows: list[int] = []
        sample_ids: list[str] = []
        prompt_rows: list[PromptRows] = []
        for part in plan.scheduled:
            known = self._known[part.request_id]
            self._extend(known, part)
            first_row, end = len(token_ids), part.start + part.num_tokens
            token_ids += known.token_ids[part.start : end]
            assert len(token_ids) == first_row + part.num_tokens, f"{part} goes past the known tokens"
            assert end <= len(known.block_ids) * self._block_size, f"{part} goes past the known blocks"
            sequences.append(known)
            if part.sample:
                sample_rows.append(len(token_ids) - 1)
                sample_ids.append(part.request_id)
            if part.prompt_logprobs is not None:
                targets = known.token_ids[part.start + 1 : min(end + 1, known.num_prompt_tokens)].tolist()
                if targets:
                    prompt_rows.append(PromptRows(part.request_id, first_row, targets, part.prompt_logprobs))
        shape = StepShape.of(
            [part.start for part in plan.scheduled],
            [part.num_tokens for part in plan.scheduled],
            [known.block_ids for known in sequences],
            self._block_size,
        )
        row_hash_T = self._tensor(hash_rows(sequences, shape)) if self._watches_load else None
        return StepInputs(
            token_ids_T=self._tensor(np.asarray(token_ids)),
            positions_T=self._tensor(shape.positions_T),
            shape=shape,
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
        number = zlib.crc32(new.request_id.encode()) << 28
        return KnownRequest(
            array("q", new.token_ids), new.num_prompt_tokens, array("i", new.block_ids), sampling, number
        )

    @staticmethod
    def _extend(known: KnownRequest, part: Scheduled) -> None:
        if part.new_block_ids:
            known.block_ids.extend(part.new_block_ids)
        if not part.new_token_ids:
            return
        known.token_ids.extend(part.new_token_ids)
        if known.sampling is not None:
            known.sampling.append(part.new_token_ids)

    def _tensor(self, values: Ints) -> Tensor:
        on_host = torch.from_numpy(values)
        return on_host if self._device.type == "cpu" else on_host.to(self._device, non_blocking=True)


def hash_rows(sequences: Sequence[KnownRequest], shape: StepShape) -> Ints:
    """A number for each row of a step, int64: bit DECODE_BIT is 1 where its token was generated."""
    numbers_S = np.array([known.number for known in sequences], np.int64)
    prompts_S = np.array([known.num_prompt_tokens for known in sequences], np.int64)
    generated_T = shape.positions_T >= prompts_S.repeat(shape.counts_S)
    return numbers_S.repeat(shape.counts_S) + shape.positions_T + (generated_T.astype(np.int64) << DECODE_BIT)


def rows_by_ep_rank(tokens_by_dp_rank: list[int], topology: Topology) -> tuple[int, ...]:
    """Rows each EP rank brings to a MoE layer: every engine's tokens cut over its TP ranks."""
    return tuple(len(split_range(tokens, topology.tp, tp)) for tokens in tokens_by_dp_rank for tp in range(topology.tp))
