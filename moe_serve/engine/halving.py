"""Which steps are cut in two halves, so that one's rows travel while the other computes (dual batch overlap). Pure."""

from __future__ import annotations

from dataclasses import dataclass

from moe_serve.base.commands import StepPlan
from moe_serve.base.parallel_config import ParallelConfig


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Fewest tokens of a step that is cut: one of single tokens only, and any other. None where none is."""

    decode: int | None
    prefill: int | None

    @classmethod
    def of(cls, parallel: ParallelConfig) -> Thresholds:
        if not parallel.enable_dbo:
            return cls(None, None)
        return cls(parallel.dbo_decode_token_threshold, parallel.dbo_prefill_token_threshold)

    def wants_halves(self, plan: StepPlan) -> bool:
        """What an engine says of its own part of a step; it is cut if all say so."""
        only_decodes = all(part.num_tokens == 1 for part in plan.scheduled)
        least = self.decode if only_decodes else self.prefill
        return least is not None and plan.num_tokens >= max(2, least)
