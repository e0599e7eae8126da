"""A worker: one rank, its part of the model and its KV cache. `handle(command)` is the only door."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from moe_serve.base.commands import (
    AllocateKV,
    Command,
    Done,
    LoadModel,
    Meeting,
    PollStage,
    Reply,
    SetShares,
    StageExperts,
    StepPlan,
    WorkerFacts,
)
from moe_serve.base.config import Config
from moe_serve.base.errors import ConfigError, EngineError
from moe_serve.base.model_config import ModelConfig, load_model_config
from moe_serve.base.progress import Phase, Progress
from moe_serve.base.tables import ALL2ALL
from moe_serve.base.trace import ChromeTrace
from moe_serve.model.build import build_model
from moe_serve.model.context import LayerKV
from moe_serve.model.decoder import Decoder
from moe_serve.model.kernels import choose_kernels
from moe_serve.parallel.groups import Groups, build_groups
from moe_serve.worker.device import choose_device, choose_dtype
from moe_serve.worker.eplb.expert_balance import ExpertBalance
from moe_serve.worker.handover import Handover
from moe_serve.worker.kept_memory import bound_kept_kernels, kept_kernel_bytes, logits_bytes
from moe_serve.worker.kv_cache import KVShape, cuda_room
from moe_serve.worker.kv_room import blocks_for, cpu_room, fitting_blocks
from moe_serve.worker.loading.loader import load_weights
from moe_serve.worker.loading.reading_order import ReadingOrder, reading_place
from moe_serve.worker.loading.tied_head import settle_head
from moe_serve.worker.runner import Runner, rehearse

COLLECTIVE_SECONDS = 300.0
"""Least patience of a collective. Ranks load at different speeds; a slow step is the coordinator's to notice."""
REHEARSAL_MARGIN = 1.1
log = logging.getLogger(__name__)


class Worker:
    """`config` is resolved: its model is a folder. Raises ConfigError, or EngineError after which it is of no use.

    `worker` is the index within the engine (Topology.worker_index).
    `all_tensor_ranks_sample`: not only Topology.sampling_worker, but all ranks of the last stage (they have the same
    logits) answer with tokens.
    `watches_load`: count expert load even where no experts move (it needs --enable-expert-parallel).
    """

    def __init__(
        self,
        config: Config,
        meeting: Meeting,
        worker: int,
        progress: Progress,
        *,
        watches_load: bool = False,
        all_tensor_ranks_sample: bool = False,
    ) -> None:
        self._config = config
        self._watches_load = watches_load or config.parallel.enable_eplb
        self._meeting = meeting
        self._topology = config.parallel.topology
        self._worker = worker
        first = self._topology.sampling_worker
        self._samples = worker >= first if all_tensor_ranks_sample else worker == first
        self._rank = self._topology.worker_rank(meeting.dp_rank, worker)
        self._progress = progress
        self._seconds: dict[str, float] = {}
        self._groups: Groups | None = None
        self._decoder: Decoder | None = None
        self._runner: Runner | None = None
        self._balance: ExpertBalance | None = None
        self._trace = None if config.model.profile is None else ChromeTrace(Path(config.model.profile), self._rank)

    def handle(self, command: Command) -> Reply:
        """Carry out one command."""
        try:
            match command:
                case StepPlan():
                    assert self._runner is not None, "a step before AllocateKV"
                    return self._runner.run(command)
                case PollStage():
                    return self._expert_balance().poll()
                case StageExperts():
                    self._expert_balance().stage(command)
                    return Done()
                case SetShares():
                    self._expert_balance().set_shares(command)
                    return Done()
                case LoadModel():
                    return self._load()
                case AllocateKV(num_blocks):
                    self._allocate(num_blocks)
                    return Done()
        except EngineError:
            raise
        except RuntimeError as error:
            # torch has no narrower class: out of memory, a kernel that fails, a broken connection.
            where = f"{self._topology.describe(self._rank)} failed in phase {self._progress.place!r}"
            if not isinstance(command, StepPlan) and _is_out_of_memory(error):
                raise ConfigError(
                    f"{where}, out of memory: {error}; lower --kv-cache-memory-bytes, --gpu-memory-utilization, "
                    "--max-num-batched-tokens or --max-num-seqs, or spread the model over more ranks"
                ) from error
            raise EngineError(f"{where}: {error}") from error

    def close(self) -> None:
        """Release the model and leave the groups. Safe to call twice."""
        self._runner = None
        if self._decoder is not None:
            self._decoder.close()
            self._decoder = None
        if self._groups is not None:
            self._groups.close()
            self._groups = None

    def _load(self) -> WorkerFacts:
        config, parallel = self._config, self._config.parallel
        torch.set_num_threads(self._meeting.site.threads)
        folder = Path(config.model.model or "")
        model_config = load_model_config(folder)
        site = self._meeting.site
        device = choose_device(config.model.device, site.local_rank + self._worker - site.first_worker)
        dtype = choose_dtype(config.model.dtype, model_config.dtype, device)
        if device.type == "cpu":
            bound_kept_kernels(os.environ)
        if config.model.load_format != "dummy":
            model_config = settle_head(model_config, folder, dtype, warns=self._rank == 0)
        with self._phase(Phase.MEET_RANKS):
            self._groups = build_groups(
                self._topology,
                self._rank,
                store_host=self._meeting.store_host,
                store_port=self._meeting.store_port,
                token=self._meeting.token,
                device=device,
                timeout_seconds=max(COLLECTIVE_SECONDS, 1.5 * config.scheduler.step_timeout_seconds),
                migrates=self._watches_load,
                generation=self._meeting.generation,
            )
        path = choose_kernels(config.model.kernels, dtype, device, self._groups.control)
        with self._phase(Phase.BUILD):
            decoder = build_model(
                model_config,
                parallel,
                self._rank,
                self._groups,
                dtype=dtype,
                device=device,
                max_tokens=config.scheduler.max_num_batched_tokens,
                path=path,
            )
        with self._turn_to_read(self._groups), self._phase(Phase.LOAD):
            loaded = load_weights(decoder, folder, load_format=config.model.load_format, show_progress=self._rank == 0)
        self._decoder = decoder
        if self._watches_load:
            self._balance = self._make_balance(decoder, self._groups)
        shape = self._kv_shape(decoder)
        with self._phase(Phase.MEASURE):
            blocks = self._fitting_blocks(decoder, shape, model_config)
        return WorkerFacts(
            device=str(device),
            dtype=str(dtype).removeprefix("torch."),
            kernels=path or "torch",
            all2all=ALL2ALL.name_of(decoder.all2all) or "none",
            tensor_parallel=self._groups.tp.transport,
            kv_blocks=blocks,
            kv_block_bytes=shape.block_bytes,
            weight_bytes=decoder.weight_bytes(),
            expert_bytes=decoder.expert_bytes(),
            checkpoint_bytes_read=loaded.bytes_read,
            checkpoint_bytes_total=loaded.bytes_total,
            load_seconds=self._seconds,
        )

    def _make_balance(self, decoder: Decoder, groups: Groups) -> ExpertBalance:
        placement = decoder.partition.placement
        assert placement is not None, "load balancing needs expert parallelism"
        assert groups.migration is not None
        return ExpertBalance(
            dict(zip(decoder.partition.moe_numbers, decoder.moe_layers(), strict=True)),
            placement,
            groups.ep,
            groups.migration,
            max_bytes_per_step=self._config.parallel.eplb_config.max_bytes_per_step,
        )

    def _expert_balance(self) -> ExpertBalance:
        if self._balance is None:
            raise EngineError("a load-balancing command, but --enable-eplb is off")
        return self._balance

    def _kv_shape(self, decoder: Decoder) -> KVShape:
        return KVShape(decoder.token_kv, self._config.cache.block_size, decoder.dtype, sharing=self._topology.dcp)

    def _fitting_blocks(self, decoder: Decoder, shape: KVShape, model_config: ModelConfig) -> int:
        max_model_len = self._config.model.max_model_len or model_config.max_position_embeddings
        ranks = self._meeting.site.ranks_here
        if decoder.device.type == "cpu":
            room = cpu_room(self._config, ranks, beside=self._bytes_beside(decoder))
        else:
            reserve = self._rehearse(decoder, shape, max_model_len)
            sharing = -(-ranks // torch.cuda.device_count())
            room = cuda_room(self._config, decoder.device, num_ranks=sharing, reserve=reserve)
        blocks = fitting_blocks(shape, self._config, max_model_len=max_model_len, room=room)
        if self._rank == 0:
            log.info(
                "KV cache of each rank: at most %d blocks, %.1f MiB; room for %.1f MiB (%s%s)",
                blocks,
                blocks * shape.block_bytes / 2**20,
                room.num_bytes / 2**20,
                room.source,
                "" if room.cap is None else f", capped at {room.cap / 2**20:g} MiB",
            )
        return blocks

    def _bytes_beside(self, decoder: Decoder) -> int:
        """What steps on a CPU will take and keep beside weights and KV blocks."""
        scheduler = self._config.scheduler
        kept = kept_kernel_bytes(os.environ) if decoder.path is None else 0
        if not decoder.partition.is_last:
            return kept
        return kept + logits_bytes(
            num_seqs=scheduler.max_num_seqs,
            num_tokens=scheduler.max_num_batched_tokens,
            vocab_size=decoder.config.vocab_size,
        )

    def _rehearse(self, decoder: Decoder, shape: KVShape, max_model_len: int) -> int:
        """Bytes that activations of the largest step take on a CUDA device."""
        scheduler, device = self._config.scheduler, decoder.device
        num_tokens = scheduler.max_num_batched_tokens
        kv = shape.allocate(blocks_for(min(num_tokens, max_model_len), shape.block_size), device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        rehearse(
            decoder,
            kv,
            topology=self._topology,
            block_size=shape.block_size,
            num_tokens=num_tokens,
            num_seqs=scheduler.max_num_seqs,
            max_model_len=max_model_len,
            progress=self._progress,
        )
        peak = torch.cuda.max_memory_allocated(device) - before
        del kv
        torch.cuda.empty_cache()
        return int(peak * REHEARSAL_MARGIN)

    def _allocate(self, num_blocks: int) -> None:
        decoder, groups = self._decoder, self._groups
        assert decoder is not None, "AllocateKV before LoadModel"
        assert groups is not None
        self._progress.enter(Phase.ALLOCATE)
        kv: tuple[LayerKV, ...] = self._kv_shape(decoder).allocate(num_blocks, decoder.device)
        self._runner = Runner(
            decoder,
            kv,
            topology=self._topology,
            rank=self._rank,
            samples=self._samples,
            block_size=self._config.cache.block_size,
            device=decoder.device,
            progress=self._progress,
            handover=Handover(groups.pp, self._progress),
            balance=self._balance,
            enforce_eager=self._config.model.enforce_eager,
            trace=self._trace,
        )

    @contextmanager
    def _turn_to_read(self, groups: Groups) -> Iterator[None]:
        """While at most `max_parallel_loading_workers` ranks of this engine read; afterwards all have."""
        parallel, topology = self._config.parallel, self._topology
        place = reading_place(self._worker, topology.num_workers, parallel.max_parallel_loading_workers)
        if place is None:
            yield
            return
        ranks = [topology.worker_rank(self._meeting.dp_rank, worker) for worker in range(topology.num_workers)]
        order = ReadingOrder(place, groups.control, ranks, timeout_seconds=parallel.start_timeout_seconds)
        with self._phase(Phase.AWAIT_READERS):
            order.await_turn()
        yield
        with self._phase(Phase.AWAIT_READERS):
            order.pass_on()

    @contextmanager
    def _phase(self, phase: Phase) -> Iterator[None]:
        self._progress.enter(phase)
        started = time.perf_counter()
        yield
        seconds = self._seconds.get(phase.value, 0.0) + time.perf_counter() - started
        self._seconds[phase.value] = round(seconds, 3)


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
