"""A line about throughput every ten seconds, while there is something to tell."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping

from moe_serve.api.metrics import Metrics
from moe_serve.base.engine_messages import LoadReport
from moe_serve.base.metrics import GENERATION_TOKENS, PROMPT_TOKENS

PERIOD_SECONDS = 10.0
log = logging.getLogger(__name__)


class Throughput:
    """What was done between two calls of `line`, and how the engines stand. `waiting` sequences have not begun."""

    def __init__(
        self, metrics: Metrics, reports: Callable[[], Mapping[int, LoadReport]], waiting: Callable[[], int]
    ) -> None:
        self._metrics, self._reports, self._waiting = metrics, reports, waiting
        self._before = (0.0, 0.0, 0, 0)

    def line(self, seconds: float) -> str | None:
        """None where nothing was done and nothing is to do."""
        reports = list(self._reports().values())
        now = (
            self._metrics.total(PROMPT_TOKENS),
            self._metrics.total(GENERATION_TOKENS),
            sum(report.prefix_cache_queries for report in reports),
            sum(report.prefix_cache_hits for report in reports),
        )
        prompt, generated, queries, hits = (new - old for new, old in zip(now, self._before, strict=True))
        self._before = now
        running, waiting = sum(report.num_running for report in reports), self._waiting()
        if not (prompt or generated or waiting):
            return None
        blocks = sum(report.num_blocks for report in reports)
        used = 1 - sum(report.free_blocks for report in reports) / blocks if blocks else 0.0
        return (
            f"throughput: prompt {prompt / seconds:.1f} tokens/s, generation {generated / seconds:.1f} tokens/s; "
            f"running {running} requests, waiting {waiting}; KV cache usage {100 * used:.1f} %, "
            f"prefix cache hit rate {100 * hits / queries if queries else 0.0:.1f} %"
        )


async def report_throughput(throughput: Throughput) -> None:
    """Log its lines, for ever."""
    while True:
        await asyncio.sleep(PERIOD_SECONDS)
        line = throughput.line(PERIOD_SECONDS)
        if line is not None:
            log.info("%s", line)
