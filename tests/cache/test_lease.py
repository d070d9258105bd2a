import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from cache import BudgetError, Lease, LeaseHeldError, LocalStorage, StorageError, lease_holder
from cache.layout import LEASE


def test_a_second_writer_is_told_who_holds_the_lease_and_may_follow(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    with Lease(storage, "g"):
        with pytest.raises(LeaseHeldError, match=f"process {os.getpid()}"), Lease(storage, "g"):
            pass
        with Lease(storage, "h"):
            pass
    with Lease(storage, "g"):
        pass
    assert not storage.exists(f"g/{LEASE}")


def test_the_lease_of_a_killed_process_is_free_at_once(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from cache import Lease, LocalStorage\n"
        "with Lease(LocalStorage(Path(sys.argv[1])), 'g'): print('held', flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"held\n"
    with pytest.raises(LeaseHeldError, match=f"process {child.pid}"), Lease(LocalStorage(tmp_path), "g"):
        pass
    child.send_signal(signal.SIGKILL)
    child.wait()
    started = time.monotonic()
    with Lease(LocalStorage(tmp_path), "g", seconds=60):
        assert time.monotonic() - started < 10


def test_another_machines_lease_is_taken_only_after_it_was_not_renewed(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    # its clock says next year: no clock is believed, only the absence of a renewal
    holder = {"run": "x", "host": "elsewhere", "pid": 1, "started": "", "since": 0, "renewed": time.time() + 3e7}
    storage.write(f"g/{LEASE}", [json.dumps(holder).encode()])
    started = time.monotonic()
    with Lease(storage, "g", seconds=1.0):
        assert time.monotonic() - started >= 1.0


def test_a_lease_that_is_given_back_while_it_is_watched_is_taken(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    holder = {"run": "x", "host": "elsewhere", "pid": 1, "started": "", "since": 0, "renewed": time.time()}
    storage.write(f"g/{LEASE}", [json.dumps(holder).encode()])
    timer = threading.Timer(0.3, storage.delete, (f"g/{LEASE}",))
    timer.start()
    with Lease(storage, "g", seconds=60) as lease:
        assert json.loads(storage.read(f"g/{LEASE}"))["run"] == lease.run


def test_a_process_that_cannot_be_seen_from_here_is_not_taken_for_dead(tmp_path: Path) -> None:
    # two containers of one machine may have one host name, and each its own processes
    storage = LocalStorage(tmp_path)
    with Lease(storage, "g", seconds=0.6) as lease:
        lease._me.__dict__.update(processes="pid:[1]", pid=2**22)
        time.sleep(0.5)
        holder = lease_holder(storage, "g")
        assert holder is not None
        assert not holder.gone
        with pytest.raises(LeaseHeldError, match=f"process {2**22}"), Lease(storage, "g", seconds=3.0):
            pass


def test_another_machines_live_lease_is_respected(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    with Lease(storage, "g", seconds=0.6) as lease:
        # the same lease as seen from another machine
        lease._me.__dict__["host"] = "elsewhere"
        time.sleep(0.5)
        with pytest.raises(LeaseHeldError, match="elsewhere"), Lease(storage, "g", seconds=3.0):
            pass


def test_a_run_that_lost_its_lease_stops_and_leaves_the_new_holders_alone(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    with Lease(storage, "g", seconds=0.3) as lease:
        storage.write(f"g/{LEASE}", [b'{"host": "thief", "pid": 7}'])
        time.sleep(0.4)
        with pytest.raises(LeaseHeldError, match="thief"):
            lease.check()
    assert json.loads(storage.read(f"g/{LEASE}"))["host"] == "thief"


def test_a_renewal_whose_answer_was_lost_does_not_cost_the_lease(tmp_path: Path, monkeypatch) -> None:
    storage = LocalStorage(tmp_path)
    swap = LocalStorage.swap
    lost: list[bytes] = []

    def without_answer(self: LocalStorage, name: str, expected: bytes | None, new: bytes | None) -> bool:
        done = swap(self, name, expected, new)
        if done and expected is not None and new is not None and not lost:
            lost.append(new)
            raise StorageError("the answer is lost")
        return done

    monkeypatch.setattr(LocalStorage, "swap", without_answer)
    with Lease(storage, "g", seconds=0.3) as lease:
        time.sleep(0.6)
        assert lost
        lease.check()
    assert not storage.exists(f"g/{LEASE}")


def test_a_disk_that_is_full_for_a_moment_does_not_end_the_renewing(tmp_path: Path, monkeypatch) -> None:
    storage = LocalStorage(tmp_path)
    with Lease(storage, "g", seconds=0.3) as lease:
        with monkeypatch.context() as patch:

            def full(*_arguments: object) -> int:
                raise BudgetError("the disk is full")

            patch.setattr(LocalStorage, "write", full)
            time.sleep(0.3)
        before = storage.read(f"g/{LEASE}")
        time.sleep(0.4)
        assert storage.read(f"g/{LEASE}") != before
        lease.check()
