"""What of a world one launcher starts, and the secret that the launchers of one world share."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from moe_serve.base.errors import ConfigError
from moe_serve.base.parallel_config import ParallelConfig
from moe_serve.base.secret import TOKEN_ENVIRONMENT, check_token, new_token


@dataclass(frozen=True, slots=True, kw_only=True)
class NodePart:
    """`dp_ranks` whose engines are started here: all of them if None. The API server `serves` these (None: all).

    `joins`: another launcher holds the coordinator. With a `node_rank` from 1 on, it starts that node's workers of the
    engine on node 0, and nothing else. A supervisor started so many `launchers` on this `machine`, and
    this is one of them.
    """

    serve_http: bool = True
    dp_ranks: tuple[int, ...] | None = None
    joins: bool = False
    node_rank: int = 0
    serves: list[int] | None = None
    machine: str = ""
    launchers: int = 1


def node_part(parallel: ParallelConfig) -> NodePart:
    """This launcher's part, by its options. Rank 0's launcher, or node 0's, holds the coordinator."""
    if parallel.is_beside:
        return NodePart(serve_http=False, dp_ranks=(), joins=True, node_rank=parallel.node_rank or 0)
    ranks = parallel.dp_ranks_here
    return NodePart(
        serve_http=not parallel.headless,
        dp_ranks=ranks,
        joins=0 not in ranks,
        serves=None if parallel.load_balancing == "internal" else list(ranks),
    )


def world_token(parallel: ParallelConfig) -> str:
    """From the environment or a file; made up where nobody else must know it."""
    given = given_token(parallel.world_token_file)
    if given:
        return given
    if parallel.is_apart:
        raise ConfigError(
            f"{'nodes' if parallel.is_spread else 'ranks'} that are started apart need a secret that all of them know: "
            f"put the same text of 16 characters or more into {TOKEN_ENVIRONMENT}, or into a file "
            "(--world-token-file), on each; `openssl rand -hex 16` makes one"
        )
    return new_token()


def given_token(file: str | None) -> str:
    """From the environment or a file; "" where neither has one. ConfigError if it is too short, or cannot be read."""
    given = os.environ.get(TOKEN_ENVIRONMENT) or _from_file(file)
    return check_token(given) if given else ""


def _from_file(path: str | None) -> str:
    if path is None:
        return ""
    try:
        return Path(path).expanduser().read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--world-token-file {path} cannot be read: {error}") from error
