"""Child of bench.turns: the LLM of whatever checkout is on the import path. A line of prompts in, a line of tokens out.

Started by its path, not as a module, so that it runs beside a checkout that does not have it.
"""

from __future__ import annotations

import json
import sys
import time

from moe_serve import LLM, SamplingParams


def main() -> None:
    model, options = sys.argv[1:]
    with LLM(model, enable_prefix_caching=False, **json.loads(options)) as llm:
        for line in sys.stdin:
            asked = json.loads(line)
            params = SamplingParams(temperature=0, max_tokens=asked["output_len"], ignore_eos=True)
            started = time.perf_counter()
            outputs = llm.generate(asked["prompts"], params, show_progress=False)
            seconds = time.perf_counter() - started
            answers = [output.outputs[0].token_ids for output in outputs]
            print(json.dumps({"seconds": seconds, "answers": answers}), flush=True)


if __name__ == "__main__":
    main()
