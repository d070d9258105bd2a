import os
from pathlib import Path

import pytest

from trainer import generate

# a cluster that happens to run on this machine is nobody's to test on
os.environ["RAY_ADDRESS"] = "local"


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Generated scenes: 20 to train on, 6 to evaluate on, in four shapes."""
    root = tmp_path_factory.mktemp("data")
    generate(root, "train", 20, seed=5)
    generate(root, "val", 6, seed=5, first_id=1000)
    return root
