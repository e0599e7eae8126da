"""What goes to a member, and large records in pieces for its line. No I/O."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import msgspec

from moe_serve.base.balance_messages import BalanceAnswer
from moe_serve.base.messages import ToMember
from moe_serve.base.parcel import Parcel

_BYTES_32 = struct.Struct(">BI")
_BYTES_32_TAG = 0xC6
"""msgpack's "bin 32": its length in four bytes, then the bytes."""
_encoder = msgspec.msgpack.Encoder()


@dataclass(frozen=True, slots=True)
class Send:
    """Give `message`, a record or an encoded one, to `member`; afterwards close its line if `close`."""

    member: int
    message: ToMember | Parcel
    close: bool = False


def answer_parcel(number: int, status: int, body: Parcel) -> Parcel:
    """A BalanceAnswer whose body, its last field, is not copied."""
    empty = _encoder.encode(BalanceAnswer(number=number, status=status, body=b""))
    no_body = _encoder.encode(b"")
    assert empty.endswith(no_body)
    head = empty.removesuffix(no_body) + _BYTES_32.pack(_BYTES_32_TAG, len(body))
    return Parcel((head, *body.pieces))
