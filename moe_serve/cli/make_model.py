"""`moe-serve make-model`: the command. What it writes stands in random_model.py."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from pydantic_settings import CliPositionalArg

from moe_serve.base.registry import import_target
from moe_serve.cli.flags import Options, help_text, parse, wants_help


class MakeModelOptions(Options):
    folder: CliPositionalArg[Path] = Field(description="Folder to write; must be empty or absent, unless --force.")
    preset: Literal["tiny", "small"] = Field("tiny", description="Size of the model.")
    arch: Literal["qwen3_moe", "qwen2_moe", "mixtral", "olmoe"] = Field("qwen3_moe", description="Architecture.")
    seed: int = Field(0, description="Seed of the random weights.")
    force: bool = Field(False, description="Replace the model in a folder that is not empty.")


def run_make_model(arguments: Sequence[str]) -> int:
    if wants_help(arguments):
        print(help_text(MakeModelOptions, "make-model", "Write a small random-weight checkpoint."))
        return 0
    options = parse(MakeModelOptions, arguments, "make-model")
    # Reached by name: it needs torch, which the other commands must not wait for.
    make_model: Any = import_target("moe_serve.cli.random_model:make_model", "command", "make-model")
    folder: Path = make_model(**options, show_progress=True)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    print(f"wrote {size / 2**20:,.1f} MiB of random weights; serve them with: moe-serve serve {folder}")
    return 0
