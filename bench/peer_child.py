"""Child of bench.peers: one peer, loaded in an interpreter that has it. A line of prompts in, a line of tokens out.

Started by its path with the path of the peer's file, so that nothing of this package is on the peer's import path.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from typing import Any


def main() -> None:
    peer, model, options = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not stand among the answers
    generate = load(peer)(model, json.loads(options))
    for line in sys.stdin:
        asked = json.loads(line)
        started = time.perf_counter()
        tokens = generate(asked["prompts"], asked["output_len"])
        seconds = time.perf_counter() - started
        print(json.dumps({"seconds": seconds, "answers": tokens}), file=answers, flush=True)


def load(path: str) -> Any:
    """`load` of a peer's file: load(model, options) -> generate, which gives tokens for prompts and an output_len."""
    spec = importlib.util.spec_from_file_location("peer", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.load


if __name__ == "__main__":
    main()
