"""The process that works questions out for a coordinator, one after the other, and says how long each took.

Started as `python -m moe_serve.world.solver_process` with questions on its standard input. It ends with its parent,
also in the middle of a question: a thread of its own watches the input.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
import time
import traceback
from typing import BinaryIO

from moe_serve.eplb.questions import Question
from moe_serve.eplb.solving import solve
from moe_serve.world.solver_wire import HEADER, SolvedHead, decode_question, encode_head


def main() -> None:
    source, target = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a policy may print
    questions: queue.Queue[Question] = queue.Queue()
    threading.Thread(target=_read, args=(source, questions), daemon=True).start()
    while True:
        _answer(questions.get(), target)


def _read(source: BinaryIO, questions: queue.Queue[Question]) -> None:
    try:
        while header := source.read(HEADER.size):
            (length,) = HEADER.unpack(header)
            questions.put(decode_question(source.read(length)))
    except BaseException:  # noqa: BLE001 (a thread that ends alone would leave its parent waiting)
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def _answer(question: Question, target: BinaryIO) -> None:
    started = time.perf_counter()
    result, bodies = solve(question)
    seconds = time.perf_counter() - started
    head = encode_head(SolvedHead(question.number, seconds, result, [len(body) for body in bodies]))
    for part in (HEADER.pack(len(head)), head, *bodies):
        target.write(part)
    target.flush()


if __name__ == "__main__":
    main()
