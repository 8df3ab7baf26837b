"""What a run shows while it goes: a progress bar, a JSON-lines log and TensorBoard events."""

import json
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from gdfq import ranks
from gdfq.errors import GdfqError
from gdfq.progress import draws_bars
from gdfq.run import folder as run_folder
from gdfq.run.files import write_text


class Monitor:
    """Progress bar on the terminal; log and events in `folder`, where one is given.

    Args:
        folder: of the run, or None for a run that leaves no files.
        total: iterations of the run.
        done: iterations done before, when a run is resumed; later entries of an old log are dropped.
        progress: show the bar, on a terminal.
    """

    def __init__(self, folder: Path | None, total: int, done: int, progress: bool) -> None:
        disable = not (progress and draws_bars())
        self.bar = tqdm(total=total, initial=done, disable=disable, unit="it", dynamic_ncols=True, smoothing=0.05)
        self.start = time.monotonic()
        self.log = self.events = None
        if folder is not None:
            _drop_entries_after(folder / run_folder.LOG, done)
            self.log = (folder / run_folder.LOG).open("a", encoding="utf-8")
            with self._events_may_fail():
                from torch.utils.tensorboard import SummaryWriter

                self.events = SummaryWriter(str(folder / run_folder.EVENTS), purge_step=done + 1)

    def advance(self) -> None:
        self.bar.update(1)

    def write(self, iteration: int, epoch: int, phase: str, how: str, metrics: dict[str, float | None]) -> None:
        """One entry of the log, the events and the bar; a metric that is None is left out."""
        known = {name: value for name, value in metrics.items() if value is not None}
        shown = {_short(name): f"{value:.3g}" for name, value in known.items()}
        self.bar.set_description(phase, refresh=False)
        self.bar.set_postfix(shown, refresh=False)
        if self.log is not None:
            entry = {"iteration": iteration, "epoch": epoch, "phase": phase, "iterations": how, **known}
            entry["seconds"] = round(time.monotonic() - self.start, 3)
            self.log.write(json.dumps(entry) + "\n")
            self.log.flush()
        if self.events is not None:
            with self._events_may_fail():
                for name, value in known.items():
                    self.events.add_scalar(name, value, iteration)

    @contextmanager
    def _events_may_fail(self) -> Iterator[None]:
        """TensorBoard's events say nothing that the log does not: a run goes on without them."""
        try:
            yield
        except Exception as error:
            self.events = None
            warnings.warn(f"from here on no TensorBoard events are written: {error}", stacklevel=4)

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()
        if self.log is not None:
            self.log.close()
        if self.events is not None:
            with self._events_may_fail():
                self.events.close()


def _short(name: str) -> str:
    """`g.bns` for `generator/bns`: the bar has little room."""
    network, _, term = name.rpartition("/")
    return f"{network[:1]}.{term}"


def _drop_entries_after(path: Path, iteration: int) -> None:
    if path.exists():
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["iteration"] <= iteration:
                    kept.append(line + "\n")
            except (ValueError, KeyError):  # the line that was being written when the run was killed
                break
        write_text(path, "".join(kept))


@contextmanager
def disk_errors(folder: Path | None) -> Iterator[None]:
    """Log and events that cannot be written (a full disk) become a `GdfqError`; the last checkpoint is whole."""
    try:
        yield
    except OSError as error:
        raise GdfqError(f"cannot write to {folder}: {error.strerror or error}; its last checkpoint is whole") from error


@contextmanager
def stop_requests() -> Iterator[threading.Event]:
    """Turn Ctrl-C and SIGTERM inside the block into an event to be looked at between iterations.

    A second Ctrl-C interrupts at once, but for several ranks: torchrun passes on the one that they have seen already.
    """
    requested = threading.Event()

    def request() -> None:
        if requested.is_set() and ranks.group_size() == 1:
            raise KeyboardInterrupt
        requested.set()

    with _stop_requests_call(request):
        yield requested


@contextmanager
def stopping_at_once(error: Callable[[], Exception]) -> Iterator[None]:
    """Ctrl-C and SIGTERM inside the block raise `error()` wherever it is; of several ranks, the first of them alone."""
    requested = False

    def request() -> None:
        nonlocal requested
        if not requested or ranks.group_size() == 1:
            requested = True
            raise error()

    with _stop_requests_call(request):
        yield


@contextmanager
def _stop_requests_call(request: Callable[[], None]) -> Iterator[None]:
    """Outside the main thread signals are left alone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {
        number: signal.signal(number, lambda number, frame: request()) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
