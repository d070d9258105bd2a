"""The Ray cluster that a command runs on: the one at hand, or a local one for the command's own time."""

import os
import signal
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import ray

from cache import RecipeError
from services import logs
from trainer import Recipe

_ANSWER_SECONDS = 10.0


def connect(*, quiet: bool = False) -> None:
    """Connect to the cluster of ``RAY_ADDRESS`` or of this machine, or start a local one. Nothing if connected.

    Args:
        quiet: do not print what workers print; nor is it where logs are JSON, for Ray puts a prefix before each line.

    Raises:
        RecipeError: nothing answers at ``RAY_ADDRESS``.
    """
    if ray.is_initialized():
        return
    options = {"log_to_driver": not quiet and not logs.style(), "logging_level": "WARNING"}
    try:
        _refuse_silent()
        ray.init(address="auto", **options)
    except ConnectionError:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a local cluster reports nothing to anyone
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # it lives as long as this command and listens on loopback
        # a dashboard nobody looks at would take a tenth of two cores from the teachers
        ray.init(address="local", include_dashboard=False, **options)


def _refuse_silent() -> None:
    """Ray waits for minutes, without a word, for a cluster that is gone.

    Raises:
        RecipeError: nothing answers at ``RAY_ADDRESS``.
        ConnectionError: nothing answers where a Ray of this machine was, which was killed.
    """
    given = os.environ.get("RAY_ADDRESS", "")
    left = Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", "ray_current_cluster")
    address = given or (left.read_text().strip() if left.is_file() else "")
    host, _, port = address.rpartition(":")
    if not port.isdigit() or "/" in host:  # "local", "auto", or none
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), _ANSWER_SECONDS).close()
    except OSError as error:
        if not given:
            raise ConnectionError(f"{address}: {error}") from error
        raise RecipeError(
            f"RAY_ADDRESS: no Ray answers at {given} ({error}). Start that cluster, or unset RAY_ADDRESS to work on this machine."
        ) from error


def refuse_temporary_paths(recipe: Recipe) -> None:
    """A submitted job runs in a temporary copy of its working directory: nothing may be written there.

    Raises:
        RecipeError: the cache or the work_dir lies in that copy.
    """
    here = Path.cwd()
    if "working_dir_files" not in here.parts:
        return
    for key, path in (("cache.uri", recipe.cache.uri), ("work_dir", recipe.work_dir)):
        if "://" not in path and Path(path).is_relative_to(here):
            raise RecipeError(
                f"{key}: a relative path, which in a submitted job lies in a temporary copy of the working directory and "
                f"would be lost ({path}). Give an absolute path on storage that every node sees."
            )


@dataclass(frozen=True)
class Demand:
    """What each of several workers asks for."""

    cpus: float
    gpus: float


def demand(cpus: float | None, gpus: float | None, workers: int) -> Demand:
    """What each of ``workers`` asks for: what the recipe gives, and what suits the nodes that are up where it gives nothing.

    By default one GPU where any node has one. Beside a GPU four CPUs, or the node's share of each of its GPUs if that is
    less; without one as many CPUs as let all workers be placed, the most that a node has if there are few.
    """
    nodes = _nodes()
    if gpus is None:
        gpus = 1.0 if any(node.get("GPU", 0) >= 1 for node in nodes) else 0.0
    if cpus is None:
        cpus = _cpus_beside(gpus, nodes, workers) if gpus else _cpus_alone(nodes, workers)
    return Demand(cpus, gpus)


def _cpus_beside(gpus: float, nodes: list[dict[str, float]], workers: int) -> float:
    hosts = [node for node in nodes if node.get("GPU", 0) >= gpus]
    shares = [node.get("CPU", 0) / min(int(node["GPU"] / gpus), workers) for node in hosts]
    least = min([4.0, *shares])
    return float(int(least)) if least >= 1 else least


def _cpus_alone(nodes: list[dict[str, float]], workers: int) -> float:
    counts = [int(node.get("CPU", 0)) for node in nodes]
    most = range(max(counts, default=1), 0, -1)
    return float(next((each for each in most if sum(count // each for count in counts) >= workers), 1))


def obstacle(wanted: Demand) -> str:
    """Why no node that is up can ever hold such a worker, for the user; empty if one can."""
    nodes = _nodes()
    if any(node.get("CPU", 0) >= wanted.cpus and node.get("GPU", 0) >= wanted.gpus for node in nodes):
        return ""
    shapes = Counter((node.get("CPU", 0), node.get("GPU", 0)) for node in nodes)
    listed = [f"{count} with {cpus:g} CPUs and {gpus:g} GPUs" for (cpus, gpus), count in shapes.most_common(4)]
    return (
        f"no node that is up can hold a teacher actor: each asks for {wanted.cpus:g} CPUs and {wanted.gpus:g} GPUs; nodes: "
        f"{', '.join(listed)}{' and others' if len(shapes) > 4 else ''}. This waits until an autoscaler or somebody adds a "
        "larger one; else stop it and lower actors.cpus or actors.gpus"
    )


def draining() -> frozenset[str]:
    """The ids of nodes that are about to go: a spot node after its notice, one that is scaled down or drained by hand."""
    # Ray's own Train and Serve ask the same; there is no public call
    return frozenset(ray._private.state.state.get_draining_nodes())


def _nodes() -> list[dict[str, float]]:
    """The resources of each node that is up."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def training_demand(recipe: Recipe) -> Demand:
    """What each training worker asks for."""
    return demand(recipe.training.cpus, recipe.training.gpus, recipe.training.max_workers)


@dataclass(frozen=True)
class Room:
    """How many teacher actors there is room for, if each asks for just that."""

    actors: int
    each: Demand


def room_beside_training(recipe: Recipe) -> Room:
    """What the nodes that are up can hold beside the training workers; at most ``actors.max``.

    Whatever else runs on the cluster is not looked at: it may go.
    """
    nodes = [dict(node) for node in _nodes()]
    each = demand(recipe.actors.cpus, recipe.actors.gpus, recipe.actors.max)
    if not all(_placed(training_demand(recipe), nodes) for _ in range(recipe.training.workers.max)):
        return Room(0, each)
    return Room(next((n for n in range(recipe.actors.max) if not _placed(each, nodes)), recipe.actors.max), each)


def _placed(wanted: Demand, nodes: list[dict[str, float]]) -> bool:
    """Take what a worker asks for from the first node that has it."""
    for node in nodes:
        if node.get("CPU", 0) >= wanted.cpus and node.get("GPU", 0) >= wanted.gpus:
            node["CPU"] = node.get("CPU", 0) - wanted.cpus
            node["GPU"] = node.get("GPU", 0) - wanted.gpus
            return True
    return False


@contextmanager
def own_interrupts() -> Iterator[None]:
    """Ray Train leaves its answer to Ctrl-C behind: after the training it would try to stop a controller that is gone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
