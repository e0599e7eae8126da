"""Listening sockets that torch opens and nobody needs once a group stands: made deaf, since torch cannot close them.

A classic BPF filter that takes no packet is put on them (socket(7), SO_ATTACH_FILTER). Connections that stand are not
touched; who comes later gets no answer, and costs no descriptor. Linux only; elsewhere they stay as they are.
"""

from __future__ import annotations

import ctypes
import os
import socket
import stat
import struct
import sys
from collections.abc import Iterable

SO_ATTACH_FILTER = 26
RETURN_NOTHING = struct.pack("=HBBI", 0x06, 0, 0, 0)


def listeners() -> set[int]:
    """Descriptors of this process that listen for TCP connections."""
    if sys.platform != "linux":
        return set()
    return {descriptor for descriptor in map(int, os.listdir("/proc/self/fd")) if _listens(descriptor)}


def deafen(descriptors: Iterable[int]) -> None:
    """They accept nobody any more."""
    program = ctypes.create_string_buffer(RETURN_NOTHING)
    described = struct.pack("@HP", 1, ctypes.addressof(program))
    for descriptor in descriptors:
        with socket.socket(fileno=os.dup(descriptor)) as copy:
            copy.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, described)


def _listens(descriptor: int) -> bool:
    try:
        if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
            return False
        with socket.socket(fileno=os.dup(descriptor)) as copy:
            is_tcp = copy.family in (socket.AF_INET, socket.AF_INET6) and copy.type == socket.SOCK_STREAM
            return is_tcp and copy.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) == 1
    except OSError:  # closed meanwhile
        return False
