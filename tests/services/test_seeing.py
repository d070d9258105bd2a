"""A small precompute on a real local Ray: its metrics on the Prometheus endpoint, its trace, its logs."""

import io
import json
import logging
import re
import time
import urllib.request
from collections.abc import Iterator
from contextlib import redirect_stderr
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import ray

from services import logs, metrics
from services.precompute import FillResult, fill
from services.spans import Span
from services.trace import Trace, device_use
from tests import models
from trainer import Pulse, parse_recipe


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """A local Ray as `mtpd` starts it, without a dashboard; the address of its node's metrics."""
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        _system_config={"metrics_report_interval_ms": 500},
    )
    (node,) = ray.nodes()
    yield f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    ray.shutdown()


@dataclass(frozen=True)
class Computed:
    """What a precompute gave, where its trace is, and what the driver logged."""

    result: FillResult
    trace: Path
    log: str


@pytest.fixture(scope="module")
def computed(cluster: str, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Computed:
    """A precompute by two actors, with an image that cannot be read; its logs are JSON."""
    folder = tmp_path_factory.mktemp("seeing")
    content = models.recipe(data, folder)
    annotations = json.loads((data / "annotations" / "train.json").read_text())
    annotations["images"].append({**annotations["images"][0], "id": 999, "file_name": "nowhere.jpg"})
    (folder / "train.json").write_text(json.dumps(annotations))
    content["dataset"]["train"]["ann_file"] = str(folder / "train.json")
    content["actors"] = {"min": 2, "max": 2, "cpus": 1}
    content["teachers"]["small"]["batch_size"] = 2
    with pytest.MonkeyPatch.context() as patch, redirect_stderr(io.StringIO()) as log:
        patch.setenv("MTPD_LOG", "json")
        logger = logging.getLogger("mtpd")
        logs.set_up(logs.style())
        with Trace(folder / "trace.json") as trace:
            result = fill(parse_recipe(content, "test"), "small", trace=trace)
        logger.handlers.clear()
    assert (result.computed, len(result.failures)) == (40, 2)
    return Computed(result, folder / "trace.json", log.getvalue())


def scrape(address: str) -> dict[str, dict[tuple[str, ...], float]]:
    """Per metric of ours the sum over workers of each combination of our own labels' values."""
    found: dict[str, dict[tuple[str, ...], float]] = {}
    with urllib.request.urlopen(address, timeout=10) as answer:
        for line in answer.read().decode().splitlines():
            if match := re.fullmatch(r"(ray_mtpd_\w+)\{(.*)\} (\S+)", line):
                labels = dict(re.findall(r'(\w+)="([^"]*)"', match[2]))
                own = tuple(labels[key] for key in ("teacher", "phase", "stage", "loss", "le") if key in labels)
                values = found.setdefault(match[1], {})
                values[own] = values.get(own, 0.0) + float(match[3])
    return found


def scrape_until(address: str, name: str) -> dict[str, dict[tuple[str, ...], float]]:
    deadline = time.monotonic() + 40
    while name not in (found := scrape(address)):
        assert time.monotonic() < deadline, f"{name} is not exported: {sorted(found)}"
        time.sleep(0.5)
    return found


def test_a_precomputes_metrics_are_scraped_with_their_values(cluster: str, computed: Computed) -> None:
    result, trace = computed.result, computed.trace
    for metric in (metrics.ROWS, metrics.PLANNED_ROWS):
        found = scrape_until(cluster, metric.exported)
    # what the actors count on their way out, and the driver a moment later
    deadline = time.monotonic() + 20
    while found[metrics.ROWS.exported][("small",)] < 40 or found[metrics.COMMITTED_ROWS.exported][("small",)] < 40:
        assert time.monotonic() < deadline, found
        time.sleep(0.5)
        found = scrape(cluster)
    units = len({e["args"]["unit"] for e in json.loads(trace.read_text())["traceEvents"] if e["ph"] == "X"})
    expected = {
        metrics.ROWS: 40,
        metrics.UNITS: units,
        metrics.FAILED_ROWS: 2,
        metrics.WRITTEN_BYTES: result.written_bytes,
        metrics.PLANNED_ROWS: 42,
        metrics.COMMITTED_ROWS: 40,
    }
    assert {m.name: found[m.exported][("small",)] for m in expected} == {m.name: v for m, v in expected.items()}
    assert found["ray_mtpd_write_lag_seconds_count"][("small",)] == units
    phases = found[metrics.PHASE_SECONDS.exported]
    used = device_seconds(trace)
    assert phases[("small", "device")] == pytest.approx(used, rel=1e-3)
    assert {phase for _, phase in phases} == {"decode", "wait", "device", "write"}
    assert set(found[metrics.UNITS_IN_PHASE.exported].values()) == {0}


def device_seconds(trace: Path) -> float:
    return sum(e["dur"] for e in json.loads(trace.read_text())["traceEvents"] if e["name"] == "device") / 1e6


def test_a_training_workers_pulse_is_scraped(cluster: str) -> None:
    pulse = Pulse(5, 10, 1, 2, {"loss": 1.5, "loss_cls": 0.5}, 3.0, time.time(), 5, 20, 4.0, 1.0, 12, 8)

    @ray.remote(num_cpus=0)
    class Worker:
        def work(self) -> None:
            for _ in range(2):
                metrics.publish_pulse(pulse, "work/stage-1")

    worker = Worker.remote()
    ray.get(worker.work.remote())
    found = scrape_until(cluster, metrics.TRAINING_STEPS.exported)
    stage = ("work/stage-1",)
    assert (
        found[metrics.TRAINING_DATA_SECONDS.exported][stage] / found[metrics.TRAINING_SECONDS.exported][stage] == 0.25
    )
    assert (found[metrics.TRAINING_STEPS.exported][stage], found[metrics.TRAINING_IMAGES.exported][stage]) == (10, 40)
    assert (found[metrics.KEPT_ROWS.exported][stage], found[metrics.FETCHED_ROWS.exported][stage]) == (24, 16)
    assert found[metrics.TRAINING_EPOCH.exported][stage] == 1
    assert found[metrics.TRAINING_LOSS.exported] == {(*stage, "loss"): 1.5, (*stage, "loss_cls"): 0.5}


def test_the_trace_shows_each_actors_device_on_one_unit_at_a_time(computed: Computed) -> None:
    events = json.loads(computed.trace.read_text())["traceEvents"]
    complete = [e for e in events if e["ph"] == "X"]
    by_lane: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for event in complete:
        by_lane.setdefault((event["pid"], event["tid"]), []).append(event)
    named = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert by_lane.keys() <= named.keys()
    for lane, inside in by_lane.items():
        whole = [e for e in inside if e["name"] not in ("forward", "quantise")]
        assert {e["name"] for e in whole} == {named[lane]}
        for a, b in pairwise(sorted(whole, key=lambda e: e["ts"])):
            assert a["ts"] + a["dur"] <= b["ts"] + 1, "intervals of one lane overlap"
        for part in (e for e in inside if e["name"] in ("forward", "quantise")):
            assert any(e["ts"] <= part["ts"] + 1 and part["ts"] + part["dur"] <= e["ts"] + e["dur"] + 1 for e in whole)
    for unit in {e["args"]["unit"] for e in complete}:
        own = {e["name"]: e for e in complete if e["args"]["unit"] == unit}
        order = [own[phase]["ts"] for phase in ("decode", "wait", "device", "write")]
        assert order == sorted(order)
    assert {e["pid"] for e in complete} == {1, 2}
    assert sum(e["args"]["rows"] for e in complete if e["name"] == "write") == computed.result.computed


def test_gaps_of_a_device_are_told() -> None:
    class Record:
        def __init__(self, actor: str, *spans: Span) -> None:
            self.actor, self.spans = actor, spans

    found = device_use(
        [
            Record("a", Span("decode", 0, 3), Span("device", 10, 12)),
            Record("a", Span("device", 3, 8), Span("write", 8, 20)),
            Record("b", Span("device", 1, 2)),
            Record("a", Span("device", 12, 13)),
        ]
    )
    assert [(use.actor, use.busy, use.window, use.gaps) for use in found] == [("a", 8, 10, (2, 0)), ("b", 1, 1, ())]
    assert found[0].share == 0.8


def test_json_logs_name_teacher_and_unit(computed: Computed) -> None:
    folder = Path(ray._private.worker.global_worker.node.get_session_dir_path(), "logs")
    of_actors = [line for file in folder.glob("worker-*.err") for line in lines(file.read_text())]
    of_driver = lines(computed.log)
    assert all({"time", "level", "message", "host", "pid"} <= line.keys() for line in of_driver + of_actors)
    assert any("images" in line["message"] for line in of_driver)
    units = [line for line in of_actors if line["message"] == "unit committed"]
    assert sum(line["rows"] for line in units) == 40
    assert {line["teacher"] for line in units} == {"small"}
    assert len({line["unit"] for line in units}) == len(units)
    failed = [line for line in of_actors if line["message"] == "row failed"]
    assert [(line["image_id"], line["level"]) for line in failed] == [(999, "warning")] * 2


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]
