"""moe-serve: Mixture-of-Experts language models with wide expert parallelism. This is the only re-export."""

import os
import typing

from moe_serve.base.config import Config
from moe_serve.base.errors import (
    CheckpointError,
    ConfigError,
    EngineError,
    MoEServeError,
    Overloaded,
    RequestError,
)
from moe_serve.base.registry import import_target
from moe_serve.base.sampling import SamplingParams
from moe_serve.world.member import spin_environment

__all__ = [
    "LLM",
    "CheckpointError",
    "Config",
    "ConfigError",
    "EngineError",
    "MoEServeError",
    "Overloaded",
    "RequestError",
    "SamplingParams",
]


def __getattr__(name: str) -> typing.Any:  # what a type checker sees of LLM
    """LLM is imported when it is asked for: it needs torch, which most of the package does without."""
    if name == "LLM":
        os.environ.update(spin_environment())
        return import_target("moe_serve.llm:LLM", "name", name)
    raise AttributeError(f"module 'moe_serve' has no attribute {name!r}")
