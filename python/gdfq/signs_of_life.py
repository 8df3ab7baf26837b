"""How ranks find out who is missing: see `gdfq.ranks`, which alone uses it."""

import itertools
import json
import threading
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

BEAT = 0.5  # seconds between two signs of life
SILENCE = 5.0  # seconds without one, after an exchange has failed, that say who is gone

ADVICE = "what was saved is whole: --resume goes on from there, with any number of ranks"


class SignsOfLife(threading.Thread):
    """What ranks let each other know in the group's store, whatever they are busy with: that they live, how many
    exchanges they have begun, and why one of them has failed.

    Args:
        run: its number.
        rank, count: which one this is, of how many.
        begun: how many exchanges it has begun.
    """

    def __init__(self, run: int, rank: int, count: int, begun: Callable[[], int]) -> None:
        super().__init__(daemon=True)
        self.rank, self.count, self.begun = rank, count, begun
        store: Any = dist.distributed_c10d._get_default_store()
        # A store is one connection, and who waits for something in it holds it: the thread has its own.
        self.store, self.own = (dist.distributed_c10d.PrefixStore(f"gdfq/{run}", one) for one in (store, store.clone()))
        self.waits = itertools.count()
        self.seen: dict[int, tuple[str, float]] = {}
        self.is_over = threading.Event()
        self.start()

    def run(self) -> None:
        for number in itertools.count():
            try:
                self.own.set(f"alive/{self.rank}", f"{number} {self.begun()}")
            except RuntimeError:  # the store went with another rank, as the next exchange will find
                return
            if self.is_over.wait(BEAT):
                return

    def look(self) -> tuple[dict[int, float], dict[int, int]]:
        """Of each rank, for how many seconds it has given no sign, and how many exchanges it has begun."""
        now = time.monotonic()
        for number in range(self.count):
            sign = self._read(f"alive/{number}") or "0 0"
            if self.seen.get(number, ("", now))[0] != sign:
                self.seen[number] = sign, now
        silent = {number: now - since for number, (_, since) in self.seen.items()}
        return silent, {number: int(sign.split()[1]) for number, (sign, _) in self.seen.items()}

    def fail(self, message: str, speaker: int = 0) -> None:
        """Say why, unless another rank already has."""
        if self.failure() is None:
            self.store.set("failure", json.dumps([message, speaker]))

    def failure(self) -> list[Any] | None:
        """What was said, and who is to say it to the user."""
        text = self._read("failure")
        return None if text is None else json.loads(text)

    def of_failure(self) -> list[Any]:
        """The same, found out if need be: who has given no sign, or else has begun fewer exchanges than others."""
        try:
            end = time.monotonic() + SILENCE
            while self.failure() is None and time.monotonic() < end:
                silent, begun = self.look()
                time.sleep(0.1)
            if self.failure() is None:
                gone = [number for number, seconds in silent.items() if seconds > SILENCE - 2 * BEAT]
                late = [number for number in begun if begun[number] < max(begun.values())]
                who, what = (gone, "is gone") if gone else (late, "did not answer in time")
                named = f"rank {' and '.join(map(str, who))}" if who else "a rank"
                speaker = min(set(range(self.count)) - set(gone))
                self.fail(f"{named} of {self.count} {what}; {ADVICE}", speaker)
            return self.failure() or ["", 0]
        except RuntimeError:
            return [f"rank 0 of {self.count}, whose store the others need, is gone; {ADVICE}", 1]

    def _read(self, key: str) -> str | None:
        return self.store.get(key).decode() if self.store.check([key]) else None
