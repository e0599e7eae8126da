"""Flags in shared memory: how far each rank has come, one line of 64 bytes for each, and sleeping until one changes.

    line of rank r: | messages it has published, 8 bytes | 1 while it sleeps, 8 bytes | unused, up to 64 bytes |

Everything here that another process may see change is loaded and stored in the class Flags.
"""

from __future__ import annotations

import ctypes
import errno
import time
from mmap import mmap

LINE_BYTES = 64
"""What processors fetch at once: a rank that publishes takes no line from ranks that look at other ones."""
WORDS = LINE_BYTES // 8
FUTEX_CALL, FUTEX_WAIT, FUTEX_WAKE = 202, 0, 1
"""Of Linux on x86-64."""
EVERYBODY = 2**31 - 1
BLIND_NAP_SECONDS = 1e-4
NAP_RESULTS = (0, errno.EAGAIN, errno.ETIMEDOUT, errno.EINTR)


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


def why_no_flags(system: str, processor: str) -> str:
    """Empty, or why ranks of a machine cannot tell each other by memory how far they have come.

    As platform.system() and platform.machine() name them.
    """
    if system != "Linux":
        return f"shared memory needs Linux, and this is {system}"
    if processor not in ("x86_64", "AMD64"):
        return f"shared memory relies on the order in which x86-64 makes stores visible, and this is {processor}"
    return ""


class Flags:
    """The lines of all ranks, of which this one writes its own.

    Memory order: a rank stores its data, then its number; another loads the number, then the data. That is right
    where stores become visible, and loads are made, in the order of the program: on x86 (total store order), and as
    CPython carries out one call after the other with no compiler between them. A number is stored and loaded by one
    aligned access of 8 bytes, as memoryview does for its format "q". Machines that order less (ARM) need release and
    acquire, which Python has not: why_no_flags() refuses them.

    Whoever sleeps says so first; whoever publishes looks for sleepers afterwards. Between that store and that load no
    order is guaranteed, so a wake may be missed: no sleep is longer than what the sleeper asked for.
    """

    def __init__(self, memory: mmap, size: int, rank: int) -> None:
        self._words = memoryview(memory)[: size * LINE_BYTES].cast("q")
        self._own = rank * WORDS
        self._sleeping = [other * WORDS + 1 for other in range(size) if other != rank]
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self._call = ctypes.CDLL(None, use_errno=True).syscall
        self._has_futex = True

    def publish(self, number: int) -> None:
        """This rank has come to `number`: what it stored before is there for whoever sees that."""
        self._words[self._own] = number
        for word in self._sleeping:
            if self._words[word]:
                self._futex(self._own, FUTEX_WAKE, EVERYBODY, None)
                return

    def seen(self, rank: int) -> int:
        """The number to which a rank has come."""
        return self._words[rank * WORDS]

    def sleep(self, rank: int, number: int, seconds: float) -> None:
        """Until `rank` publishes something beyond `number`, or perhaps earlier; at most `seconds`."""
        if not self._has_futex:
            time.sleep(min(seconds, BLIND_NAP_SECONDS))
            return
        self._words[self._own + 1] = 1
        limit = _Timespec(int(seconds), int(seconds % 1 * 1e9))
        failed = self._futex(rank * WORDS, FUTEX_WAIT, number & 0xFFFFFFFF, ctypes.byref(limit))
        self._words[self._own + 1] = 0
        self._has_futex = failed in NAP_RESULTS  # a sandbox may know no futex between processes

    def _futex(self, word: int, operation: int, value: int, limit: object) -> int:
        """0, or the number of the error. The kernel compares the lower half of a word, which comes first."""
        address = ctypes.c_void_p(self._address + 8 * word)
        done = self._call(FUTEX_CALL, address, operation, ctypes.c_uint(value), limit, None, 0)
        return 0 if done >= 0 else ctypes.get_errno()
