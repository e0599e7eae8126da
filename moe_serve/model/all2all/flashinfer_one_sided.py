"""FlashInfer's one-sided kernels: rows are written into each other's memory, and results read from it."""

from __future__ import annotations

from typing import Any, ClassVar

from flashinfer import moe_ep

from moe_serve.model.all2all.flashinfer_nvlink import NVLink


class FlashInferOneSided(NVLink):
    """NVLinkOneSidedAlltoAll; its memory grows with the rows of a rank."""

    name: ClassVar[str] = "flashinfer_nvlink_one_sided"
    config: ClassVar[type[Any]] = moe_ep.NVLinkOneSidedConfig
