"""A run's lock on file systems without flock: RUN/.lock-heartbeat, which the holder touches.

Made with O_EXCL, so that one of several gets it, and removed at the end. A holder that has not
touched it for `LIMIT_S`, or whose process is gone on this host, is dead and its place is taken.
No clocks are compared: who wants the place watches whether the file's time changes. Standard
library only.
"""

from __future__ import annotations

import logging
import os
import threading
import time

from sfpo_megatron.outputs.directory import RunDirectory
from sfpo_megatron.outputs.holder import Holder, RunInUse

INTERVAL_S = 5.0
LIMIT_S = 30.0
_POLL_S = 0.2
_SETTLING_S = 0.2

log = logging.getLogger(__name__)


class Heartbeat:
    """`take` it, then `release` it."""

    def __init__(self, directory: RunDirectory, own: Holder) -> None:
        self._directory = directory
        self._file = directory.heartbeat
        self._own = own
        self._ending = threading.Event()
        self._beating: list[threading.Thread] = []  # one at the most

    def take(self) -> bool:
        """True: taken; False: another process of the same run has it, and beats for both. RunInUse
        if another run has it. A dead holder's place is taken whatever its run: a job that is
        requeued has the name of the one that was killed."""
        while not self._create():
            holder = Holder.read(self._file)
            if self._is_alive(holder):
                if holder is not None and holder.run == self._own.run:
                    return False
                raise RunInUse(self._directory, Holder.read(self._file))
            self._displace(holder)
        thread = threading.Thread(target=self._beat, name="run-heartbeat", daemon=True)
        self._beating = [thread]
        thread.start()
        return True

    def release(self) -> None:
        """Remove the file, if it is ours."""
        threads, self._beating = self._beating, []
        for thread in threads:
            self._ending.set()
            thread.join()
            if self._is_ours():
                self._file.unlink(missing_ok=True)

    def _create(self) -> bool:
        try:
            descriptor = os.open(self._file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(self._own.to_json())
        # Another that took the last holder for dead may just be moving this file in its place.
        time.sleep(_SETTLING_S)
        return self._is_ours()

    def _is_ours(self) -> bool:
        return Holder.read(self._file) == self._own

    def _is_alive(self, holder: Holder | None) -> bool:
        """Whether the file's time changes within `LIMIT_S`; returns as soon as it does."""
        if holder is not None and holder.is_here:
            return not holder.is_gone
        first, begun = self._time(), time.monotonic()
        while time.monotonic() < begun + LIMIT_S:
            if self._time() != first:
                return self._file.exists()  # if not, its holder has ended in good order
            time.sleep(_POLL_S)
        return False

    def _time(self) -> int | None:
        """In nanoseconds; None where the file is gone. Opened, as NFS would answer from a cache."""
        try:
            with self._file.open("rb") as stream:
                return os.fstat(stream.fileno()).st_mtime_ns
        except FileNotFoundError:
            return None

    def _displace(self, dead: Holder | None) -> None:
        """Move a dead holder's file away; put it back if it turns out to be another's."""
        aside = self._file.with_name(f"{self._file.name}-{self._own.host}-{self._own.pid}")
        try:
            self._file.rename(aside)
        except FileNotFoundError:
            return
        if Holder.read(aside) != dead:
            try:
                os.link(aside, self._file)
            except FileExistsError:
                pass
        aside.unlink()

    def _beat(self) -> None:
        while not self._ending.wait(INTERVAL_S):
            try:
                is_ours = Holder.from_json(self._file.read_bytes()) == self._own
                if is_ours:
                    os.utime(self._file)
            except FileNotFoundError:
                is_ours = False
            except OSError as error:  # the file system is away for a moment
                log.warning("%s: no heartbeat now (%s); it is tried again", self._file, error)
                continue
            if not is_ours:
                log.error(
                    "%s: another run has taken this one for dead, after %g s without a heartbeat; "
                    "both write into its directory now",
                    self._file,
                    LIMIT_S,
                )
                return
