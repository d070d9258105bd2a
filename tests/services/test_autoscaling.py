"""A pool on Ray's own autoscaler, whose nodes are processes of this machine: its demand brings nodes, and idle ones go."""

import json
import socket
import time
from collections import Counter
from collections.abc import Iterator
from itertools import count, takewhile
from pathlib import Path

import pytest
import ray
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID
from ray.cluster_utils import Cluster
from ray.util import get_node_ip_address

from cache import Unit
from services import cluster
from services.cluster import Demand
from services.pool import Pool
from tests.faults import chaos
from tests.services.test_elastic import Puppet, ended_after, outcomes

HEAD = "ray.head.default"  # the name that the provider gives to the head


@pytest.fixture
def scaled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A head without CPUs, and at most two nodes of one CPU when somebody asks for them."""
    # `ray.cluster_utils.AutoscalingCluster` begins and ends with `ray stop`, which ends every Ray of the user's
    monkeypatch.setenv("RAY_FAKE_CLUSTER", "1")
    monkeypatch.setenv("AUTOSCALER_UPDATE_INTERVAL_S", "1")
    # of 127.0.0.1 Ray would make this machine's own address, where a head that listens on loopback does not answer
    address = get_node_ip_address()
    with socket.socket() as free:
        free.bind((address, 0))
        port = free.getsockname()[1]
    kinds = {
        HEAD: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "worker": {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 2},
    }
    config = {
        "cluster_name": "test",
        "max_workers": 2,
        "idle_timeout_minutes": 0.05,
        "provider": {
            "type": "fake_multinode",
            "gcs_address": f"{address}:{port}",
            "use_node_id_as_ip": True,  # all have the same address
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "available_node_types": kinds,
        "head_node_type": HEAD,
        "upscaling_speed": 1.0,
        # what only a provider of machines uses, and Ray reads all the same
        **{key: {} for key in ("auth", "docker", "file_mounts")},
        **{key: [] for key in ("cluster_synced_files", "rsync_exclude", "rsync_filter", "initialization_commands")},
        **{f"{kind}setup_commands": [] for kind in ("", "head_", "worker_")},
        **{f"{kind}_start_ray_commands": [] for kind in ("head", "worker")},
        "file_mounts_sync_continuously": False,
    }
    (tmp_path / "autoscaler.json").write_text(json.dumps(config))
    made = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 0,
            "include_dashboard": False,
            "node_ip_address": address,
            "gcs_server_port": port,
            "autoscaling_config": str(tmp_path / "autoscaler.json"),
            "env_vars": {"RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID},
        },
    )
    ray.init(address=made.address, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()
    chaos.kill(chaos.processes(made.head_node))  # the nodes that the autoscaler began are below its monitor
    made.shutdown()


def test_actors_that_have_no_place_bring_nodes_which_go_when_the_pool_is_done(scaled: None) -> None:
    assert "1 with 0 CPUs and 0 GPUs" in cluster.obstacle(Demand(1, 0))
    made = Pool(Puppet.options(num_cpus=1).remote, 2, 1, print, stop=ended_after(60))
    seen: Counter[str] = Counter()
    names: list[str] = []
    endless = (Unit("a", index, 4, ()) for index in count())
    for name, node in outcomes(made, takewhile(lambda _: len(seen) < 2, endless)):
        names.append(name)
        seen[node] += 1
    assert len(seen) == 2
    assert len(set(names)) == len(names)
    # the pool is not closed: its actors went when no unit was left
    deadline = time.monotonic() + 90
    while sum(node["Alive"] for node in ray.nodes()) > 1:
        assert time.monotonic() < deadline, "idle nodes are kept"
        time.sleep(0.2)
