"""A core on workers that have loaded: the KV cache is made, and the checkpoint's limits are its own."""

from __future__ import annotations

from collections.abc import Callable

from moe_serve.base.commands import AllocateKV, WorkerFacts
from moe_serve.base.config import Config
from moe_serve.base.engine_messages import EngineHello
from moe_serve.base.model_config import ModelConfig
from moe_serve.engine.block_pool import BlockPool
from moe_serve.engine.core import EngineCore, draw_seed
from moe_serve.executor.base import Executor

ALLOCATE_SECONDS = 300.0


def build_core(
    executor: Executor,
    config: Config,
    model: ModelConfig,
    facts: WorkerFacts,
    *,
    num_blocks: int,
    draw_seed: Callable[[], int] = draw_seed,
) -> EngineCore:
    """`facts` as `executor.start()` gave them; `num_blocks` what all engines agreed on, at most `facts.kv_blocks`.

    Raises ConfigError if so many blocks cannot hold one sequence, EngineError if a worker fails.
    `draw_seed` for requests that come without a seed.
    """
    executor.submit(AllocateKV(num_blocks)).result(timeout=ALLOCATE_SECONDS)
    return EngineCore(
        executor,
        config=config,
        num_blocks=num_blocks,
        max_model_len=config.model.max_model_len or model.max_position_embeddings,
        vocab_size=model.vocab_size,
        eos_token_ids=model.eos_token_ids,
        draw_seed=draw_seed,
    )


def make_hello(dp: int, facts: WorkerFacts, core: EngineCore) -> EngineHello:
    """What the engine of a DP rank says to every front-end first."""
    return EngineHello(
        dp=dp,
        num_blocks=core.pool.num_blocks,
        block_size=core.pool.block_size,
        max_model_len=core.max_model_len,
        facts={
            "device": facts.device,
            "dtype": facts.dtype,
            "kernels": facts.kernels,
            "all2all_backend": facts.all2all,
            "tensor_parallel": facts.tensor_parallel,
        },
        load_seconds=facts.load_seconds,
    )


def describe_loaded(facts: WorkerFacts, pool: BlockPool) -> str:
    """One line about what an engine has loaded, for the operator."""
    phases = ", ".join(f"{phase} {seconds:.2f} s" for phase, seconds in facts.load_seconds.items())
    return (
        f"loaded {facts.weight_bytes / 2**20:.1f} MiB of weights as {facts.dtype} on {facts.device}, computed with "
        f"{facts.kernels} (read {facts.checkpoint_bytes_read / 2**20:.1f} of "
        f"{facts.checkpoint_bytes_total / 2**20:.1f} MiB on disk); "
        f"KV cache: {pool.num_blocks * pool.block_size} tokens, "
        f"{pool.num_blocks * facts.kv_block_bytes / 2**20:.1f} MiB; {phases}"
    )
