"""`moe-serve eplb record`: prompts through an engine in this process, and the expert load of each of its steps."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from moe_serve.base.commands import Command, Meeting, Reply, StepPlan, StepResult
from moe_serve.base.config import Config
from moe_serve.base.engine_messages import Generate, TokenEvent
from moe_serve.base.errors import ConfigError, RequestError, RequestFailed
from moe_serve.base.progress import Progress as RankProgress
from moe_serve.base.sampling import SamplingParams
from moe_serve.engine.alone import OneEngine
from moe_serve.eplb.desk.loads import Trace
from moe_serve.eplb.window import Counts
from moe_serve.executor.uni import UniExecutor
from moe_serve.launch.resolve import resolve
from moe_serve.text.tokenizer import Tokenizer

console = Console(stderr=True)


class RecordingExecutor(UniExecutor):
    """One rank in this process that keeps the load of every step in `steps`, int64 (L, 2, E) as bytes."""

    def __init__(self, config: Config, meeting: Meeting, progress: RankProgress) -> None:
        super().__init__(config, meeting, progress, watches_load=True)
        self.steps: list[bytes] = []

    def submit(self, command: Command) -> Future[Reply]:
        """Carry a command out; steps with collecting."""
        if not isinstance(command, StepPlan):
            return super().submit(command)
        future = super().submit(msgspec.structs.replace(command, collect_load=True))
        if future.exception() is None:
            result = future.result()
            assert isinstance(result, StepResult)
            self.steps.append(result.load)
        return future


@dataclass(frozen=True, slots=True)
class Prompt:
    """A text, token ids or a conversation, and where it came from."""

    content: str | list[int] | list[dict[str, str]]
    place: str


def record(model: str | None, prompts: Sequence[str], *, max_tokens: int, options: Mapping[str, object]) -> Trace:
    """Generate greedily; the load by step. `options` of the engine by their flags' names. Raises ConfigError."""
    wanted = read_prompts(prompts)
    given = {"log_level": "warning", **options} | ({} if model is None else {"model": model})
    executor = f"{RecordingExecutor.__module__}:{RecordingExecutor.__name__}"
    config, model_config = resolve(
        Config.from_flat(given | {"enable_expert_parallel": True, "distributed_executor_backend": executor})
    )
    tokenizer = Tokenizer(Path(config.model.model or ""))
    limit = config.model.max_model_len or model_config.max_position_embeddings
    sequences = [_sequence(tokenizer, prompt, number, max_tokens, limit) for number, prompt in enumerate(wanted)]
    console.print(f"loading {config.model.served_model_name}", soft_wrap=True)
    engine = OneEngine(config, model_config)
    try:
        _run(engine, sequences)
        executor_used = engine.core.executor
        assert isinstance(executor_used, RecordingExecutor)
        counts = _by_step(executor_used.steps, len(model_config.moe_layers), model_config.num_experts)
    finally:
        engine.close()
    tokens = int(counts[:, 0].sum()) // model_config.top_k
    metadata = {
        "model": config.model.served_model_name or "",
        "architecture": model_config.architecture,
        "top_k": str(model_config.top_k),
        "prompts": str(len(sequences)),
        "steps": str(len(counts)),
        "tokens": str(tokens),
        "made_by": "moe-serve eplb record",
    }
    return Trace(counts, metadata)


def read_prompts(given: Sequence[str]) -> list[Prompt]:
    """Texts as they are; a .jsonl file's lines: a string, or an object with `prompt` (text or token ids) or `messages`.

    ConfigError names the file and line that is something else.
    """
    found: list[Prompt] = []
    for number, text in enumerate(given, 1):
        if Path(text).suffix == ".jsonl":
            found += _read_lines(Path(text))
        else:
            found.append(Prompt(text, f"prompt {number}"))
    if not found:
        raise ConfigError(f"no prompts in {', '.join(given)}")
    return found


def _read_lines(path: Path) -> list[Prompt]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"--prompts {path} cannot be read: {reason}") from error
    return [_parse(line, f"{path} line {number}") for number, line in enumerate(lines, 1) if line.strip()]


def _parse(line: str, place: str) -> Prompt:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{place} is not JSON: {error}") from error
    if isinstance(value, dict):
        value = value.get("messages", value.get("prompt"))
    good = isinstance(value, str)
    if isinstance(value, list) and value:
        is_ids = all(isinstance(item, int) and not isinstance(item, bool) for item in value)
        good = is_ids or all(isinstance(item, dict) and "role" in item and "content" in item for item in value)
    if not good:
        raise ConfigError(f'{place} must be a text, or an object with "prompt" (text or token ids) or "messages"')
    return Prompt(value, place)


def _sequence(tokenizer: Tokenizer, prompt: Prompt, number: int, max_tokens: int, limit: int) -> Generate:
    content = prompt.content
    if isinstance(content, str):
        token_ids = tokenizer.encode(content)
    elif content and isinstance(content[0], dict):
        try:
            text = tokenizer.render_chat(content)
        except RequestError as error:
            raise ConfigError(f"{prompt.place}: {error}") from error
        token_ids = tokenizer.encode(text, add_special_tokens=False)
    else:
        token_ids = [item for item in content if isinstance(item, int)]
    if not token_ids or len(token_ids) + max_tokens > limit:
        raise ConfigError(
            f"{prompt.place} has {len(token_ids)} tokens; it needs at least one, and with --max-tokens {max_tokens} at "
            f"most {limit} (--max-model-len)"
        )
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    return Generate(request_id=f"record-{number}", token_ids=token_ids, sampling=sampling)


def _run(engine: OneEngine, sequences: list[Generate]) -> None:
    """All sequences to their end, with a progress bar on standard error."""
    columns = (TextColumn("recording"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("recording", total=len(sequences))

        def on_event(event: TokenEvent) -> bool:
            if event.finish_reason == "error":
                raise RequestFailed(event.error)
            ended = event.finish_reason is not None
            if ended:
                progress.advance(task)
            return ended

        try:
            engine.run(sequences, on_event)
        except RequestError as error:
            raise ConfigError(str(error)) from error


def _by_step(steps: Sequence[bytes], layers: int, experts: int) -> Counts:
    """int64 (steps, L, E), prefill and decode together."""
    tables = [np.frombuffer(step, dtype=np.int64).reshape(layers, 2, experts).sum(axis=1) for step in steps]
    return np.stack(tables)
