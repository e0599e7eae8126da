"""LLM: the engine without HTTP. One rank runs in this process; a larger world is started like a server's.

`LLM(model, tensor_parallel_size=2)` takes every option under its flag's name with underscores.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Protocol, Self, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from moe_serve.api.messages import checked_messages
from moe_serve.base.config import Config
from moe_serve.base.engine_messages import Generate, TokenEvent
from moe_serve.base.errors import ConfigError
from moe_serve.base.launched import LaunchedProcess, launched_process, with_spmd_variables
from moe_serve.base.log import setup_logging
from moe_serve.base.model_config import ModelConfig
from moe_serve.base.registry import import_target
from moe_serve.base.sampling import SamplingParams, with_defaults
from moe_serve.engine.alone import OneEngine, OnEvent
from moe_serve.engine.request import check_request
from moe_serve.launch.embedded import EngineWorld
from moe_serve.launch.part import given_token, world_token
from moe_serve.launch.resolve import resolve
from moe_serve.text.outputs import PendingCompletion, PendingOutput, RequestOutput
from moe_serve.text.prompts import GivenPrompt, as_conversations, as_params, as_prompts, naming
from moe_serve.text.tokenizer import load_tokenizer

LAUNCHED = "moe_serve.engine.launched:LaunchedEngine"
Ids = Sequence[int]
Prompt = str | Ids | Mapping[str, object]
Message = Mapping[str, object]
Params = SamplingParams | Iterable[SamplingParams | None] | None


class Engines(Protocol):
    """What LLM needs: run sequences to their end. `on_event` says whether a sequence has reached its end early."""

    def run(self, sequences: list[Generate], on_event: OnEvent) -> None: ...

    def close(self) -> None: ...


class LLM:
    """A model ready to generate. Use as a context manager, or call close(). Raises ConfigError."""

    def __init__(self, model: str | os.PathLike[str] | None = None, **options: object) -> None:
        named = options if model is None else {"model": os.fspath(model), **options}
        given = with_spmd_variables(named, os.environ)
        asked = Config.from_flat({"log_level": "warning", **given})
        if asked.server.api_server_count > 1:
            raise ConfigError(
                f"api_server_count ({asked.server.api_server_count}) is for `moe-serve serve`: LLM has no API server"
            )
        setup_logging("llm", asked.server.log_level)
        config, model_config = resolve(asked)
        self.config = config
        self.tokenizer = load_tokenizer(config)
        self.default_params = with_defaults(model_config.generation_defaults)
        self._check = partial(
            check_request,
            max_model_len=config.model.max_model_len or model_config.max_position_embeddings,
            vocab_size=model_config.vocab_size,
            eos_token_ids=model_config.eos_token_ids,
        )
        self._ids = itertools.count()
        process = launched_process(config.parallel, os.environ)
        self.process_number = 0 if process is None else process.number
        """Of this process among those that are one world, where each was started by itself."""
        self.data_parallel_rank = 0 if process is None else process.dp_rank(config.parallel.topology)
        """Whose requests this process brings, where each was started by itself; else 0, and it brings those of all."""
        self._engines = _engines(config, model_config, process)

    def generate(
        self, prompts: Prompt | Iterable[Prompt], params: Params = None, *, show_progress: bool = True
    ) -> list[RequestOutput]:
        """Answers in the order of the prompts.

        A prompt is a text, token ids, or a dict with `prompt` or `prompt_token_ids`. `params` are one for all or one
        per prompt; where there are none, `default_params`: the model folder's, with 16 tokens. RequestError, before
        anything runs, names a request that cannot be. A choice that an engine cannot go on with has finish_reason
        "error"; the others are not disturbed.
        """
        given = as_prompts(prompts)
        answers = []
        for place, (prompt, wanted) in enumerate(zip(given, self._params(params, len(given)), strict=True)):
            with naming(f"prompts[{place}]"):
                answers.append(self._prepare(prompt, wanted))
        return self._run(answers, show_progress)

    def chat(
        self,
        messages: Iterable[Message] | Iterable[Iterable[Message]],
        params: Params = None,
        *,
        show_progress: bool = True,
    ) -> list[RequestOutput]:
        """generate() on one conversation or several, rendered by the model's chat template."""
        conversations = as_conversations(messages)
        answers = []
        for place, wanted in enumerate(self._params(params, len(conversations))):
            with naming(f"conversation {place}"):
                checked = cast(list[Message], checked_messages(conversations[place]))
                rendered = self.tokenizer.chat_templates.render(checked)
                prompt = GivenPrompt(rendered.text, self.tokenizer.encode_chat(rendered))
                answers.append(self._prepare(prompt, wanted))
        return self._run(answers, show_progress)

    def close(self) -> None:
        """End the engines; safe to call twice."""
        self.tokenizer.chat_templates.close()
        self._engines.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _params(self, params: Params, count: int) -> list[SamplingParams]:
        return as_params(params, count, self.default_params)

    def _prepare(self, prompt: GivenPrompt, sampling: SamplingParams) -> PendingOutput:
        token_ids = self.tokenizer.encode(prompt.text or "") if prompt.token_ids is None else prompt.token_ids
        self._check(token_ids, sampling)
        name = f"llm-{next(self._ids)}"
        choices = [
            PendingCompletion(self.tokenizer, Generate(request_id=f"{name}-{i}", token_ids=token_ids, sampling=one), i)
            for i, one in enumerate(sampling.choices())
        ]
        return PendingOutput(prompt.text, token_ids, choices)

    def _run(self, answers: list[PendingOutput], show_progress: bool) -> list[RequestOutput]:
        choices = {choice.request.request_id: choice for answer in answers for choice in answer.choices}
        with _bar(len(choices), show_progress and self.process_number == 0) as advance:

            def on_event(event: TokenEvent) -> bool:
                choice = choices[event.request_id]
                ended = choice.take(event)
                if ended:
                    advance()
                return ended

            self._engines.run([choice.request for choice in choices.values()], on_event)
        return [answer.output() for answer in answers]


def _engines(config: Config, model: ModelConfig, process: LaunchedProcess | None) -> Engines:
    """This process's part of a world whose processes others start, one rank here, or a world that this one starts."""
    if process is not None:
        several = process.holds_engine and config.parallel.world_size > 1  # its workers are reached over sockets
        file = config.parallel.world_token_file
        token = world_token(config.parallel) if several else given_token(file)
        # Not at the top: a front-end whose engines are elsewhere needs no torch.
        launched = cast(Callable[..., Engines], import_target(LAUNCHED, "engine", "launched"))
        return launched(config, model, process, token=token)
    return OneEngine(config, model) if config.parallel.world_size_across_dp == 1 else EngineWorld(config)


@contextlib.contextmanager
def _bar(total: int, show: bool) -> Iterator[Callable[[], None]]:
    """A progress bar on standard error that counts finished choices."""
    columns = (TextColumn("generating"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not show) as progress:
        task = progress.add_task("generating", total=total)
        yield lambda: progress.advance(task)
