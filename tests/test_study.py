"""The study's arms are what their names say, at equal epochs; its statistics; and what is done is not trained again."""

import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import study
from benchmarks.arms import by_seed, interval, load, paired, read, record, train, verdict
from benchmarks.study_arms import Arm, described, grid
from benchmarks.study_arms import arms as arms_of
from benchmarks.study_settings import SETTINGS, Detector, Setting
from benchmarks.study_summary import MARK, section, summarise


@pytest.fixture
def setting() -> Setting:
    """Both teachers with checkpoints, so that nothing has to be trained."""
    demo = "recipes/demo"
    weak = Detector(f"{demo}/retinanet_r18_w20.py", checkpoint=f"{demo}/r18_w20.pth")
    strong = Detector(f"{demo}/retinanet_swin_w32.py", checkpoint=f"{demo}/swin_w32.pth")
    teachers = {"r18": weak, "swin": strong}
    return replace(SETTINGS["scenes"], teachers=teachers, images=6, teacher_images=8, val_images=2, epochs=3)


def test_arms_are_recipes_of_equal_epochs(setting: Setting, tmp_path: Path):
    root = tmp_path / "scenes" / "study"
    study.prepare(setting, root, None)
    (root / "arms" / "alone-0" / "stage-1").mkdir(parents=True)
    (root / "arms" / "alone-0" / "stage-1" / "student.pth").touch()
    every = {**arms_of(setting), **grid(setting)}
    recipes = {name: study.recipe_of(setting, root, name, arm, 0) for name, arm in every.items()}
    assert {sum(stage.epochs for stage in recipe.stages) for recipe in recipes.values()} == {setting.epochs}
    assert [stage.teacher for stage in recipes["progressive"].stages] == ["r18", "swin"]
    assert [stage.teacher for stage in recipes["reversed"].stages] == ["swin", "r18"]
    assert [stage.teachers for stage in recipes["ensemble"].stages] == [("r18", "swin")]
    starts = {name: recipe.student.checkpoint for name, recipe in recipes.items()}
    assert starts["progressive"] == starts["direct"] == starts["inherited"] != starts["alone"]
    assert {stage.mechanisms[0]["loss_weight"] for stage in recipes["tune PKD 0.5"].stages} == {0.5}


def test_statistics_are_paired_by_seed():
    arms = {"a-0": {"mAP": 1.0}, "a-1": {"mAP": 4.0}, "a-2": {"mAP": 7.0}, "b-1": {"mAP": 3.0}, "b-2": {"mAP": 4.0}}
    assert by_seed(arms, "a") == {0: 1.0, 1: 4.0, 2: 7.0}
    assert paired(arms, "a", "b") == [1.0, 3.0]
    # t(0.975, 2) = 4.3027, deviation 3, n 3
    assert interval([1.0, 4.0, 7.0]) == pytest.approx((4 - 4.3027 * 3**0.5, 4 + 4.3027 * 3**0.5), abs=1e-3)


def test_done_arms_are_kept_and_others_refused(setting: Setting, tmp_path: Path):
    file, arms, settings = tmp_path / "study.json", arms_of(setting), asdict(setting)
    result = {"mAP": 10.0, "stages": [10.0], "seconds": 60.0}
    for seed, reached in ((0, 10.0), (1, 11.0), (2, 12.0)):
        for name, gain in (("inherited", 0.0), ("direct", 2.0 + seed)):
            arm = {**result, "mAP": reached + gain, "arm": described(arms[name])}
            record(file, "s", settings, f"{name}-{seed}", arm)
    todo = [(name, arms[name], seed) for name in ("direct", "progressive") for seed in (0, 1)]
    done = load(file, "s", settings)
    assert [(name, seed) for name, _, seed in study.missing(todo, done)] == [("progressive", 0), ("progressive", 1)]
    with pytest.raises(SystemExit, match="direct-0 was trained as"):
        study.missing([("direct", replace(arms["direct"], weight=99.0), 0)], done)
    with pytest.raises(SystemExit, match="epochs: 3, not 4"):
        load(file, "s", {**settings, "epochs": 4})
    # 2, 3 and 4 AP more: half-width 4.3027 / sqrt(3)
    assert any("direct vs inherited (+3.0 [+0.5, +5.5], n = 3)" in line for line in section("s", {"arms": done}))
    (tmp_path / "study.md").write_text(f"by hand\n{MARK}\nold")
    summarise(file)
    text = (tmp_path / "study.md").read_text()
    assert text.startswith(f"by hand\n{MARK}\n\n## s")
    assert "old" not in text
    assert (tmp_path / "study.png").stat().st_size > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU that is only claimed here is there")
def test_caches_are_filled_on_the_gpu(setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    root = tmp_path / "scenes" / "study"
    study.prepare(setting, root, None)
    recipe = study.recipe_of(setting, root, "direct", Arm((("r18", 3),)), 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises((AssertionError, RuntimeError), match=r"CUDA|NVIDIA"):
        train(recipe, "cache")
    assert not list((root / "cache").rglob("manifest*")), "filled on the CPU"


@pytest.fixture
def logs() -> Iterator[None]:
    """As they were: a worker of the study turns them down."""
    yield
    logging.disable(logging.NOTSET)


def test_an_arm_s_ap_is_not_rounded(setting: Setting, tmp_path: Path, logs: None):
    """A student that has learned already and all but stands still, for its AP must not be 0."""
    student = replace(setting.teachers["r18"], options={"optim_wrapper.optimizer.lr": 1e-9})
    setting = replace(setting, student=student, images=4, val_images=12, epochs=1)
    root, file, inherited = tmp_path / "scenes" / "study", tmp_path / "study.json", Arm(((None, 1),))
    study.prepare(setting, root, None)
    start = root / "starts" / "inherited-0.pth"
    start.parent.mkdir()
    shutil.copy(student.checkpoint or "", start)
    study.work("s", setting, root, file, [("inherited", inherited, 0)])
    result = read(file)["s"]["arms"]["inherited-0"]
    measured = json.loads((root / "arms" / "inherited-0" / "stage-1" / "result.json").read_text())["metrics"]
    for name in ("mAP", "mAP_50"):
        assert result[name] == pytest.approx(100 * measured[f"bbox_{name}"], abs=0.0501)
    assert result["mAP"] > 1
    assert abs(result["mAP"] - round(result["mAP"], 1)) > 1e-6
    assert result["rounded"] is False


def test_no_verdict_where_only_rounding_is_seen(setting: Setting):
    def done(**more: Any) -> dict[str, Any]:
        arms, found = arms_of(setting), {}
        for seed, reached in ((0, 8.6), (1, 8.4), (2, 9.9)):
            for name, gain in (("alone", 0.0), ("inherited", 2.2)):
                result = {"mAP": reached + gain, "stages": [reached + gain], "seconds": 60.0, **more}
                found[f"{name}-{seed}"] = result | {"arm": described(arms[name])}
        return found

    def row(lines: list[str]) -> str:
        return next(line for line in lines if line.startswith("| inherited vs alone"))

    lines = section("s", {"arms": done()})
    assert row(lines).endswith("| 2.20 ± 0.00 | 3 | - | below rounding |")
    assert not any("Significant" in line for line in lines)
    assert sum("share the images, the val set" in line for line in lines) == 1
    assert row(section("s", {"arms": done(rounded=False)})).endswith("**significant** |")
    assert verdict([0.1, 0.1], {"mAP": 1.0}) == ("-", "below rounding")
    assert verdict([0.1, 0.1], {"mAP": 1.0, "rounded": False})[1] == "BEYOND the noise"
