"""The whole job through the command line on a real Ray cluster, submitted as a Ray job and without one."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import yaml
from mmdet.apis import init_detector

from cache import TeacherCache
from tests import models

BIN = Path(sys.executable).parent
ROOT = Path(__file__).parents[2]


def run(*command: str, env: dict[str, str] | None = None, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, env={**os.environ, **(env or {})}, check=False, timeout=500
    )
    print(result.stdout[-6000:], result.stderr[-3000:])
    return result


def write(content: dict, folder: Path) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    return str(folder / "recipe.yaml")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_run_trains_every_stage_from_a_full_cache_and_a_second_run_does_nothing(data: Path, tmp_path: Path) -> None:
    content = models.recipe(data, tmp_path)
    content["actors"] = {"max": 2, "cpus": 1}
    file = write(content, tmp_path)
    first = run(str(BIN / "mtpd"), "run", file)
    assert first.returncode == 0
    for name in ("small", "swin"):
        assert len(TeacherCache.open(content["cache"]["uri"], name)) == 40
    results = [json.loads((tmp_path / "work" / f"stage-{n}" / "result.json").read_text()) for n in (1, 2)]
    assert [r["teacher"] for r in results] == ["small", "swin"]
    assert all("bbox_mAP" in r["metrics"] and r["teacher_forwards"] == 0 for r in results)
    init_detector(str(tmp_path / "work/stage-2/student.py"), results[1]["student"], device="cpu")
    fills = [json.loads((tmp_path / "work" / f"precompute-{name}.json").read_text()) for name in ("small", "swin")]
    assert [[run["computed"] for run in fill["runs"]] for fill in fills] == [[40], [40]]
    page = (tmp_path / "work" / "report.html").read_text()
    assert f"report: {tmp_path}/work/report.html" in first.stdout
    assert "<dt>teacher forwards made</dt><dd>80<" in page
    assert page.count("data:image/jpeg") == 4  # the detectors ran
    stamps = {f: f.stat().st_mtime_ns for f in (tmp_path / "cache").rglob("*") if f.is_file() and f.suffix != ".lock"}
    second = run(str(BIN / "mtpd"), "run", file)
    assert second.returncode == 0
    assert "rows are in the cache" not in second.stdout, "no stage is left that needs them"
    assert second.stdout.count("done before") == 2
    assert stamps == {f: f.stat().st_mtime_ns for f in stamps}


def test_bad_images_end_in_exit_code_1_with_everything_else_committed(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "data" / "train" / "00000004.jpg").write_bytes(b"not an image")
    content = models.recipe(tmp_path / "data", tmp_path)
    file = write(content, tmp_path)
    result = run(str(BIN / "mtpd"), "precompute", file, "--teacher", "small")
    assert result.returncode == 1
    assert "2 rows of 1 images have no targets" in result.stderr
    assert "image 4 (00000004.jpg) cannot be decoded" in result.stderr
    assert len(TeacherCache.open(content["cache"]["uri"], "small")) == 38
    refused = run(str(BIN / "mtpd"), "train", file, "--stage", "1")
    assert refused.returncode == 1
    assert "lacks 2 of 40 rows, of 1 images (ids 4)" in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """`ray start --head` with a dashboard; what a job needs to be submitted there."""
    port, dashboard = free_port(), free_port()
    here = tmp_path_factory.mktemp("job")
    temporary = Path(f"/tmp/mtpd-{os.getpid()}")  # a socket's path must be short
    env = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
    # --block and a session of its own: at the end exactly these processes are stopped, no other cluster of this machine
    head = subprocess.Popen(
        [
            str(BIN / "ray"), "start", "--head", "--block", f"--port={port}", f"--dashboard-port={dashboard}",
            "--num-cpus=2", "--include-dashboard=true", f"--temp-dir={temporary}", "--disable-usage-stats",
            f"--dashboard-agent-listen-port={free_port()}",  # another test's cluster may have the usual one
        ],
        env={**os.environ, **env}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    address = f"http://127.0.0.1:{dashboard}"
    try:
        _wait_until_up(address, head)
        yield {**env, "RAY_ADDRESS": address, "HERE": str(here)}
    finally:
        processes = [head, *psutil.Process(head.pid).children(recursive=True)] if head.poll() is None else []
        head.terminate()
        for process in processes[1:]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        head.wait(timeout=60)
        shutil.rmtree(temporary, ignore_errors=True)


def _wait_until_up(address: str, head: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert head.poll() is None, "ray start failed"
        with suppress(OSError):
            urllib.request.urlopen(f"{address}/api/jobs/", timeout=5).close()
            return
        time.sleep(0.5)
    raise TimeoutError(address)


def submit(cluster: dict[str, str], *command: str) -> subprocess.CompletedProcess[str]:
    deadline = time.monotonic() + 60
    while True:
        result = run(
            str(BIN / "ray"), "job", "submit", "--address", cluster["RAY_ADDRESS"], "--working-dir", ".", "--", *command,
            env={k: v for k, v in cluster.items() if k.startswith("RAY")},
            cwd=Path(cluster["HERE"]),
        )  # fmt: skip
        # the job server answers before the agent is there that starts jobs
        if "No available agent to submit job" not in result.stderr or time.monotonic() > deadline:
            return result
        time.sleep(1)


def test_precompute_and_train_as_submitted_jobs(data: Path, cluster: dict[str, str]) -> None:
    here = Path(cluster["HERE"])
    content = models.recipe(data, here)
    content["stages"] = content["stages"][:1]
    write(content, here / "recipes")
    mtpd = str(BIN / "mtpd")
    filled = submit(cluster, mtpd, "precompute", "recipes/recipe.yaml")
    assert filled.returncode == 0
    assert len(TeacherCache.open(content["cache"]["uri"], "small")) == 40
    trained = submit(cluster, mtpd, "train", "recipes/recipe.yaml")
    assert trained.returncode == 0
    assert (here / "work" / "stage-1" / "student.pth").exists()


def test_a_job_that_would_write_into_its_temporary_copy_is_refused(data: Path, cluster: dict[str, str]) -> None:
    here = Path(cluster["HERE"])
    content = models.recipe(data, here)
    content["cache"]["uri"] = "cache-here"
    write(content, here / "recipes")
    result = submit(cluster, str(BIN / "mtpd"), "precompute", "recipes/recipe.yaml")
    assert result.returncode != 0
    assert "cache.uri: a relative path" in result.stdout + result.stderr
