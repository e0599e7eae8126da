"""The names of formats that its all-to-all takes."""

from __future__ import annotations

from enum import Enum


class QuantFormat(Enum):
    BF16 = 0
    DeepSeekFp8 = 3
