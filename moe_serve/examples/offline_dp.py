"""Prompts through data-parallel ranks that are each an LLM in a process of its own. Each is told its place:

export MOE_SERVE_DP_SIZE=2 MOE_SERVE_DP_MASTER_IP=127.0.0.1 MOE_SERVE_DP_MASTER_PORT=29600
for rank in 0 1; do MOE_SERVE_DP_RANK=$rank python -m moe_serve.examples.offline_dp -ep & done; wait
"""

from __future__ import annotations

import sys

from moe_serve.examples.offline import answer, engine_options, parser_for, run
from moe_serve.llm import LLM


def main() -> None:
    given = parser_for(__doc__).parse_args()
    answer(LLM(given.model, **engine_options(given)), given)


if __name__ == "__main__":
    sys.exit(run(main))
