"""The command line: exit codes and messages; one of each kind in a process of its own, the others through `main` in this one."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from cache import BudgetError, LocalStorage, RecipeError
from services import cluster
from services.cli import app, main
from tests import models


def mtpd(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("mtpd")), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False, timeout=300)


class Here:
    """Runs `main`, the script's entry point, in this process: starting Python and detectors takes seconds each time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        self._monkeypatch.setattr(sys, "argv", ["mtpd", *arguments])
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = self._capsys.readouterr()
        return subprocess.CompletedProcess(sys.argv, int(ended.value.code or 0), out, err)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Here:
    return Here(monkeypatch, capsys)


def write(content: dict, folder: Path) -> str:
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(content))
    return str(file)


def test_plan_prints_exact_numbers_and_writes_nothing(data: Path, tmp_path: Path, here: Here) -> None:
    content = models.recipe(data, tmp_path)
    content["teachers"]["swin"]["detections"] = True
    file = write(content, tmp_path)
    result = mtpd("plan", file, "--json")
    assert result.returncode == 0, result.stderr
    content = json.loads(result.stdout)
    assert content["cost"] is None
    plans = content["teachers"]
    assert [p["teacher"] for p in plans] == ["small", "swin"]
    assert [p["detections"] for p in plans] == [False, True]
    for plan in plans:
        assert (plan["images"], plan["views"], plan["rows"], plan["rows_to_compute"]) == (20, 2, 40, 40)
        assert sum(b["rows"] for b in plan["buckets"]) == 40
        assert sum(b["bytes"] for b in plan["buckets"]) == plan["bytes"]
        assert len(plan["buckets"]) >= 3
        # 128 x 96 float16: 16 channels of 12 x 16 at P3
        landscape = next(b for b in plan["buckets"] if b["name"] == "96x128")
        assert landscape["unit_rows"] == 4
        assert sum(plan["level_bytes"].values()) < plan["bytes"]
    assert not (tmp_path / "cache").exists()
    text = here("plan", file)
    assert text.returncode == 0
    assert "96x128" in text.stdout
    assert "20 images x 2 views = 40 rows, 40 to compute" in text.stdout
    assert "), no detections" in text.stdout
    assert "), and detections" in text.stdout
    assert text.stdout.count("note: the student's learning rate of 0.01 is for 16 samples a step") == 1


def test_a_fault_of_the_user_is_one_message_and_exit_code_1(data: Path, tmp_path: Path) -> None:
    content = models.recipe(data, tmp_path)
    content["stages"][0]["teacher"] = "nobody"
    result = mtpd("precompute", write(content, tmp_path))
    assert result.returncode == 1
    assert result.stderr.startswith(f"error: {tmp_path}/recipe.yaml: stages.1.teacher: 'nobody'")
    assert "Traceback" not in result.stderr + result.stdout


def test_a_stage_that_could_not_be_trained_is_refused_before_a_teacher_runs(
    data: Path, tmp_path: Path, here: Here
) -> None:
    content = models.recipe(data, tmp_path)
    content["student"]["cfg_options"]["custom_hooks"] = [{"type": "YOLOXModeSwitchHook"}]
    content["stages"] = [{"epochs": 1}, *content["stages"]]
    file = write(content, tmp_path)
    for command in ("plan", "precompute", "run"):
        result = here(command, file)
        assert result.returncode == 1
        assert "student.config: custom_hooks has a YOLOXModeSwitchHook" in result.stderr
    assert not (tmp_path / "cache").exists()


def test_a_detector_that_cannot_be_built_is_one_message(data: Path, tmp_path: Path, here: Here) -> None:
    for kind in ("student", "teachers.small"):
        content = models.recipe(data, tmp_path)
        spec = content["student"] if kind == "student" else content["teachers"]["small"]
        spec["cfg_options"]["model.bbox_head.loss_bbox.type"] = "NoSuchLoss"
        result = here("plan", write(content, tmp_path))
        assert result.returncode == 1
        assert (
            f"error: {kind}.config: mmdet cannot build its detector: KeyError: 'NoSuchLoss is not in" in result.stderr
        )


def test_wrong_usage_is_exit_code_2() -> None:
    assert mtpd("train").returncode == 2
    assert mtpd("nonsense").returncode == 2


def test_help_and_wrong_usage_do_not_wait_for_detectors_and_ray() -> None:
    code = "import sys; from services import cli; heavy = {'torch', 'mmdet', 'ray'} & set(sys.modules); assert not heavy, heavy"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_teacher_or_stage_that_does_not_exist(data: Path, tmp_path: Path, here: Here) -> None:
    file = write(models.recipe(data, tmp_path), tmp_path)
    result = here("plan", file, "--teacher", "nobody")
    assert result.returncode == 1
    assert "--teacher nobody: not in `teachers` (small, swin)" in result.stderr
    result = here("config", file, "--stage", "3")
    assert result.returncode == 1
    assert "has 2 stages" in result.stderr


def test_the_resolved_config_is_one_that_mmengine_reads(data: Path, tmp_path: Path, here: Here) -> None:
    from mmengine.config import Config

    result = here("config", write(models.recipe(data, tmp_path), tmp_path), "--stage", "1")
    assert result.returncode == 0, result.stderr
    (tmp_path / "stage.py").write_text(result.stdout)
    cfg = Config.fromfile(tmp_path / "stage.py")
    assert cfg.model.type == "Distiller"
    assert [t.type for t in cfg.train_dataloader.dataset.dataset.pipeline][-1] == "LoadTeacherTargets"


def test_a_plan_that_does_not_fit_the_disk_is_refused_unless_forced(data: Path, tmp_path: Path, monkeypatch) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(models.recipe(data, tmp_path)))
    monkeypatch.setattr(LocalStorage, "free_bytes", lambda _: 1000)
    refused = CliRunner().invoke(app, ["plan", str(file)])
    assert isinstance(refused.exception, BudgetError)
    assert "--force" in str(refused.exception)
    assert CliRunner().invoke(app, ["plan", str(file), "--force"]).exit_code == 0
    assert not (tmp_path / "cache").exists()


def test_a_cluster_that_does_not_answer_ends_in_one_message(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(models.recipe(data, tmp_path), tmp_path)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # taken, but nobody listens
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(RecipeError, match=f"RAY_ADDRESS: no Ray answers at {address}"):
            CliRunner().invoke(app, ["precompute", file], catch_exceptions=False)
        # of a Ray that was killed the address stays behind: that is no cluster to wait for
        monkeypatch.delenv("RAY_ADDRESS")
        monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
        (tmp_path / "ray").mkdir()
        (tmp_path / "ray" / "ray_current_cluster").write_text(address)
        with pytest.raises(ConnectionError, match=address):
            cluster._refuse_silent()
