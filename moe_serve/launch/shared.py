"""What the API servers of one launcher have together: the HTTP port, the board of the load, the folder of the metrics.

One socket for all, rather than one each with SO_REUSEPORT: the kernel gives a connection to whoever takes it, so an
API server that is busy or stopped keeps none waiting that another could take.
"""

from __future__ import annotations

import contextlib
import os
import tempfile

from moe_serve.base.config import Config
from moe_serve.base.errors import ConfigError
from moe_serve.base.site import bound_socket
from moe_serve.engine.board import board_bytes
from moe_serve.world.member import METRICS_FOLDER, SharedByServers


class SharedThings:
    """Of `config.server.api_server_count` API servers. ConfigError if the port is taken or no folder can be made.

    Descriptors are inherited by `pass_fds`. `let_go` of them once the children are started; `close` when they are gone.
    """

    def __init__(self, config: Config) -> None:
        server = config.server
        self.count = server.api_server_count
        self._resources = contextlib.ExitStack()
        self._folder: str | None = None
        self._files = contextlib.ExitStack()
        self._listening = self._files.enter_context(bound_socket(server.host, server.port))
        self._board = os.memfd_create("moe-serve board")
        self._files.callback(os.close, self._board)
        os.ftruncate(self._board, board_bytes(self.count, config.parallel.data_parallel_size))
        if self.count > 1:
            self._folder = self._resources.enter_context(_metrics_folder())

    def of(self, place: int) -> SharedByServers:
        """For API server number `place`."""
        listening = self._listening.fileno()
        return SharedByServers(place=place, places=self.count, listening=listening, board=self._board)

    @property
    def pass_fds(self) -> tuple[int, ...]:
        return self._listening.fileno(), self._board

    @property
    def environment(self) -> dict[str, str]:
        """Where several processes count together; one keeps its counts to itself."""
        return {} if self._folder is None else {METRICS_FOLDER: self._folder}

    def let_go(self) -> None:
        """The port is free again when the children are gone."""
        self._files.close()

    def close(self) -> None:
        self._files.close()
        self._resources.close()


def _metrics_folder() -> tempfile.TemporaryDirectory[str]:
    try:
        return tempfile.TemporaryDirectory(prefix="moe-serve-metrics-", ignore_cleanup_errors=True)
    except OSError as error:
        raise ConfigError(
            f"several API servers count into files of one folder, and none can be made: {error}; set TMPDIR to a "
            "folder that can be written, or leave --api-server-count at 1"
        ) from error
