import os
import signal
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

# a cluster that happens to run on this machine is nobody's to test on
os.environ["RAY_ADDRESS"] = "local"
# two processes test at once (`addopts` in pyproject.toml): torch's threads would only stand in each other's way
os.environ.setdefault("OMP_NUM_THREADS", "1")
# a test's stage takes a second: Ray Train would look every two whether it is done
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")

# in these folders tests start clusters, each as large as this machine, and kill them: one process takes those of the first
# one by one, one those of the others
_WITH_CLUSTERS = ("tests/services/", "tests/end_to_end/", "tests/faults/")


class Scheduler(LoadScopeScheduling):
    """Which of the two processes takes a test: all of a file go together, and so do those that start clusters."""

    def _split_scope(self, nodeid: str) -> str:
        if nodeid.startswith(_WITH_CLUSTERS):
            return "services" if nodeid.startswith(_WITH_CLUSTERS[0]) else "jobs"
        return nodeid.partition("::")[0]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Scheduler:
    return Scheduler(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those that start clusters come first: they take the longest."""
    items.sort(key=lambda item: not item.nodeid.startswith(_WITH_CLUSTERS))


@pytest.fixture(autouse=True)
def own_signals() -> None:
    """Ray leaves its answers to signals behind: they hang a process that a later test forks and ends, and swallow Ctrl-C."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Generated scenes: 20 to train on, 6 to evaluate on, in four shapes."""
    from trainer import generate

    root = tmp_path_factory.mktemp("data")
    generate(root, "train", 20, seed=5)
    generate(root, "val", 6, seed=5, first_id=1000)
    return root
