"""What the HTTP routes work with, and whether a request could be served now."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from moe_serve.api.balance import Balance
from moe_serve.api.conversations import Conversations
from moe_serve.api.metrics import Metrics
from moe_serve.api.unknown_fields import UnknownFields
from moe_serve.api.world import World
from moe_serve.base.config import Config
from moe_serve.base.errors import EngineDead, Overloaded, UnknownModel
from moe_serve.engine.admission import Admission, QueueLimits
from moe_serve.engine.board import NoticeBoard
from moe_serve.engine.streams import AsyncEngines
from moe_serve.text.tokenizer import Tokenizer


@dataclass(slots=True)
class ApiState:
    """What the routes work with. `vocab_size` the model's, where it is not the tokenizer's.

    `starting` until the world is ready, other API servers included. `board` and `metrics_folder` are shared with the
    others of this launcher.
    """

    config: Config
    model_name: str
    tokenizer: Tokenizer
    engines: AsyncEngines
    generation_defaults: Mapping[str, float] = field(default_factory=dict)
    created: int = field(default_factory=lambda: int(time.time()))
    draining: bool = False
    retry_after: int = 5
    vocab_size: int | None = None
    balance: Balance | None = None
    world: World | None = None
    starting: bool = False
    board: NoticeBoard | None = None
    metrics_folder: str | None = None
    admission: Admission = field(init=False)
    metrics: Metrics = field(init=False)
    conversations: Conversations = field(init=False)
    unknown_fields: UnknownFields = field(init=False)

    def __post_init__(self) -> None:
        scheduler, engines = self.config.scheduler, self.engines
        self.metrics = Metrics(self.model_name, engines.served, lambda: engines.reports, folder=self.metrics_folder)
        self.conversations = Conversations(self.tokenizer.chat_templates, self.config.server.chat_template_timeout)
        self.unknown_fields = UnknownFields(strict=self.config.server.strict_fields)
        self.admission = Admission(
            QueueLimits(scheduler.max_num_queued_reqs, scheduler.max_num_queued_tokens),
            room=lambda: engines.room,
            piece=scheduler.max_num_batched_tokens,
            clock=time.monotonic,
            board=self.board,
        )

    @property
    def num_ids(self) -> int:
        """Token ids a client may name lie in [0, num_ids)."""
        return self.vocab_size or self.tokenizer.vocab_size

    def start_draining(self, retry_after: int = 5) -> None:
        """Refuse new requests from now on."""
        self.draining = True
        self.retry_after = retry_after

    def why_not_ready(self) -> str | None:
        """Why a request could not be served now; None when it could."""
        if not self.engines.alive:
            return self.engines.dead_reason or "the engines are gone"
        if self.starting or not self.engines.ready:
            return "the engines are still starting"
        return "the server is shutting down" if self.draining else None

    def check_ready(self) -> None:
        """Raise EngineDead or Overloaded unless a request could be served now."""
        reason = self.why_not_ready()
        if reason is not None:
            raise Overloaded(reason, retry_after=self.retry_after) if self.engines.alive else EngineDead(reason)

    def check_open(self) -> None:
        """As check_ready; Overloaded also when no request whatever may wait, so that its body need not be read."""
        self.check_ready()
        self.admission.check(1, 0)

    def check_model(self, name: str | None) -> None:
        if name is not None and name != self.model_name:
            raise UnknownModel(
                f"the model {name[:200]!r} does not exist here; served is {self.model_name!r} "
                "(server option --served-model-name)",
                param="model",
            )
