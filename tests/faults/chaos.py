"""Precomputes on a real Ray of several nodes that loses actors, nodes, the driver and the head at random moments.

A campaign runs ``mtpd precompute`` of a small mmdet teacher on a cluster of this machine (a head without CPUs, two nodes of
one CPU), strikes while it runs, and starts again what a user or a job controller would start again. What the actors log says
which units were begun and committed, over all runs. Longer campaigns::

    python -W ignore -m tests.faults.chaos --seeds 5 --events 12 --images 400
"""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
import yaml
from ray._common.utils import reset_ray_address
from ray._private.node import Node
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated.autoscaler_pb2 import DrainNodeReason

from cache import load_index, open_storage
from cache.layout import LEASE, PROGRESS
from services.pool import PIPELINE_DEPTH
from tests import models
from tests.trainer import precompute
from trainer import Recipe, generate, parse_recipe, teacher_info

MTPD = str(Path(sys.executable).with_name("mtpd"))
KINDS = ("actor", "node", "spot", "driver", "head")
NODES, NOTICE_SECONDS, PATIENCE_SECONDS = 2, 3.0, 240.0


@dataclass
class Report:
    """What a campaign did and found.

    Attributes:
        strikes: of each kind.
        allowed: units in flight at the strikes, at most.
        begun, committed: how often each unit was, over all runs.
        repeated: units begun again though they were committed when a new driver started.
        rows: rows in the manifest.
        drivers: how many were started.
    """

    strikes: Counter[str] = field(default_factory=Counter)
    allowed: int = 0
    begun: Counter[str] = field(default_factory=Counter)
    committed: Counter[str] = field(default_factory=Counter)
    repeated: set[str] = field(default_factory=set)
    rows: int = 0
    drivers: int = 0
    seconds: float = 0.0

    @property
    def again(self) -> int:
        """Units that were begun again, each time counted."""
        return self.begun.total() - len(self.begun)

    def __str__(self) -> str:
        return (
            f"{dict(self.strikes)}, {self.drivers} drivers, {self.seconds:.0f} s; {len(self.begun)} units, {self.again} times "
            f"one was begun again (at most {self.allowed} were in flight), {self.committed.total() - len(self.committed)} times "
            f"committed again, {len(self.repeated)} begun though known to be committed"
        )


def job(folder: Path, images: int) -> dict[str, Any]:
    """A recipe on drawn scenes whose cache is filled without any disturbance, for comparison; units of four rows."""
    generate(folder / "data", "train", images, seed=11)
    generate(folder / "data", "val", 1, seed=11, first_id=10_000)
    content = models.recipe(folder / "data", folder)
    content["actors"] = {"max": NODES, "cpus": 1}
    assert precompute.fill(parse_recipe(content, "chaos"), "small") == []
    return content


def digests(recipe: Recipe) -> dict[str, str]:
    """A hash of every file of the teacher's group, but of those that tell of runs, and what killed writers leave unfinished."""
    root = Path(recipe.cache.uri) / teacher_info(recipe, "small").name
    files = [f for f in root.rglob("*") if f.is_file() and f.name not in (LEASE, PROGRESS) and f.suffix != ".tmp"]
    return {str(f.relative_to(root)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


class Ground:
    """The cluster under fire; a new one after the head was lost."""

    def __init__(self) -> None:
        self.sessions: list[Path] = []
        self.orphans: list[psutil.Process] = []
        self.begin()

    def begin(self) -> None:
        """A new head and its nodes."""
        # a node that does not answer at all is noticed within a second, not in fifteen; a slow one still has ten
        config = {
            "health_check_initial_delay_ms": 0,
            "health_check_period_ms": 500,
            "health_check_failure_threshold": 2,
        }
        head = {"num_cpus": 0, "include_dashboard": False, "_system_config": config}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.sessions.append(Path(self.cluster.head_node.get_session_dir_path()))
        self.nodes = [self.cluster.add_node(num_cpus=1) for _ in range(NODES)]

    def lose(self, node: Node) -> None:
        """A node is gone with all that ran on it, and another one comes."""
        kill(processes(node))
        self.nodes[self.nodes.index(node)] = self.cluster.add_node(num_cpus=1)

    def end_head(self, *, nodes_too: bool) -> None:
        """The head is gone; its nodes go with it, or do not know yet."""
        below = [process for node in self.nodes for process in processes(node)]
        kill(processes(self.cluster.head_node) + (below if nodes_too else []))
        self.orphans += below
        self.begin()

    def close(self) -> None:
        """Nothing is left running."""
        kill([p for node in (*self.nodes, self.cluster.head_node) for p in processes(node)] + self.orphans)
        reset_ray_address()


def processes(node: Node) -> list[psutil.Process]:
    """Those of a node: Ray's own, and the workers below them."""
    found = []
    for infos in node.all_processes.values():
        for info in infos:
            try:
                process = psutil.Process(info.process.pid)
                found += [*process.children(recursive=True), process]
            except psutil.NoSuchProcess:
                continue
    return found


def kill(victims: list[psutil.Process]) -> None:
    """kill -9, and wait until they are gone."""
    for process in victims:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(victims, timeout=10)


class Campaign:
    """One precompute under strikes that a seed decides: their kinds, order and moments."""

    def __init__(self, content: dict[str, Any], folder: Path, seed: int) -> None:
        folder.mkdir(parents=True)
        self._random = random.Random(seed)
        self._file = folder / "recipe.yaml"
        own = {"cache": {**content["cache"], "uri": str(folder / "cache")}, "work_dir": str(folder / "work")}
        self._file.write_text(yaml.safe_dump({**content, **own}))
        self.recipe = parse_recipe({**content, **own}, "chaos")
        self._log = folder / "driver.log"
        self._info, self._storage = teacher_info(self.recipe, "small"), open_storage(self.recipe.cache.uri)
        self._starts: list[tuple[float, set[str]]] = []
        self.report = Report()

    def run(self, kinds: list[str]) -> Report:
        """Strike so often, then let the precompute end.

        Raises:
            AssertionError: a precompute ended with an error, or did not end.
        """
        begun = time.monotonic()
        self.ground = Ground()
        try:
            self._start()
            for kind in kinds:
                if self._wait(kind):
                    break
                getattr(self, f"_strike_{kind}")()
                self.report.strikes[kind] += 1
            code = self._driver.wait(PATIENCE_SECONDS)
            assert code == 0, f"exit code {code}:\n{self._log.read_text()[-4000:]}"
        finally:
            self._driver.kill()
            self.ground.close()
        self._read_logs()
        self.report.rows = self._rows()
        self.report.seconds = time.monotonic() - begun
        return self.report

    def _start(self) -> None:
        """Run the command, as a user or a job controller does after its end."""
        self._starts.append((time.time(), self._units()))
        self.report.drivers += 1
        environment = {**os.environ, "RAY_ADDRESS": self.ground.cluster.address, "MTPD_LOG": "json"}
        with self._log.open("a") as log:
            self._driver = subprocess.Popen(
                [MTPD, "precompute", str(self._file), "--teacher", "small"], stdout=log, stderr=log, env=environment
            )

    def _wait(self, kind: str) -> bool:
        """Wait for the moment of a strike. Returns whether the precompute ended before."""
        early = kind != "actor" and self._random.random() < 0.2  # also while drivers and actors start
        rows, seconds = self._rows() + self._random.randint(1, 24), self._random.uniform(0, 5 if early else 0.3)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not early and self._rows() < rows:
            if self._driver.poll() is not None:
                return True
            assert time.monotonic() < deadline, f"no progress:\n{self._log.read_text()[-4000:]}"
            time.sleep(0.02)
        time.sleep(seconds)
        return self._driver.poll() is not None

    def _strike_actor(self) -> None:
        actors = [p for node in self.ground.nodes for p in processes(node) if "ray::TeacherActor" in _title(p)]
        if actors:
            kill([self._random.choice(actors)])
        self.report.allowed += PIPELINE_DEPTH

    def _strike_node(self) -> None:
        self.report.allowed += PIPELINE_DEPTH
        self.ground.lose(self._random.choice(self.ground.nodes))

    def _strike_spot(self) -> None:
        self.report.allowed += PIPELINE_DEPTH
        node = self._random.choice(self.ground.nodes)
        reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        deadline = int(1000 * (time.time() + NOTICE_SECONDS))
        GcsClient(address=self.ground.cluster.address).drain_node(node.node_id, reason, "spot", deadline)
        time.sleep(NOTICE_SECONDS)
        self.ground.lose(node)

    def _strike_driver(self) -> None:
        self.report.allowed += PIPELINE_DEPTH * NODES
        self._driver.send_signal(signal.SIGKILL)
        self._driver.wait()
        self._start()

    def _strike_head(self) -> None:
        """The driver of a submitted job runs on the head."""
        self.report.allowed += PIPELINE_DEPTH * NODES
        self._driver.send_signal(signal.SIGKILL)
        self._driver.wait()
        self.ground.end_head(nodes_too=self._random.random() < 0.5)
        self._start()

    def _rows(self) -> int:
        return len(load_index(self._storage, self._info))

    def _units(self) -> set[str]:
        occupied = load_index(self._storage, self._info).occupied()
        return {f"{bucket}-{index:06d}" for bucket, rows in occupied.items() for index in set((rows // 4).tolist())}

    def _read_logs(self) -> None:
        """What the actors of all runs began and committed."""
        for file in (file for session in self.ground.sessions for file in (session / "logs").glob("worker-*.err")):
            for line in file.read_text(errors="replace").splitlines():
                if '"unit begun"' in line or '"unit committed"' in line:
                    event = json.loads(line)
                    begun = event["message"] == "unit begun"
                    (self.report.begun if begun else self.report.committed)[event["unit"]] += 1
                    moment = _seconds(event["time"])
                    if begun and any(moment > at and event["unit"] in units for at, units in self._starts):
                        self.report.repeated.add(event["unit"])


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def _seconds(moment: str) -> float:
    return datetime.fromisoformat(moment).timestamp()


def main(
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    first: Annotated[int, typer.Option(help="The first seed.")] = 0,
    events: Annotated[int, typer.Option(min=1, help="Strikes of each campaign.")] = 10,
    images: Annotated[int, typer.Option(min=10, help="Two rows each.")] = 300,
) -> None:
    """Run campaigns and print what they did."""
    with tempfile.TemporaryDirectory() as name:
        content = job(Path(name), images)
        expected = digests(parse_recipe(content, "chaos"))
        for seed in range(first, first + seeds):
            campaign = Campaign(content, Path(name) / f"seed-{seed}", seed)
            report = campaign.run(random.Random(seed).choices(KINDS, k=events))
            found = digests(campaign.recipe)
            other = sorted(name for name in expected | found if expected.get(name) != found.get(name))
            files = f"{len(other)} of {len(expected)} files differ" + "".join(f" {name}" for name in other[:5])
            print(f"seed {seed}: {report}; {report.rows} of {2 * images} rows, {files}", flush=True)


if __name__ == "__main__":
    typer.run(main)
