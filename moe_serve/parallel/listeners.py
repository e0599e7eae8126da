"""Listening sockets that torch opens and nobody needs once a group stands: made deaf, since torch cannot close them.

A classic BPF filter that takes no packet is put on them (socket(7), SO_ATTACH_FILTER). Connections that stand are not
touched; who comes later gets no answer, and costs no descriptor. Linux only; elsewhere they stay as they are.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import sys
from collections.abc import Iterable
from pathlib import Path

SO_ATTACH_FILTER = 26
RETURN_NOTHING = struct.pack("=HBBI", 0x06, 0, 0, 0)


def listeners() -> set[int]:
    """Descriptors of this process that listen for TCP connections."""
    found = set()
    for entry in Path("/proc/self/fd").glob("*") if sys.platform == "linux" else ():
        try:
            copy = socket.socket(fileno=os.dup(int(entry.name)))
        except OSError:  # closed meanwhile, or no socket
            continue
        with copy:
            if copy.family in (socket.AF_INET, socket.AF_INET6) and copy.getsockopt(socket.SOL_SOCKET, _ACCEPTS):
                found.add(int(entry.name))
    return found


def deafen(descriptors: Iterable[int]) -> None:
    """They accept nobody any more."""
    program = ctypes.create_string_buffer(RETURN_NOTHING)
    described = struct.pack("@HP", 1, ctypes.addressof(program))
    for descriptor in descriptors:
        with socket.socket(fileno=os.dup(descriptor)) as copy:
            copy.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, described)


_ACCEPTS = getattr(socket, "SO_ACCEPTCONN", 30)
