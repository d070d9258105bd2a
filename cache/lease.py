"""One writer run per teacher group: a lease that its holder renews, and that others may take once it is stale."""

import json
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from cache.errors import LeaseHeldError, MtpdError
from cache.layout import LEASE
from cache.storage import Storage

LEASE_SECONDS = 30.0


@dataclass(frozen=True)
class _Holder:
    """What a lease says of its holder. Times are seconds since the epoch, by the holder's clock."""

    run: str
    host: str
    processes: str
    pid: int
    started: str
    since: float
    renewed: float

    def to_bytes(self) -> bytes:
        return json.dumps(self.__dict__).encode()


class Lease:
    """Held while the context is open; renewed by a thread.

    A lease is stale when its holder is a dead process of this machine, or when it was not renewed for ``seconds`` while
    this process watched: no clock is compared with another machine's.

    Args:
        storage: the cache.
        group: the teacher's group.
        seconds: how long a lease lasts without being renewed.

    Raises:
        LeaseHeldError: on entering, another run holds it; the message names the holder.
    """

    def __init__(self, storage: Storage, group: str, seconds: float = LEASE_SECONDS) -> None:
        self._storage = storage
        self._path = f"{group}/{LEASE}"
        self._seconds = seconds
        self._content: bytes | None = None
        self._stop = threading.Event()
        self._lost = threading.Event()
        now, started = time.time(), ""
        pid = os.getpid()
        with suppress(OSError):  # another system: its processes are told apart by their ids alone
            started = _process_start(pid)
        self._me = _Holder(uuid.uuid4().hex, socket.gethostname(), _processes(), pid, started, now, now)

    def __enter__(self) -> "Lease":
        current = self._read()
        if current is not None and not _is_dead(current):
            current = self._watch(current)
        mine = self._me.to_bytes()
        if not self._storage.swap(self._path, current, mine):
            raise LeaseHeldError(self._held_by(self._read()))
        self._content = mine
        self._thread = threading.Thread(target=self._renew, daemon=True, name="lease")
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        if not self._storage.swap(self._path, self._content, None):
            stored = self._read()
            if stored is not None and (_parse(stored) or {}).get("run") == self.run:
                self._storage.swap(self._path, stored, None)

    @property
    def run(self) -> str:
        """What names this run to its `fence`s."""
        return self._me.run

    def check(self) -> None:
        """Stop a run whose lease was taken over, for it must not compact what another run writes.

        Raises:
            LeaseHeldError: the lease is another's now.
        """
        if self._lost.is_set():
            raise LeaseHeldError(self._held_by(self._read()))

    def _watch(self, current: bytes) -> bytes | None:
        """Wait until the lease was not renewed for its full time, or was given back; an error as soon as it is renewed.

        Returns:
            What is to be replaced: nothing where it was given back.
        """
        if self._is_local(current):
            raise LeaseHeldError(self._held_by(current))
        deadline = time.monotonic() + self._seconds
        while time.monotonic() < deadline:
            time.sleep(min(0.2, self._seconds / 10))
            latest = self._read()
            if latest is None:
                return None
            if latest != current:
                raise LeaseHeldError(self._held_by(latest))
        return current

    def _renew(self) -> None:
        while not self._stop.wait(self._seconds / 3):
            renewed = _Holder(**{**self._me.__dict__, "renewed": time.time()}).to_bytes()
            try:
                if self._storage.swap(self._path, self._content, renewed):
                    self._content = renewed
                    continue
                # a renewal may have been written though its answer was lost
                stored = self._read()
                if stored is None or (_parse(stored) or {}).get("run") != self.run:
                    self._lost.set()
                    return
                self._content = stored
            except (OSError, MtpdError):
                continue  # a disk that is full or refuses for a moment: the next round tries again

    def _read(self) -> bytes | None:
        try:
            return self._storage.read(self._path)
        except FileNotFoundError:
            return None

    def _is_local(self, content: bytes) -> bool:
        return _is_of_here(_parse(content) or {})

    def _held_by(self, content: bytes | None) -> str:
        holder = (_parse(content) if content else None) or {}
        age = time.time() - float(holder.get("since", time.time()))
        return (
            f"{self._storage.where(self._path)}: these targets are being written by process {holder.get('pid', '?')} on "
            f"{holder.get('host', '?')}, for {age:.0f} s. Wait for it or stop it; a lease is free {self._seconds:.0f} s "
            "after its holder died."
        )


@dataclass(frozen=True)
class Holder:
    """Who holds a group's lease, as the lease says it. Times are seconds since the epoch, by the holder's clock.

    Attributes:
        run: what names the run.
        gone: the holder is known to have died: a process of this machine that no longer runs.
    """

    run: str
    host: str
    pid: int
    since: float
    renewed: float
    gone: bool


def lease_holder(storage: Storage, group: str) -> Holder | None:
    """Who holds a group's lease, alive or dead; None if nobody does, or if the lease cannot be read."""
    try:
        content = storage.read(f"{group}/{LEASE}")
    except FileNotFoundError:
        return None
    found = _parse(content) or {}
    try:
        return Holder(
            str(found["run"]),
            str(found["host"]),
            int(found["pid"]),
            float(found["since"]),
            float(found["renewed"]),
            _is_dead(content),
        )
    except (KeyError, TypeError, ValueError):
        return None


def is_held(storage: Storage, group: str) -> bool:
    """Whether a run holds a group's lease, as far as can be told at once: one of another machine may have died."""
    try:
        return not _is_dead(storage.read(f"{group}/{LEASE}"))
    except FileNotFoundError:
        return False


def fence(storage: Storage, group: str, run: str) -> None:
    """Stop a writer whose run no longer holds the lease, before it writes over what another run wrote.

    Args:
        run: `Lease.run` of the run that the writer works for.

    Raises:
        LeaseHeldError: the lease is another's, or free.
    """
    name = f"{group}/{LEASE}"
    try:
        holder = _parse(storage.read(name)) or {}
    except FileNotFoundError:
        holder = {}
    if holder.get("run") != run:
        raise LeaseHeldError(
            f"{storage.where(name)}: the run that this writer belongs to does not hold the lease any more (held by process "
            f"{holder.get('pid', '?')} on {holder.get('host', '?')}). What was committed stays; run `mtpd precompute` again."
        )


def _parse(content: bytes) -> dict[str, Any] | None:
    try:
        holder = json.loads(content)
    except ValueError:
        return None
    return holder if isinstance(holder, dict) else None


def _is_dead(content: bytes) -> bool:
    """Whether the holder is known to be gone: a process of this machine that no longer runs, or an unreadable lease."""
    holder = _parse(content)
    if holder is None:
        return True
    if not _is_of_here(holder):
        return False
    pid = holder.get("pid")
    if not isinstance(pid, int):
        return True
    try:
        return _process_start(pid) != holder.get("started")
    except OSError:
        return False  # nobody can tell


def _is_of_here(holder: dict[str, Any]) -> bool:
    """Whether a holder's process, if it lives, can be seen from here: two containers of one host name cannot see each other's."""
    return (holder.get("host"), holder.get("processes")) == (socket.gethostname(), _processes())


def _processes() -> str:
    """Names the processes that can be seen from here: the kernel's namespace of them; empty where there is no such thing."""
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def _process_start(pid: int) -> str:
    """Boot and start time of a process, so that a reused pid is not taken for it; empty if there is none.

    Raises:
        OSError: that cannot be seen here, as where ``/proc`` hides the processes of others.
    """
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError):
        Path("/proc/1/stat").read_text()  # of somebody else: is seen unless others are hidden
        return ""
    # a zombie has ended: it only waits for its parent to look
    return "" if fields[0] == "Z" else f"{boot}:{fields[19]}"
