import os
from pathlib import Path

import pytest

# a cluster that happens to run on this machine is nobody's to test on
os.environ["RAY_ADDRESS"] = "local"
# two processes test at once (`addopts` in pyproject.toml): torch's threads would only stand in each other's way
os.environ.setdefault("OMP_NUM_THREADS", "1")
# a test's stage takes a second: Ray Train would look every two whether it is done
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")

# in these folders tests start clusters, each as large as this machine, and kill them: one process takes them one by one
_WITH_CLUSTERS = ("services", "end_to_end", "faults")
_HERE = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Which of the two processes takes a test: all of a file go together, and so do all that start clusters, first."""
    for item in items:
        folder, *_ = item.path.relative_to(_HERE).parts
        group = "clusters" if folder in _WITH_CLUSTERS else str(item.path.relative_to(_HERE))
        item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: item.get_closest_marker("xdist_group").args[0] != "clusters")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Generated scenes: 20 to train on, 6 to evaluate on, in four shapes."""
    from trainer import generate

    root = tmp_path_factory.mktemp("data")
    generate(root, "train", 20, seed=5)
    generate(root, "val", 6, seed=5, first_id=1000)
    return root
