"""How questions and answers travel between a coordinator and its solver: a length, a record, then bodies."""

from __future__ import annotations

import struct
from typing import Any

import msgspec
import numpy as np

from moe_serve.eplb.questions import Question, Result

HEADER = struct.Struct(">I")


class SolvedHead(msgspec.Struct, frozen=True):
    """A Solved, but for its bodies, which follow; `sizes` in bytes."""

    number: int
    seconds: float
    result: Result
    sizes: list[int]


def encode_question(question: Question) -> bytes:
    """With its length before it."""
    body = _encoder.encode(question)
    return HEADER.pack(len(body)) + body


def decode_question(body: bytes) -> Question:
    return _question.decode(body)


def encode_head(head: SolvedHead) -> bytes:
    return _encoder.encode(head)


def decode_head(body: bytes) -> SolvedHead:
    return _head.decode(body)


def _from_array(value: object) -> object:
    if not isinstance(value, np.ndarray):
        raise NotImplementedError(f"{type(value).__name__} in a question")
    return value.dtype.str, value.shape, np.ascontiguousarray(value).data


def _to_array(kind: type, value: Any) -> object:
    if kind is object:  # JSON's values, which say themselves what they are
        return value
    dtype, shape, data = value
    return np.frombuffer(data, dtype=dtype).reshape(shape)


_encoder = msgspec.msgpack.Encoder(enc_hook=_from_array)
_question: msgspec.msgpack.Decoder[Question] = msgspec.msgpack.Decoder(Question, dec_hook=_to_array)
_head: msgspec.msgpack.Decoder[SolvedHead] = msgspec.msgpack.Decoder(SolvedHead, dec_hook=_to_array)
