"""Records between an engine and its workers. This is all a worker can be asked. msgspec, no torch.

Every worker of an engine gets the same command. The tokens of a step are those in the reply of
Topology.sampling_worker.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from moe_serve.base.errors import (
    CheckpointError,
    ConfigError,
    EngineDead,
    EngineError,
    MissingExtra,
    MoEServeError,
    RankTimeout,
    WorkerDied,
)
from moe_serve.base.sampling import SamplingParams
from moe_serve.base.site import Site


@dataclass(frozen=True, slots=True)
class Meeting:
    """Where an engine's workers find everybody: the store and coordinator of the world, and its token.

    `site` is the engine's; its workers are the ranks of the node from `site.local_rank` on. `generation` of the world
    that the engine belongs to (WorldView).
    """

    dp_rank: int
    store_host: str
    store_port: int
    coordinator_host: str
    coordinator_port: int
    token: str
    site: Site
    generation: int = 1

    @classmethod
    def of_nobody(cls, threads: int) -> Meeting:
        """For a world of one rank, which meets nobody."""
        return cls(
            dp_rank=0,
            store_host="",
            store_port=0,
            coordinator_host="",
            coordinator_port=0,
            token="",
            site=Site(threads=threads),
        )


class NewRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A request a worker does not know (or was told to drop): all of it.

    `token_ids` prompt and, after a preemption, what was generated so far; the first `num_prompt_tokens` are prompt.
    `stop_ids` end tokens that are banned while fewer than `sampling.min_tokens` tokens were generated.
    `sampling_seed` is never None: the request's seed, or one drawn by the engine.
    """

    request_id: str
    token_ids: list[int]
    num_prompt_tokens: int
    block_ids: list[int]
    sampling: SamplingParams
    sampling_seed: int
    stop_ids: list[int] = []


class Scheduled(msgspec.Struct, frozen=True, kw_only=True):
    """A request's part in a step: compute tokens [start, start + num_tokens).

    `new_token_ids` and `new_block_ids` are appended to what the worker knows first (both empty in the step that
    brings its NewRequest). `sample` asks for the next token after the last one computed: true when the step reaches
    the end of the known tokens. `prompt_logprobs` asks for the log-probabilities of prompt tokens
    [start + 1, start + num_tokens + 1), as far as they are prompt.
    """

    request_id: str
    start: int
    num_tokens: int
    new_token_ids: list[int] = []
    new_block_ids: list[int] = []
    sample: bool = False
    prompt_logprobs: int | None = None


class StepPlan(msgspec.Struct, frozen=True, kw_only=True, tag="step"):
    """One step. Requests in `dropped` are forgotten first, then `new` are learnt, then `scheduled` are computed.

    `dropped` may name requests that the workers do not know: the plan that brought them may have been put back.

    `tokens_by_dp_rank[r]` tokens DP rank r brings to this step (this engine's own included); an empty `scheduled`
    is a dummy step: zero rows through every layer.

    What all ranks agreed on for this step (engine/lockstep.py): before it, commit what was staged as `commit_epoch`
    (0: nothing), or give the stage up once `drop_after_pieces` pieces were exchanged (-1: no); after it,
    `collect_load` of the steps since the last time. `in_halves`: every engine's tokens are cut in two halves that take
    turns.
    """

    step: int
    scheduled: list[Scheduled]
    new: list[NewRequest] = []
    dropped: list[str] = []
    tokens_by_dp_rank: list[int]
    commit_epoch: int = 0
    drop_after_pieces: int = -1
    collect_load: bool = False
    in_halves: bool = False

    @property
    def num_tokens(self) -> int:
        return sum(part.num_tokens for part in self.scheduled)


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """Log-probability of `token_id`, its rank in the vocabulary (1 = most likely) and the best alternatives."""

    token_id: int
    logprob: float
    rank: int
    top: list[tuple[int, float]] = []


class Sampled(msgspec.Struct, frozen=True, array_like=True):
    """The next token of a request; `logprob` only where it was asked for."""

    request_id: str
    token_id: int
    logprob: TokenLogprob | None = None


class StepResult(msgspec.Struct, frozen=True, kw_only=True, tag="step_result"):
    """What a step gave. `prompt_logprobs[request]` in order of position. Seconds are this worker's own.

    `failed[request]` why there is nothing for a request, and never will be; the others are as if it were not there.
    """

    step: int
    sampled: list[Sampled] = []
    failed: dict[str, str] = {}
    prompt_logprobs: dict[str, list[TokenLogprob]] = {}
    seconds: float = 0.0
    all2all_seconds: float = 0.0
    padding_rows: int = 0
    """Rows without a token that were sent to experts, over all layers; of all this engine's workers."""
    load: bytes = b""
    """With collect_load, from expert-parallel rank 0: int64 (layers, prefill and decode, experts), over all ranks; of a
    worker its stage's layers, of an engine all."""
    expert_seconds: list[float] = []
    """With `load`: what the experts of each expert-parallel rank took in the same steps and layers. Empty where their
    end is not seen, as on a CUDA device."""
    stage: StageStatus | None = None
    commit_seconds: float = 0.0


class StageStatus(msgspec.Struct, frozen=True, kw_only=True, tag="stage_status"):
    """How far an engine is with a stage; the least over its workers. `failed` says why it cannot be finished."""

    epoch: int
    staged: bool = False
    failed: str = ""
    pieces_posted: int = 0
    bytes_received: int = 0
    seconds: float = 0.0
    busy_seconds: float = 0.0
    """Spent between steps on it."""


class StageExperts(msgspec.Struct, frozen=True, kw_only=True, tag="stage_experts"):
    """Begin to fetch the experts that a new placement of some layers needs. Answered with Done, at once.

    `rows[layer]` its new physical_to_logical (P,). `shares` as in SetShares, of the layers in `rows`; ExpertMap uses
    them once it is committed.
    """

    epoch: int
    rows: dict[int, list[int]]
    shares: dict[int, bytes]
    node_sizes: tuple[int, ...] = ()
    local_first: bool = False
    generation: int = 1


class SetShares(msgspec.Struct, frozen=True, kw_only=True, tag="set_shares"):
    """Split the load over the copies of every expert anew; no weight moves. Ignored unless `epoch` is the one served.

    `shares[node]` for rows whose source is on that node (`node_sizes` as in eplb/nodes.py): float32 (layers x slots,)
    as bytes, cumulative, by layer, expert and slot. `local_first`: a rank that holds copies of an expert gives its own
    rows to these alike, and works that out itself (eplb/shares.py), so that what is sent does not grow with the number
    of ranks.
    Answered with Done.
    """

    epoch: int
    shares: dict[int, bytes]
    node_sizes: tuple[int, ...] = ()
    local_first: bool = False


class PollStage(msgspec.Struct, frozen=True, tag="poll_stage"):
    """Go on with a stage while no steps are run. Answered with StageStatus."""


class LoadModel(msgspec.Struct, frozen=True, tag="load_model"):
    """Form the groups, load the weights, see how much KV cache fits. Answered with WorkerFacts."""


class WorkerFacts(msgspec.Struct, frozen=True, kw_only=True, tag="worker_facts"):
    """One worker after loading, or the least of several. Bytes are bytes; `load_seconds` by phase.

    `all2all` the backend that rows travel with, whatever was asked for, and `tensor_parallel` what sums travel with
    ("shm", "gloo", "nccl"); "none" where a rank exchanges with nobody.
    `expert_bytes` of one expert's slot in one layer (what moving an expert moves), 0 without experts.
    """

    device: str
    dtype: str
    kernels: str
    all2all: str
    tensor_parallel: str
    kv_blocks: int
    kv_block_bytes: int
    weight_bytes: int
    expert_bytes: int
    checkpoint_bytes_read: int
    checkpoint_bytes_total: int
    load_seconds: dict[str, float]


class AllocateKV(msgspec.Struct, frozen=True, tag="allocate_kv"):
    """Make the KV cache, `num_blocks` blocks on every rank. Answered with Done."""

    num_blocks: int


class Done(msgspec.Struct, frozen=True, tag="done"):
    """A command without a result was carried out."""


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """A command could not be carried out. `error` names the class in base.errors; any other name is an EngineError."""

    message: str
    error: str = "EngineError"

    @classmethod
    def of(cls, error: Exception) -> Failed:
        """The reply that carries an error to the engine; one that is not of our tree says its class in the message."""
        name = type(error).__name__
        if name in _CARRIED:
            return cls(str(error), name)
        return cls(f"{name}: {error}")

    def to_error(self, who: str) -> MoEServeError:
        """The error as it was. The message says `who` failed, except for an operator's mistakes: those are nobody's."""
        kind = _CARRIED.get(self.error, EngineError)
        return kind(self.message if issubclass(kind, ConfigError | MissingExtra) else f"{who}: {self.message}")


Command = LoadModel | AllocateKV | StepPlan | StageExperts | SetShares | PollStage
Reply = WorkerFacts | Done | StepResult | StageStatus | Failed

_CARRIED: dict[str, type[MoEServeError]] = {
    kind.__name__: kind
    for kind in (ConfigError, CheckpointError, MissingExtra, EngineError, WorkerDied, EngineDead, RankTimeout)
}
