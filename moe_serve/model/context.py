"""ForwardContext: all that a layer may know about the step it is in. Passed as an argument, never looked up.

Shape letters: T tokens on this rank, D hidden, H query heads, G KV heads, d head dimension, N KV slots.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from moe_serve.base.progress import Progress
from moe_serve.base.trace import ChromeTrace


@dataclass(frozen=True, slots=True)
class TokenKV:
    """What one layer keeps of a token on this rank: k and v of its own KV heads."""

    num_kv_heads: int
    k_dim: int
    v_dim: int

    @property
    def num_elements(self) -> int:
        return self.num_kv_heads * (self.k_dim + self.v_dim)


@dataclass(frozen=True, slots=True)
class LayerKV:
    """One layer's KV cache on this rank: k and v, each (N, G, d), N = blocks x size. Slot = block * size + offset."""

    k_NGd: Tensor
    v_NGd: Tensor


@dataclass(slots=True)
class StepClock:
    """Seconds of one step, all layers together: in exchanges between ranks, and with this rank's experts.

    The latter stay 0 where the host does not see their end.
    """

    all2all_seconds: float = 0.0
    expert_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class ForwardContext:
    """`positions_T` int64; `attention` what the attention backend's plan() made; `kv` one per layer of this stage.

    `rows_by_ep_rank[i]` rows EP rank i brings to every MoE layer of this step (each engine's tokens cut over its TP
    ranks by topology.split_range); known to all ranks from the step plan, so sizes need no exchange. `row_hash_T`
    int64 tells rows apart where experts have several copies (see moe/expert_map.py). `routes`, where load is watched,
    gets each layer's logical expert ids (S, K) of this rank's own rows, in order of the layers. `half` of a step that
    is cut in two. `trace`, where one is kept.
    """

    positions_T: Tensor
    attention: object
    kv: tuple[LayerKV, ...]
    rows_by_ep_rank: tuple[int, ...]
    row_hash_T: Tensor | None = None
    routes: list[Tensor] | None = None
    progress: Progress = field(default_factory=Progress)
    clock: StepClock = field(default_factory=StepClock)
    half: int | None = None
    trace: ChromeTrace | None = None

    def traced(self, name: str, started: float, *, travels: bool = False) -> None:
        """Note in the trace what has lasted from `started` (time.perf_counter()) until now."""
        if self.trace is not None:
            whose = "" if self.half is None else f" half {self.half}"
            track = "rows travel" if travels else "computes"
            self.trace.add(name, f"{track}{whose}", started, step=self.progress.step, layer=self.progress.layer)
