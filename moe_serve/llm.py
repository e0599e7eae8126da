"""LLM: the engine without HTTP. One rank runs in this process; a larger world is started like a server's.

`LLM(model, tensor_parallel_size=2)` takes every option under its flag's name with underscores.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from moe_serve.base.commands import TokenLogprob
from moe_serve.base.config import Config
from moe_serve.base.errors import RequestError
from moe_serve.base.log import setup_logging
from moe_serve.base.messages import FinishReason, Generate, TokenEvent
from moe_serve.base.sampling import SamplingParams
from moe_serve.engine.alone import OneEngine, OnEvent
from moe_serve.launch.embedded import EngineWorld
from moe_serve.launch.resolve import resolve
from moe_serve.text.growing import GrowingText, Growth
from moe_serve.text.tokenizer import Tokenizer

Prompt = str | Sequence[int]
Message = Mapping[str, object]


@dataclass(slots=True)
class CompletionOutput:
    """One choice. `logprobs` one per token, if asked for; `stop_reason` the stop string or token that ended it."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None
    stop_reason: str | int | None
    logprobs: list[TokenLogprob] | None


@dataclass(slots=True)
class RequestOutput:
    """What became of one prompt. `prompt` is None where token ids were given; `outputs` has n choices."""

    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[TokenLogprob] | None


class Engines(Protocol):
    """What LLM needs: run sequences to their end. `on_event` says whether a sequence has reached its end early."""

    def run(self, sequences: list[Generate], on_event: OnEvent) -> None: ...

    def close(self) -> None: ...


class LLM:
    """A model ready to generate. Use as a context manager, or call close(). Raises ConfigError."""

    def __init__(self, model: str | None = None, **options: object) -> None:
        given = options if model is None else {"model": model, **options}
        asked = Config.from_flat({"log_level": "warning", **given})
        setup_logging("llm", asked.server.log_level)
        config, model_config = resolve(asked)
        self.config = config
        self.tokenizer = Tokenizer(Path(config.model.model or ""))
        self._ids = itertools.count()
        alone = config.parallel.world_size_across_dp == 1
        self._engines: Engines = OneEngine(config, model_config) if alone else EngineWorld(config)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        show_progress: bool = True,
    ) -> list[RequestOutput]:
        """Answers in the order of the prompts (texts or token ids). `params` one for all, or one per prompt.

        Raises RequestError if one of the requests cannot be; the others are given up with it.
        """
        many = _as_list(prompts)
        each = list(params) if isinstance(params, Sequence) else [params or SamplingParams()] * len(many)
        if len(each) != len(many):
            raise RequestError(f"{len(each)} sampling params for {len(many)} prompts", param="params")
        answers = [self._prepare(prompt, wanted) for prompt, wanted in zip(many, each, strict=True)]
        choices = {choice.request.request_id: choice for answer in answers for choice in answer.choices}
        with _bar(len(choices), show_progress) as advance:

            def on_event(event: TokenEvent) -> bool:
                choice = choices[event.request_id]
                ended = choice.take(event)
                if ended:
                    advance()
                return ended

            self._engines.run([choice.request for choice in choices.values()], on_event)
        return [answer.output() for answer in answers]

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        show_progress: bool = True,
    ) -> list[RequestOutput]:
        """generate() on one conversation or several, rendered by the model's chat template."""
        several = [messages] if messages and isinstance(messages[0], Mapping) else messages
        texts = [self.tokenizer.render_chat(conversation) for conversation in several]  # type: ignore[arg-type]
        prompts = [self.tokenizer.encode(text, add_special_tokens=False) for text in texts]
        outputs = self.generate(prompts, params, show_progress=show_progress)
        for output, text in zip(outputs, texts, strict=True):
            output.prompt = text
        return outputs

    def close(self) -> None:
        """End the engines; safe to call twice."""
        self._engines.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _prepare(self, prompt: Prompt, sampling: SamplingParams) -> PendingOutput:
        token_ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        name = f"llm-{next(self._ids)}"
        return PendingOutput(
            prompt if isinstance(prompt, str) else None,
            token_ids,
            [
                PendingCompletion(
                    self.tokenizer, Generate(request_id=f"{name}-{i}", token_ids=token_ids, sampling=single), i
                )
                for i, single in enumerate(sampling.choices())
            ],
        )


class PendingCompletion:
    """One choice until it has ended: collects what GrowingText makes of its events."""

    def __init__(self, tokenizer: Tokenizer, request: Generate, index: int) -> None:
        self.request = request
        self.prompt_logprobs: list[TokenLogprob] | None = None
        self._growing = GrowingText(tokenizer, request.token_ids, request.sampling)
        self._growths: list[Growth] = []
        self._index = index

    def take(self, event: TokenEvent) -> bool:
        """Book an event; whether the choice has ended."""
        self._growths.append(self._growing.take(event))
        self.prompt_logprobs = event.prompt_logprobs or self.prompt_logprobs
        return self._growing.finish_reason is not None

    def output(self) -> CompletionOutput:
        """The finished choice."""
        growths = self._growths
        asked = self.request.sampling.logprobs is not None
        return CompletionOutput(
            index=self._index,
            text="".join(growth.text for growth in growths),
            token_ids=[token_id for growth in growths for token_id in growth.token_ids],
            finish_reason=self._growing.finish_reason,
            stop_reason=self._growing.stop_reason,
            logprobs=[entry for growth in growths for entry in growth.logprobs or []] if asked else None,
        )


@dataclass(slots=True)
class PendingOutput:
    """One prompt and its choices."""

    prompt: str | None
    token_ids: list[int]
    choices: list[PendingCompletion]

    def output(self) -> RequestOutput:
        outputs = [choice.output() for choice in self.choices]
        return RequestOutput(self.prompt, self.token_ids, outputs, self.choices[0].prompt_logprobs)


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several, as several."""
    if isinstance(prompts, str):
        return [prompts]
    ids = [item for item in prompts if isinstance(item, int)]
    texts = [item for item in prompts if not isinstance(item, int)]
    if ids and texts:
        raise RequestError("prompts mix token ids with texts or lists", param="prompts")
    return [ids] if ids else list(texts)


@contextlib.contextmanager
def _bar(total: int, show: bool) -> Iterator[Callable[[], None]]:
    """A progress bar on standard error that counts finished choices."""
    columns = (TextColumn("generating"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not show) as progress:
        task = progress.add_task("generating", total=total)
        yield lambda: progress.advance(task)
