"""Tables of pluggable parts that an option names: name -> where the class or function is. A new part adds a line.

Nothing is imported until a name is chosen, so that a part's own packages are needed only by whoever chooses it.
"""

from __future__ import annotations

from moe_serve.base.registry import Registry

_FROM_SOURCE = (
    "build it from {} on every node (docs/all-to-all.md has how), or choose another backend (--all2all-backend)"
)
ALL2ALL = Registry(
    "all2all backend",
    "--all2all-backend",
    {
        "naive": "moe_serve.model.all2all.naive:Naive",
        "allgather_reducescatter": "moe_serve.model.all2all.allgather_reducescatter:AllGatherReduceScatter",
        "torch_a2a": "moe_serve.model.all2all.torch_a2a:TorchAllToAll",
        "torch_padded": "moe_serve.model.all2all.torch_padded:TorchPadded",
        "shm": "moe_serve.model.all2all.shared_memory:SharedMemoryAllToAll",
        "deepep_high_throughput": "moe_serve.model.all2all.deepep_high_throughput:DeepEPHighThroughput",
        "deepep_v2": "moe_serve.model.all2all.deepep_v2:DeepEPV2",
        "deepep_low_latency": "moe_serve.model.all2all.deepep_low_latency:DeepEPLowLatency",
        "pplx": "moe_serve.model.all2all.pplx:Pplx",
        "pplx_garden": "moe_serve.model.all2all.pplx_garden:PplxGarden",
        "flashinfer_nvlink_one_sided": "moe_serve.model.all2all.flashinfer_one_sided:FlashInferOneSided",
        "flashinfer_nvlink_two_sided": "moe_serve.model.all2all.flashinfer_two_sided:FlashInferTwoSided",
    },
    second_names={"flashinfer_all2allv": "flashinfer_nvlink_two_sided"},
    sources={
        "deep_ep": _FROM_SOURCE.format("https://github.com/deepseek-ai/DeepEP"),
        "pplx_kernels": _FROM_SOURCE.format("https://github.com/perplexityai/pplx-kernels"),
        "pplx_garden": _FROM_SOURCE.format("https://github.com/perplexityai/pplx-garden"),
        "flashinfer": "install moe-serve[flashinfer] on every node, or choose another backend (--all2all-backend)",
    },
)
EXECUTORS = Registry(
    "executor",
    "--distributed-executor-backend",
    {
        "uni": "moe_serve.executor.uni:UniExecutor",
        "mp": "moe_serve.executor.mp:MultiprocessExecutor",
        "external_launcher": "moe_serve.executor.external_launcher:ExternalLauncherExecutor",
        "ray": "moe_serve.executor.ray:RayExecutor",
    },
)
EPLB_POLICIES = Registry(
    "EPLB policy",
    "--eplb-config.policy",
    {
        "sticky": "moe_serve.eplb.policies.sticky:sticky",
        "deepseek": "moe_serve.eplb.policies.deepseek:deepseek",
        "static": "moe_serve.eplb.policies.static:static",
        "shuffle": "moe_serve.eplb.policies.shuffle:shuffle",
    },
)
