"""Pools on a real Ray of several nodes on this machine: nodes that come, nodes that go, and room that one makes for another."""

import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain, count, takewhile
from pathlib import Path

import pytest
import ray
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated.autoscaler_pb2 import DrainNodeReason

from cache import Unit
from services import cluster, pool
from services.cluster import Demand
from services.pool import PIPELINE_DEPTH, Pool
from tests import models
from trainer import parse_recipe


@ray.remote(max_concurrency=PIPELINE_DEPTH)
class Puppet:
    """Answers a unit with its name and the node; of a unit whose bucket is ``stuck`` it waits for the file."""

    def __init__(self, file: Path | None = None) -> None:
        self._file, self._node = file, ray.get_runtime_context().get_node_id()

    def load(self) -> str:
        return self._node

    def run(self, unit: Unit) -> tuple[str, str]:
        while unit.bucket == "stuck" and self._file is not None and not self._file.exists():
            time.sleep(0.02)
        time.sleep(0.02)
        return unit.name, self._node


@pytest.fixture(scope="module", autouse=True)
def nodes() -> Iterator[Cluster]:
    """A head with one CPU; tests add what they need."""
    # a node that does not answer at all is noticed within a second, not in fifteen; a slow one still has ten
    config = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 2}
    head = {"num_cpus": 1, "include_dashboard": False, "_system_config": config}
    made = Cluster(initialize_head=True, head_node_args=head)
    ray.init(address=made.address, log_to_driver=False, logging_level="ERROR")
    yield made
    ray.shutdown()
    made.shutdown()


def units(number: int, bucket: str = "a", first: int = 0) -> list[Unit]:
    return [Unit(bucket, index, 4, ()) for index in range(first, first + number)]


def ended_after(seconds: float) -> threading.Event:
    """A signal that stops a run which would never end."""
    stop = threading.Event()
    timer = threading.Timer(seconds, stop.set)
    timer.daemon = True
    timer.start()
    return stop


def outcomes(made: Pool, wanted: Iterable[Unit]) -> Iterator[tuple[str, str]]:
    """Names and nodes of the units as they come."""
    try:
        yield from made.run(wanted)
    except KeyboardInterrupt:
        pytest.fail("the run did not end, and was stopped")


def test_no_node_can_hold_an_actor_and_the_notice_says_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, stop, notices = Demand(64, 0.5), threading.Event(), list[str]()

    def notice(text: str) -> None:
        notices.append(text)
        stop.set()

    made = Pool(
        Puppet.options(num_cpus=64, num_gpus=0.5).remote,
        1,
        1,
        notice,
        obstacle=lambda: cluster.obstacle(wanted),
        stop=stop,
    )
    monkeypatch.setattr(pool, "_OBSTACLE_NOTICE_SECONDS", 0.1)
    with pytest.raises(KeyboardInterrupt):
        list(made.run(units(3)))
    made.close()
    assert len(notices) == 1
    assert "64 CPUs and 0.5 GPUs" in notices[0]
    assert "1 with 1 CPUs and 0 GPUs" in notices[0]
    assert cluster.obstacle(Demand(1, 0)) == ""


def test_a_node_that_comes_in_mid_run_takes_its_share(nodes: Cluster) -> None:
    made = Pool(Puppet.options(num_cpus=1).remote, 3, 1, print, stop=ended_after(60))
    seen: Counter[str] = Counter()
    names, added = [], None
    endless = (Unit("a", index, 4, ()) for index in count())
    for name, node in outcomes(made, takewhile(lambda _: len(seen) < 2, endless)):
        names.append(name)
        seen[node] += 1
        if added is None and len(names) == 5:
            added = nodes.add_node(num_cpus=2)
    made.close()
    assert added is not None
    assert seen[added.node_id] > 0
    assert len(set(names)) == len(names) == max(int(name.rpartition("-")[2]) for name in names) + 1


def test_an_idle_actor_is_given_back_while_another_still_works(tmp_path: Path) -> None:
    file = tmp_path / "go"
    slow = Pool(lambda: Puppet.options(num_cpus=1).remote(file), 3, 3, print, stop=ended_after(60))
    done: list[object] = []

    def work() -> None:
        for outcome in slow.run([*units(1, "stuck"), *units(5)]):
            done.append(outcome)  # noqa: PERF402 - seen from outside as they come

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    while thread.is_alive() and len(done) < 5:
        time.sleep(0.05)
    # this one needs both of the CPUs that the idle ones had
    other = Pool(Puppet.options(num_cpus=1).remote, 2, 2, print, stop=ended_after(60))
    assert len(list(outcomes(other, units(4)))) == 4
    assert len(done) == 5
    file.touch()
    thread.join()
    assert len(done) == 6


def test_a_node_that_goes_gets_nothing_more_and_what_it_cannot_finish_is_done_elsewhere(
    nodes: Cluster, tmp_path: Path
) -> None:
    spot = nodes.add_node(num_cpus=1, resources={"spot": 1})
    notices: list[str] = []
    file = tmp_path / "go"

    def notice(text: str) -> None:
        notices.append(text)
        if "went with its node" in text:
            file.touch()

    create = lambda: Puppet.options(num_cpus=1, resources={"spot": 1}).remote(file)  # noqa: E731
    made = Pool(create, 1, 1, notice, draining=cluster.draining, stop=ended_after(60))
    endless = (Unit("a", index, 4, ()) for index in count())
    places: dict[str, str] = {}
    last: list[str] = []  # what came from the node after the notice
    killed = False
    for number, (name, node) in enumerate(
        outcomes(made, chain(units(1, "stuck"), takewhile(lambda _: not file.exists(), endless)))
    ):
        assert name not in places
        places[name] = node
        if number == 5:
            reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
            deadline = int(1000 * (time.time() + 60))
            assert GcsClient(address=nodes.address).drain_node(spot.node_id, reason, "spot", deadline)[0]
            nodes.add_node(num_cpus=1, resources={"spot": 1})
        if node == spot.node_id and notices:
            last.append(name)
        if node != spot.node_id and not killed:
            killed = True  # the notice's time is over: the node goes with what it holds
            nodes.remove_node(spot, allow_graceful=False)
    made.close()
    assert "1 teacher actors there finish" in notices[0]
    assert len(last) < PIPELINE_DEPTH
    assert made.retried == 1
    assert places["stuck-000000"] != spot.node_id
    assert len(places) == 1 + max(int(name.rpartition("-")[2]) for name in places if name.startswith("a-")) + 1


def test_defaults_fit_the_nodes(nodes: Cluster) -> None:
    assert cluster.demand(None, None, 1) == Demand(2, 0)  # the largest node has two
    assert cluster.demand(None, None, 3) == Demand(1, 0)
    nodes.add_node(num_cpus=7, num_gpus=2)
    assert cluster.demand(None, None, 1) == Demand(4, 1)
    assert cluster.demand(None, None, 2) == Demand(3, 1)  # both of its GPUs can be used
    assert cluster.demand(None, 0.5, 4) == Demand(1, 0.5)
    assert cluster.demand(None, 0, 1) == Demand(7, 0)
    wanted = cluster.demand(None, None, 2)
    made = Pool(lambda: Puppet.options(num_cpus=wanted.cpus, num_gpus=wanted.gpus).remote(), 2, 2, print)
    assert len(list(made.run(units(4)))) == 4


def test_actors_find_the_room_beside_training_that_was_reckoned_with(
    nodes: Cluster, data: Path, tmp_path: Path
) -> None:
    nodes.add_node(num_cpus=7)
    content = {"actors": {"gpus": 0, "max": 4}, "training": {"cpus": 5, "gpus": 0}}
    recipe = parse_recipe(models.recipe(data, tmp_path, **content), "test")
    room = cluster.room_beside_training(recipe)
    # fewer actors would each ask for more, by default, than there is beside the training
    assert room.actors
    assert room.each != cluster.demand(None, 0, room.actors)
    training = Puppet.options(num_cpus=5).remote()
    beside = [Puppet.options(num_cpus=room.each.cpus).remote() for _ in range(room.actors)]
    assert all(ray.get([one.load.remote() for one in (training, *beside)], timeout=60))
    for one in (training, *beside):
        ray.kill(one)
