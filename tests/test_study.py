"""The study's arms are what their names say, at equal epochs; its statistics; what is done is not trained again; what is
not the study's does not join it; and what the command line cannot have is told in a line."""

import json
import logging
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from benchmarks import study
from benchmarks.arms import by_seed, interval, load, lock, paired, read, record, train, verdict
from benchmarks.study_arms import Arm, described, grid
from benchmarks.study_arms import arms as arms_of
from benchmarks.study_data import prepare, study_folder
from benchmarks.study_options import chosen_arms
from benchmarks.study_settings import SETTINGS, Detector, Setting, on_gpu
from benchmarks.study_summary import MARK, section, summarise
from trainer import generate
from trainer.checkpoint import sha256


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
    prepare(setting, root, None)
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
    assert text.startswith(f"by hand\n{MARK}\n\nArms that carry no digest of their teachers, start and images")
    assert text.count(": 6 of 6 in `s`.\n\n## s\n") == 1
    assert "old" not in text
    assert (tmp_path / "study.png").stat().st_size > 0


@pytest.fixture
def logs() -> Iterator[None]:
    """As they were: a worker of the study turns them down."""
    yield
    logging.disable(logging.NOTSET)


def test_an_arm_says_what_it_came_of_and_its_ap_is_not_rounded(setting: Setting, tmp_path: Path, logs: None):
    """A student that has learned already and all but stands still, for its AP must not be 0."""
    student = replace(setting.teachers["r18"], options={"optim_wrapper.optimizer.lr": 1e-9})
    setting = replace(setting, student=student, images=4, val_images=12, epochs=1)
    root, file, inherited = tmp_path / "scenes" / "study", tmp_path / "study.json", Arm(((None, 1),))
    prepare(setting, root, None)
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
    found = result["origin"]
    assert (found["start"], found["train"], found["teachers"]) == (sha256(start), sha256(root / "train.json"), {})
    # the same study in a folder with another teacher of that name, other images, another start
    content = read(file)
    done = content["s"]["arms"]
    done["direct-1"] = result | {"origin": {**found, "start": "of another seed", "teachers": {"swin": "other bytes"}}}
    file.write_text(json.dumps(content))
    with pytest.raises(
        SystemExit, match="teacher swin is another checkpoint for direct-0 than it was for direct-1: choose"
    ):
        study.work("s", setting, root, file, [("direct", Arm((("swin", 1),)), 0)])
    done["direct-1"] = result | {"origin": {**found, "val": "other bytes"}}
    file.write_text(json.dumps(content))
    with pytest.raises(SystemExit, match="the val images are others for alone-0 than they were for direct-1"):
        study.work("s", setting, root, file, [("alone", replace(inherited, start="random"), 0)])
    with pytest.raises(SystemExit, match=r"s: the val images are others for direct-1 .* take one of them out"):
        summarise(file)
    done["direct-0"] = result | {"origin": {**found, "start": "other bytes"}}
    del done["direct-1"]
    file.write_text(json.dumps(content))
    with pytest.raises(
        SystemExit, match="the start inherited is another checkpoint for direct-0 than it was for inherited-0"
    ):
        summarise(file)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU that is only claimed here is there")
def test_caches_are_filled_on_the_gpu(setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    root = tmp_path / "scenes" / "study"
    prepare(setting, root, None)
    recipe = study.recipe_of(setting, root, "direct", Arm((("r18", 3),)), 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises((AssertionError, RuntimeError), match=r"CUDA|NVIDIA"):
        train(recipe, "cache")
    assert not list((root / "cache").rglob("manifest*")), "filled on the CPU"


def test_real_images_are_as_many_as_the_study_says(setting: Setting, tmp_path: Path):
    for split, count in (("train", 3), ("val", 2)):
        generate(tmp_path / "bccd", split, count, seed=0)
    (tmp_path / "bccd" / "images").mkdir()
    setting = replace(setting, data="bccd", images=2, teacher_images=3)
    with pytest.raises(SystemExit, match=r"val\.json holds 2 images, the setting says 4"):
        prepare(replace(setting, val_images=4), tmp_path / "a" / "study", tmp_path)
    with pytest.raises(SystemExit, match=r"pool\.json holds 3 images, the setting says 5"):
        prepare(replace(setting, images=5), tmp_path / "b" / "study", tmp_path)
    prepare(setting, tmp_path / "c" / "study", tmp_path)
    assert len(json.loads((tmp_path / "c" / "study" / "train.json").read_text())["images"]) == 2


def test_a_gpu_changes_no_counts_of_real_images_and_enlarges_none(tmp_path: Path):
    for name, scale in (("bccd", (512, 384)), ("nuclei", (256, 256)), ("robocup", (400, 304))):
        cpu, gpu = SETTINGS[name], on_gpu(SETTINGS[name])
        for key in ("images", "teacher_images", "val_images", "epochs"):
            assert getattr(gpu, key) == getattr(cpu, key)
        assert gpu.scale == scale
        assert gpu.teachers != cpu.teachers
    setting = replace(on_gpu(SETTINGS["scenes"]), images=6, teacher_images=8, val_images=2)
    prepare(setting, tmp_path / "study", None)
    for file in ("study/train.json", "data/annotations/val.json"):
        for image in json.loads((tmp_path / file).read_text())["images"]:
            long, short = sorted((image["width"], image["height"]), reverse=True)
            assert min(setting.scale[0] / long, setting.scale[1] / short) <= 1


def test_another_setting_has_another_folder(setting: Setting, tmp_path: Path):
    def found(**other: Any) -> Path:
        return study_folder(tmp_path, "scenes gpu", replace(setting, **other))

    teachers = {**setting.teachers, "swin": replace(setting.teachers["swin"], options={"model.train_cfg": None})}
    others = [{"teachers": teachers}, {"scale": (96, 72)}, {"teacher_images": 9}, {"val_images": 3}, {"data": "bccd"}]
    assert len({found().parent, *(found(**other).parent for other in others)}) == 6
    # data and teachers serve students of any number of images and epochs
    assert found(images=5, epochs=2).parent == found().parent
    assert found(images=5, epochs=2).name == "5-images-2-epochs"


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
    assert row(lines).endswith("| 2.20 ± 0.00 | 3 | - | spread below rounding |")
    assert not any("Significant" in line for line in lines)
    assert sum("share the images, the val set" in line for line in lines) == 1
    assert row(section("s", {"arms": done(rounded=False)})).endswith("**significant** |")
    assert verdict([0.1, 0.1], {"mAP": 1.0}) == ("-", "spread below rounding")
    assert verdict([0.1, 0.1], {"mAP": 1.0, "rounded": False})[1] == "BEYOND the noise"


def test_a_worker_waits_for_the_arm_whose_student_it_starts_from(setting: Setting, tmp_path: Path):
    student = tmp_path / "arms" / "alone-0" / "stage-1" / "student.pth"
    with ThreadPoolExecutor(1) as pool:
        with lock(tmp_path / "locks" / "alone-0"):
            found = pool.submit(study.start, setting, tmp_path, "trained", 0)
            assert not wait([found], timeout=0.2).done
            student.parent.mkdir(parents=True)
            student.touch()
        assert found.result(timeout=30) == student
    with pytest.raises(SystemExit, match="the arm alone-1 was not trained"):
        study.start(setting, tmp_path, "trained", 1)


def test_the_published_arms_are_not_trained_again():
    """Of the settings and arms as they are now."""
    setting = SETTINGS["scenes"]
    done = load(Path("docs/study.json"), "scenes, 200 images, 24 epochs", asdict(setting))
    every = arms_of(setting)
    todo = [(name, every[name], seed) for name in ("alone", "direct", "ensemble", "direct, CWD") for seed in (0, 1, 2)]
    assert study.missing(todo, done) == []


def test_arms_that_start_from_another_s_student_come_last(setting: Setting):
    assert chosen_arms("trained, direct; alone; direct;", arms_of(setting), []) == [
        "alone",
        "direct",
        "trained, direct",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--setting", "foo"], "--setting: there is no 'foo'; there are scenes, bccd, nuclei, robocup"),
        (["--seeds", "a"], "--seeds: 'a' is no list of whole numbers"),
        (["--seeds", ""], "--seeds: '' is no list of whole numbers"),
        (["--only", "once"], "--only: no arm once; there are alone; "),
        (["--epochs", "1", "--only", "twice"], "--epochs: 1 are too few for the 2 stages of twice; give 2 at least"),
        (["--images", "3000"], "--images: 3000 are more than the 2400 of scenes"),
        (["--setting", "bccd", "--gpu", "--images", "3000"], "--images: 3000 are more than the 292 of bccd"),
        (
            ["--only", "trained, direct"],
            "--only: trained, direct-0 starts from the student of alone-0, which is not trained",
        ),
        (["--setting", "bccd"], "--data: give the folder that holds bccd"),
        (
            ["--setting", "bccd", "--data", "docs"],
            "--data: the setting bccd reads docs/bccd/images, which is not there",
        ),
        (["--summary"], "--json: there is no "),
    ],
)
def test_wrong_usage_is_told_in_a_line(tmp_path: Path, arguments: list[str], message: str, logs: None):
    app = typer.Typer()
    app.command()(study.main)
    file = tmp_path / "study.json"
    result = CliRunner().invoke(app, ["--json", str(file), "--dir", str(tmp_path / "work"), *arguments])
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {message}")
    assert result.stderr.count("\n") == 1
    assert not list(tmp_path.glob("study.*"))
