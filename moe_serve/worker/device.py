"""Where and in which type this rank computes: what the operator asked for against what is here."""

from __future__ import annotations

import torch

from moe_serve.base.errors import ConfigError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(asked: str, local_rank: int) -> torch.device:
    """auto, cpu or cuda; ranks of a node go round its CUDA devices. ConfigError if cuda is asked for and absent."""
    if asked == "cpu" or (asked == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        built = "this build of torch knows no CUDA" if torch.version.cuda is None else "torch finds none here"
        raise ConfigError(f"device cuda is not available ({built}); choose --device cpu or auto")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def choose_dtype(asked: str, checkpoint: str, device: torch.device) -> torch.dtype:
    """The asked-for type, or the checkpoint's for auto; ConfigError if the device cannot compute in it."""
    name = checkpoint if asked == "auto" else asked
    if name not in DTYPES:
        raise ConfigError(f"dtype {name!r} is not available; choose --dtype {', '.join(DTYPES)}")
    if device.type == "cuda" and name == "bfloat16" and not torch.cuda.is_bf16_supported():
        source = "which the checkpoint says" if asked == "auto" else "which was asked for"
        raise ConfigError(
            f"dtype bfloat16, {source}, is not available on {torch.cuda.get_device_name(device)}; "
            "choose --dtype float16 or float32"
        )
    return DTYPES[name]
