"""Runs one step on this rank: rows in, forward through every layer, tokens out. Makes no decision of its own."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from moe_serve.base.commands import Sampled, StepPlan, StepResult, TokenLogprob
from moe_serve.base.progress import Phase, Progress
from moe_serve.base.topology import Topology, split_range
from moe_serve.base.trace import ChromeTrace
from moe_serve.model.all2all.shape import NUM_HALVES
from moe_serve.model.attention.base import StepShape
from moe_serve.model.context import ForwardContext, LayerKV, StepClock
from moe_serve.model.decoder import Decoder
from moe_serve.model.halves import forward_in_halves, half_of
from moe_serve.model.layers.argmax import argmax
from moe_serve.model.replay import ReplayedDecoder
from moe_serve.worker.eplb.expert_balance import Collected, ExpertBalance
from moe_serve.worker.handover import Handover
from moe_serve.worker.inputs import RequestTable, StepInputs, rows_by_ep_rank
from moe_serve.worker.sampling.logprobs import token_logprobs
from moe_serve.worker.sampling.sampler import sample

NOT_FINITE = (
    "the model gave logits that are not finite for this request; a wider --dtype (bfloat16, float32) may help, "
    "if the checkpoint is sound"
)
PROMPT_LOGPROB_ROWS = 256
"""Rows of logits held at a time for prompt log-probabilities; a whole chunk's would be gigabytes."""


class Runner:
    """Every rank of a stage calls `run` for the same step. One that does not sample answers no tokens."""

    def __init__(
        self,
        decoder: Decoder,
        kv: tuple[LayerKV, ...],
        *,
        topology: Topology,
        rank: int,
        samples: bool,
        block_size: int,
        device: torch.device,
        progress: Progress,
        handover: Handover,
        balance: ExpertBalance | None = None,
        enforce_eager: bool = False,
        trace: ChromeTrace | None = None,
    ) -> None:
        self._balance, self._trace = balance, trace
        self._handover = handover
        self._decoder = decoder
        self._run_layers = decoder if enforce_eager else ReplayedDecoder(decoder).forward
        self._kv = kv
        self._topology = topology
        _, _, self._tp_rank = topology.coordinates(rank)
        self._samples = samples
        self._progress = progress
        self._table = RequestTable(
            block_size=block_size, samples=samples, device=device, watches_load=balance is not None
        )

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> StepResult:
        """Carry out a plan. One without requests still goes through every layer: others may need our experts."""
        started = time.perf_counter()
        self._progress.enter(Phase.PREPARE, step=plan.step)
        commit_seconds = 0.0 if self._balance is None else self._balance.before_step(plan)
        inputs = self._table.build(plan, rows_by_ep_rank(plan.tokens_by_dp_rank, self._topology))
        clock = StepClock()
        whole = None if plan.in_halves else inputs.shape
        ctx = self._context(inputs, whole, slice(None), inputs.rows_by_ep_rank, clock, None)
        padded_before = self._decoder.all2all.padding_rows
        hidden_TD = self._forward(inputs, ctx, self._halves(plan, inputs, clock) if plan.in_halves else [])
        collected = self._watch(plan, inputs, ctx)
        failed: dict[str, str] = {}
        prompt_logprobs: dict[str, list[TokenLogprob]] = {}
        sampled: list[Sampled] = []
        if self._decoder.partition.is_last:
            prompt_logprobs = self._prompt_logprobs(hidden_TD, inputs, failed)
            sampled = self._sample(hidden_TD, inputs, failed)
        if self._trace is not None:
            self._trace.flush()
        return StepResult(
            step=plan.step,
            sampled=sampled,
            failed=failed,
            prompt_logprobs=prompt_logprobs,
            seconds=time.perf_counter() - started,
            all2all_seconds=clock.all2all_seconds,
            padding_rows=self._decoder.all2all.padding_rows - padded_before,
            load=collected.load,
            expert_seconds=collected.expert_seconds,
            stage=None if self._balance is None else self._balance.status(),
            commit_seconds=commit_seconds,
        )

    def _context(
        self,
        inputs: StepInputs,
        shape: StepShape | None,
        rows: slice,
        rows_by_ep_rank: tuple[int, ...],
        clock: StepClock,
        half: int | None,
    ) -> ForwardContext:
        """Of some rows of a step, which `shape` describes; None where no layer gets them together."""
        return ForwardContext(
            positions_T=inputs.positions_T[rows],
            attention=None if shape is None else self._decoder.attention_backend.plan(shape),
            kv=self._kv,
            rows_by_ep_rank=rows_by_ep_rank,
            row_hash_T=None if inputs.row_hash_T is None else inputs.row_hash_T[rows],
            routes=None if self._balance is None else [],
            progress=self._progress,
            clock=clock,
            half=half,
            trace=self._trace,
        )

    def _halves(self, plan: StepPlan, inputs: StepInputs, clock: StepClock) -> list[ForwardContext]:
        contexts = []
        for half in range(NUM_HALVES):
            rows = half_of(len(inputs.token_ids_T), half)
            shape = inputs.shape.of_rows(rows.start, rows.stop)
            tokens = [len(split_range(tokens, NUM_HALVES, half)) for tokens in plan.tokens_by_dp_rank]
            contexts.append(self._context(inputs, shape, rows, rows_by_ep_rank(tokens, self._topology), clock, half))
        return contexts

    def _forward(self, inputs: StepInputs, ctx: ForwardContext, halves: Sequence[ForwardContext]) -> Tensor:
        """Through this stage's layers: from the rows of the stage before, and on to the stage behind."""
        decoder, hidden_TD = self._decoder, None
        if not decoder.partition.is_first:
            size = (len(inputs.token_ids_T), decoder.config.hidden_size)
            hidden_TD = self._handover.take(torch.empty(size, dtype=decoder.dtype, device=decoder.device))
        if halves:
            out_TD = forward_in_halves(decoder, inputs.token_ids_T, ctx, halves, hidden_TD)
        else:
            out_TD = self._run_layers(inputs.token_ids_T, ctx, hidden_TD)
        if not decoder.partition.is_last:
            self._handover.pass_on(out_TD)
        return out_TD

    def _watch(self, plan: StepPlan, inputs: StepInputs, ctx: ForwardContext) -> Collected:
        """Count which experts this rank's own rows went to."""
        if self._balance is None:
            return Collected()
        assert ctx.routes is not None
        assert inputs.decode_T is not None
        if plan.collect_load:
            self._progress.enter(Phase.COLLECT_LOAD)
        part = split_range(len(inputs.decode_T), self._topology.tp, self._tp_rank)
        decode_S = inputs.decode_T[part.start : part.stop]
        return self._balance.after_step(plan, ctx.routes, decode_S, expert_seconds=ctx.clock.expert_seconds)

    def _sample(self, hidden_TD: Tensor, inputs: StepInputs, failed: dict[str, str]) -> list[Sampled]:
        if not inputs.sample_rows:
            return []
        logits_SV = self._logits(hidden_TD, inputs.sample_rows)
        if not self._samples:
            return []
        self._progress.enter(Phase.SAMPLE)
        names = inputs.sample_ids
        best_S, sound_S = argmax(logits_SV, self._decoder.path)
        if not bool(sound_S.all()):
            sound = sound_S.tolist()
            failed |= {name: NOT_FINITE for name, is_sound in zip(names, sound, strict=True) if not is_sound}
            logits_SV, best_S = logits_SV[sound_S], best_S[sound_S]
            names = [name for name, is_sound in zip(names, sound, strict=True) if is_sound]
        if not names:
            return []
        return sample(logits_SV, best_S, [self._table.state(name) for name in names], self._decoder.path)

    def _prompt_logprobs(
        self, hidden_TD: Tensor, inputs: StepInputs, failed: dict[str, str]
    ) -> dict[str, list[TokenLogprob]]:
        found: dict[str, list[TokenLogprob]] = {}
        for part in inputs.prompt_rows:
            own = found.setdefault(part.request_id, [])
            for start in range(0, len(part.targets), PROMPT_LOGPROB_ROWS):
                targets = part.targets[start : start + PROMPT_LOGPROB_ROWS]
                first = part.first_row + start
                logits_SV = self._logits(hidden_TD, range(first, first + len(targets)))
                if self._samples and not bool(argmax(logits_SV, self._decoder.path)[1].all()):
                    failed[part.request_id] = NOT_FINITE
                elif self._samples:
                    own += token_logprobs(logits_SV, targets, [part.num_top] * len(targets))
        return found if self._samples else {}

    def _logits(self, hidden_TD: Tensor, rows: Sequence[int]) -> Tensor:
        """Logits of some rows; called with the same rows on every TP rank, each of which has part of the vocabulary."""
        if len(rows) < len(hidden_TD):
            hidden_TD = hidden_TD.index_select(0, torch.tensor(rows, device=hidden_TD.device))
        return self._decoder.logits(hidden_TD, self._progress)


@torch.inference_mode()
def rehearse(
    decoder: Decoder,
    kv: tuple[LayerKV, ...],
    *,
    topology: Topology,
    block_size: int,
    num_tokens: int,
    num_seqs: int,
    max_model_len: int,
    progress: Progress,
) -> None:
    """The largest step there can be, on made-up tokens and in the same blocks again and again, to see what it takes.

    All ranks of the world do this together; a later stage makes up hidden states instead of waiting for them.
    """
    lengths: list[int] = []
    left = num_tokens
    while left and len(lengths) < num_seqs:
        lengths.append(min(left, max_model_len))
        left -= lengths[-1]
    rows = num_tokens - left
    tables = [range(-(-length // block_size)) for length in lengths]
    shape = StepShape.of([0] * len(lengths), lengths, tables, block_size)
    positions_T = torch.from_numpy(shape.positions_T).to(decoder.device)
    ctx = ForwardContext(
        positions_T=positions_T,
        attention=decoder.attention_backend.plan(shape),
        kv=kv,
        rows_by_ep_rank=rows_by_ep_rank([rows] * topology.dp, topology),
        progress=progress,
    )
    made_up = torch.zeros((rows, decoder.config.hidden_size), dtype=decoder.dtype, device=decoder.device)
    hidden_TD = decoder(positions_T % decoder.config.vocab_size, ctx, made_up)
    if decoder.partition.is_last:
        decoder.logits(hidden_TD[: min(num_seqs, rows)], progress)
