"""Prompts through a world that torchrun starts, one process per rank; every process has the answers of its DP rank:

torchrun --nproc-per-node 4 -m moe_serve.examples.torchrun -dp 2 -tp 2 -ep
"""

from __future__ import annotations

import sys

from moe_serve.examples.offline import answer, engine_options, parser_for, run
from moe_serve.llm import LLM


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("-dp", "--data-parallel-size", type=int, default=1)
    parser.add_argument("-pp", "--pipeline-parallel-size", type=int, default=1)
    given = parser.parse_args()
    llm = LLM(
        given.model,
        **engine_options(given),
        data_parallel_size=given.data_parallel_size,
        pipeline_parallel_size=given.pipeline_parallel_size,
        distributed_executor_backend="external_launcher",
    )
    answer(llm, given)


if __name__ == "__main__":
    sys.exit(run(main))
