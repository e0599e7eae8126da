"""LLMs in processes that torchrun or the test itself starts one by one: what they are to do, and what came of it.

As a script, one of these processes: it makes an LLM, calls generate(), writes down what it got, and never closes it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moe_serve.base.errors import ConfigError
from moe_serve.base.interpreter import import_environment
from moe_serve.base.sampling import SamplingParams
from moe_serve.llm import LLM
from tests.support.supervised import free_ports

LIMIT_SECONDS = 150


@dataclass(frozen=True, kw_only=True)
class Job:
    """`prompts[dp]` of each DP rank, given in so many `calls`; `odd[process]` has others. `options_of[process]` on top
    of `options`. A process in `idle` makes its LLM and no call, but sleeps."""

    model: str
    options: dict[str, object]
    prompts: list[list[list[int]]]
    sampling: dict[str, object]
    calls: int = 1
    odd: dict[str, list[list[int]]] = field(default_factory=dict)
    options_of: dict[str, dict[str, object]] = field(default_factory=dict)
    idle: list[int] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """`answers[process][call]` token ids by prompt, of those that got so far; `num_blocks` likewise."""

    code: int
    output: str
    answers: dict[int, list[list[list[int]]]]
    num_blocks: dict[int, int]


def torchrun(job: Job, folder: Path, size: int) -> Outcome:
    """The job in `size` processes of a real torchrun on this machine."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    (folder / "job.json").write_text(json.dumps(asdict(job)))
    done = subprocess.run(
        [*command, "-m", "tests.support.launched", str(folder)],
        env=os.environ | import_environment() | {"OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=LIMIT_SECONDS,
    )
    return _outcome(folder, size, done.returncode, done.stdout)


class Processes:
    """The job, or a script, in processes of the test's own; `told[process]` their environment. A context manager."""

    def __init__(self, job: Job | Path, folder: Path, told: Sequence[Mapping[str, str]]) -> None:
        arguments = [str(job)] if isinstance(job, Path) else ["-m", "tests.support.launched", str(folder)]
        if isinstance(job, Job):
            (folder / "job.json").write_text(json.dumps(asdict(job)))
        self.folder = folder
        self.started = []
        for number, variables in enumerate(told):
            with (folder / f"log-{number}").open("w") as log:
                self.started.append(
                    subprocess.Popen(
                        [sys.executable, *arguments],
                        env=os.environ | import_environment() | dict(variables) | {"TEST_PROCESS": str(number)},
                        stdout=log,
                        stderr=log,
                    )
                )

    def log(self, number: int) -> str:
        return (self.folder / f"log-{number}").read_text()

    def wait(self, seconds: float = LIMIT_SECONDS) -> Outcome:
        """Until all have ended; the code of the first that is not 0."""
        deadline = time.monotonic() + seconds
        codes = [process.wait(max(0.1, deadline - time.monotonic())) for process in self.started]
        output = "\n".join(map(self.log, range(len(self.started))))
        return _outcome(self.folder, len(self.started), next((code for code in codes if code), 0), output)

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *exc: object) -> None:
        for process in self.started:
            process.kill()
            process.wait()


def torch_variables(size: int) -> list[dict[str, str]]:
    """As torchrun's, but without its store: process 0 opens one."""
    where = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports(1))}
    return [where | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]


def dp_variables(size: int) -> list[dict[str, str]]:
    """Of data-parallel ranks that are each an LLM."""
    where = {"SIZE": str(size), "MASTER_IP": "127.0.0.1", "MASTER_PORT": str(free_ports(1))}
    return [
        {f"MOE_SERVE_DP_{name}": value for name, value in (where | {"RANK": str(rank)}).items()} for rank in range(size)
    ]


def _outcome(folder: Path, size: int, code: int, output: str) -> Outcome:
    files = {number: folder / f"answers-{number}.json" for number in range(size)}
    found = {number: json.loads(file.read_text()) for number, file in files.items() if file.exists()}
    return Outcome(
        code=code,
        output=output,
        answers={number: each["answers"] for number, each in found.items()},
        num_blocks={number: each["num_blocks"] for number, each in found.items()},
    )


def work(folder: Path) -> None:
    told = json.loads((folder / "job.json").read_text())
    number = os.environ.get("RANK") or os.environ["TEST_PROCESS"]
    llm = LLM(told["model"], **told["options"], **told["options_of"].get(number, {}))
    (folder / f"made-{number}").touch()
    if int(number) in told["idle"]:
        time.sleep(LIMIT_SECONDS)
    prompts = told["odd"].get(number, told["prompts"][llm.data_parallel_rank])
    sampling = SamplingParams(**told["sampling"])
    answers = []
    for _ in range(told["calls"]):
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, show_progress=False)
        answers.append([list(output.outputs[0].token_ids) for output in outputs])
    engines: Any = llm._engines
    saved = {"answers": answers, "num_blocks": engines.core.pool.num_blocks}
    (folder / f"answers-{number}.json").write_text(json.dumps(saved))


def main() -> int:
    try:
        work(Path(sys.argv[1]))
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
