"""The Ray cluster that a command runs on: the one at hand, or a local one for the command's own time."""

import os
import socket
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


def share(amount: float | None, resource: str, workers: int) -> float:
    """What each of ``workers`` gets of a resource: ``amount`` if the recipe gives it.

    Otherwise one GPU where the cluster has any; four CPUs beside a GPU, or an equal share of all CPUs.
    """
    if amount is not None:
        return amount
    total = ray.cluster_resources()
    gpus = total.get("GPU", 0)
    if resource == "GPU":
        return 1 if gpus else 0
    return min(4, total.get("CPU", 1)) if gpus else max(1, int(total.get("CPU", 1)) // workers)
