"""Workers end with the process that started them, however that ends.

A killed process tells its workers nothing: they would wait for work for ever, holding its lock.
"""

from __future__ import annotations

import os
import threading


class Lifeline:
    """A pipe of which only the starting process keeps the writing end, in a ``with`` block."""

    def __enter__(self) -> Lifeline:
        self._read, self._write = os.pipe()
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._write)
        os.close(self._read)

    def hold(self) -> None:
        """Call in a forked worker: it exits when the other end is gone."""
        os.close(self._write)
        threading.Thread(target=self._wait, daemon=True).start()

    def _wait(self) -> None:
        os.read(self._read, 1)
        os._exit(1)
