"""A bound on the pixels that are decoded at once in a process, whatever the number of threads.

One huge picture takes a gigabyte while it is decoded. The look-ahead bounds how many pictures wait,
not how large those are that the threads are at.
"""

import ctypes
import threading
from collections import deque

# Pictures up to this size, ordinary photographs among them, are not counted.
FREE_PIXELS = 1 << 22
# Pixels of larger ones that are decoded at once, unless a single picture may have more: what
# `images.max_pixels` is by default.
AT_ONCE_PIXELS = 178_956_970
# From this size on, what a decoder freed goes back to the system before the next one begins: each
# thread's heap would keep a picture's worth (measured: 4.5 GB instead of 2.8 with six threads).
_TRIMMED_PIXELS = 1 << 24

# Of glibc; other C libraries have none.
_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)


class PixelBudget:
    """Lets owners decode beside each other while their pixels fit together, in the order they came.

    An owner is any object, a thread for instance, and holds the pixels of one picture at a time.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._queue: deque[object] = deque()
        self._held: dict[object, int] = {}

    @property
    def held(self) -> int:
        """The pixels that are taken and not given back."""
        with self._changed:
            return sum(self._held.values())

    def take(self, owner: object, pixels: int, most: int, patience_sec: float) -> None:
        """Waits until no more than `most` pixels are held with these, or these alone.

        Where nothing is given back for `patience_sec`, a decoder hangs, and nobody waits for it: its
        own picture is given up elsewhere.
        """
        with self._changed:
            self._queue.append(owner)
            while self._queue[0] is not owner or not self._fits(pixels, most):
                if not self._changed.wait(patience_sec) and self._queue[0] is owner:
                    break
            self._queue.remove(owner)
            self._held[owner] = pixels
            self._changed.notify_all()

    def give_back(self, owner: object) -> None:
        """Ends what `take` began; without it, and a second time, it does nothing."""
        # Looked at without the lock first: nearly every picture is a small one.
        pixels = self._held.get(owner)
        if pixels is not None:
            if pixels >= _TRIMMED_PIXELS and _trim is not None:
                _trim(0)
            with self._changed:
                self._held.pop(owner, None)
                self._changed.notify_all()

    def _fits(self, pixels: int, most: int) -> bool:
        return not self._held or sum(self._held.values()) + pixels <= most


# Of this process: shards that are embedded at the same time share its memory.
PIXELS = PixelBudget()
