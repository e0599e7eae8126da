"""What an engine and its workers say to each other around the commands. msgspec, no torch.

A worker is told where its engine is (Invitation), says who it is (Join), and is told everything else (Joined).
Commands then come on the same socket, numbered; replies go to a second one. Both know their peers by the world's token
(base/sockets.py), which is in the invitation and travels no further.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from moe_serve.base.commands import Command, Meeting, Reply
from moe_serve.base.interpreter import child_environment
from moe_serve.base.site import Site
from moe_serve.world.member import thread_environment

ENVIRONMENT = "MOE_SERVE_WORKER"
MAX_JOIN_BYTES = 1 << 16
MAX_REPLY_BYTES = 1 << 30


class Invitation(msgspec.Struct, frozen=True, kw_only=True):
    """Enough to be started and to join an engine from anywhere; `connect_seconds` to keep trying until it is reached.

    `worker` is the index within the engine (Topology.worker_index), here and in all records below. `site` is the
    worker's own, where it shares its machine and devices with others than the engine's site says; `model` the folder
    on its machine, where that is not the engine's.
    """

    address: str
    token: str
    worker: int
    threads: int = 1
    connect_seconds: float = 5.0
    site: Site | None = None
    model: str | None = None

    def to_environment(self) -> dict[str, str]:
        """Environment of the worker: this one's, the invitation and the threads, which torch reads when imported."""
        return {
            **child_environment(),
            ENVIRONMENT: msgspec.json.encode(self).decode(),
            **thread_environment(self.threads),
        }

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Invitation:
        return msgspec.json.decode(environment[ENVIRONMENT], type=cls)


class Join(msgspec.Struct, frozen=True, kw_only=True, tag="join"):
    """A worker's first word."""

    worker: int
    pid: int
    host: str


class Joined(msgspec.Struct, frozen=True, kw_only=True, tag="joined"):
    """You are in. `config` is Config.to_json(); `replies` the port on the engine's address that takes replies.

    `meeting` without its token, which the worker has.
    """

    config: str
    meeting: Meeting
    replies: int


class Rejected(msgspec.Struct, frozen=True, tag="rejected"):
    """You are not; the sentence says why."""

    reason: str


class Order(msgspec.Struct, frozen=True, tag="order"):
    """Carry out a command and answer with its number."""

    number: int
    command: Command


class End(msgspec.Struct, frozen=True, tag="end"):
    """Go; your work is done."""


class WorkerReply(msgspec.Struct, frozen=True, kw_only=True):
    """A worker's reply to order `number`."""

    worker: int
    number: int
    reply: Reply


ToWorker = Joined | Rejected | Order | End

encode = msgspec.msgpack.Encoder().encode
decode_join = msgspec.msgpack.Decoder(Join).decode
decode_to_worker: msgspec.msgpack.Decoder[ToWorker] = msgspec.msgpack.Decoder(ToWorker)
decode_reply = msgspec.msgpack.Decoder(WorkerReply).decode
