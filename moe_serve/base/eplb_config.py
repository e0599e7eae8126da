"""The load balancer's own options: a group of its own inside the section of ranks."""

from __future__ import annotations

from pydantic import Field

from moe_serve.base.section import Section, Size


class EPLBConfig(Section):
    """Load balancing of experts."""

    window_size: Size = 1000
    """Steps over which expert load is summed."""
    step_interval: Size = 3000
    """Steps between two rearrangements."""
    num_redundant_experts: int = Field(0, ge=0)
    """Physical expert slots beyond one per logical expert, in each layer."""
    log_balancedness: bool = False
    """Log mean / max rank load."""
    policy: str = "sticky"
    """Which placement to aim for."""
    min_gain: float = Field(0.001, ge=0)
    """Least predicted gain of a rearrangement, as a share of the time of a step that is saved over the next interval
    after paying for the move; 0 applies whatever the policy says."""
    max_bytes_per_step: Size = 1 << 20
    """Most bytes of expert weights that a rank sends or receives between two steps."""
    prefer_local: bool = True
    """Take the copy of an expert on the same rank, then the same node, first."""
