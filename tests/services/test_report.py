"""The report of real runs: its numbers, what it says of missing parts, and what it lets through from names."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from mmdet.evaluation.functional import bbox_overlaps

from cache import RecipeError
from services.demo import cache_line
from services.precompute import FillResult
from services.records import keep_recipe, record_fill, record_use
from services.report import write_report
from services.runs import find_runs, read_run
from tests import models
from tests.services.pages import Page, charts, copy_run
from tests.trainer import precompute
from trainer import parse_recipe, take_pictures, teacher_info

DEMO = Path(__file__).parents[2] / "recipes" / "demo"
NONE = "\N{EN DASH}"


def result(folder: Path, stage: int) -> dict:
    return json.loads((folder / f"stage-{stage}" / "result.json").read_text())


def test_the_page_holds_the_numbers_of_the_results_and_fetches_nothing(made, tmp_path: Path) -> None:
    _, folder = made
    text = write_report(folder, out=tmp_path / "page.html", images=2).read_text()
    page = Page(text)
    assert page.links
    assert all(link.startswith(("data:image/", "#")) for link in page.links)
    # of all addresses there is only that of the recipe's service, as a word of the recipe
    assert re.findall(r"https?://[^\s<\"']*", re.sub(r"base64,[\w+/=]+", "", text)) == ["http://127.0.0.1:8000"]
    head = next(row for row in page.cells if row[:1] == ["stage"])
    for stage, teacher in ((1, "small"), (2, "swin")):
        metrics, row = result(folder, stage)["metrics"], next(r for r in page.cells if r[:2] == [str(stage), teacher])
        shown = dict(zip(head, row, strict=True))
        for column, metric in (("AP", "mAP"), ("AP50", "mAP_50"), ("AP-L", "mAP_l")):
            value = metrics.get(f"bbox_{metric}", 0.0 if metric == "mAP" else -1)
            assert shown[column] == (NONE if value < 0 else f"{100 * value:.1f}")
        assert shown["targets"] == str(result(folder, stage)["images"])
    # both stages' curves, in one chart a scalar: the losses of mechanisms too
    assert {"loss_PKDLoss", "loss_MGDLoss", "loss_cls", "lr"} <= set(re.findall(r'aria-label="(\w+)"', text))
    # 20 rows a teacher, of images that were seen in 2 stages of 2 epochs
    used = result(folder, 1)["images"] + result(folder, 2)["images"]
    assert "<dt>teacher forwards made</dt><dd>40<small>one an image, view and teacher</small></dd>" in text
    assert f"<dt>without the cache</dt><dd>{used}<" in text
    assert text.count("data:image/jpeg") == 2
    # of teacher and student P3 to P7 of both images
    assert text.count("data:image/png") == 2 * 2 * 5


def evaluated_on(run: Path, ann_file: Path, *, student: str = "RetinaNet", scale: tuple[int, int] = (128, 96)) -> None:
    """Let the records of a run say what it was evaluated on, and with whom."""
    recipe = json.loads((run / "recipe.json").read_text())
    recipe["dataset"]["val"]["ann_file"] = str(ann_file)
    (run / "recipe.json").write_text(json.dumps(recipe))
    for file in run.glob("stage-*/stage.json"):
        stage = json.loads(file.read_text())
        stage["model"]["student"]["type"] = student
        dataset = stage["val_dataloader"]["dataset"]
        dataset["ann_file"] = str(ann_file)
        dataset["metainfo"]["classes"] = [c["name"] for c in json.loads(ann_file.read_text())["categories"]]
        next(step for step in dataset["pipeline"] if step["type"] == "Resize")["scale"] = scale
        file.write_text(json.dumps(stage))


def test_runs_on_other_data_are_neither_drawn_together_nor_shown_these_pictures(made, tmp_path: Path) -> None:
    recipe, folder = made
    scenes, cells, copied = Path(recipe.dataset.val.ann_file), tmp_path / "cells.json", tmp_path / "copied.json"
    content = json.loads(scenes.read_text())
    copied.write_text(json.dumps(content | {"info": "the same images and objects"}, indent=1))
    for category, name in zip(content["categories"], "abcdef", strict=True):
        category["name"] = f"cell {name}"
    cells.write_text(json.dumps(content))
    work = tmp_path / "work"
    for name, ann_file in (("blood", cells), ("half", copied), ("whole", scenes)):
        shutil.copytree(folder, work / name)
        evaluated_on(work / name, ann_file, scale=(64, 48) if name == "half" else (128, 96))
    shutil.copytree(recipe.cache.uri, tmp_path / "other")
    file = work / "blood" / "recipe.json"
    file.write_text(file.read_text().replace(json.dumps(recipe.cache.uri), json.dumps(str(tmp_path / "other"))))
    text = write_report(work, images=1).read_text()
    page = Page(text)
    assert "3 runs on 2 val sets, student RetinaNet, ResNet-18." in page.words
    assert f"{cells} 6 classes: cell a, cell b, cell c, cell d, cell e, cell f" in page.words
    # a copy of the file is the same val set; that a student sees it smaller is said
    assert {"box AP of 2 runs: half, whole", "AP over the epochs of all stages"} <= charts(text).keys()
    assert "half within 64 x 48; whole within 128 x 96" in page.words
    assert [row[0] for row in page.cells if row[1:3] == ["1", "small"]] == ["blood", "half", "whole"]
    assert len([row for row in page.cells if row[:2] == ["run", "stage"]]) == 2
    assert f"No pictures of blood: evaluated on {cells}; the pictures are of {copied}." in page.words
    assert re.findall(r'aria-label="(\w+, stage \d)', text) == ["whole, stage 1", "whole, stage 2", "half, stage 2"]
    # groups of two caches are told apart
    assert "80 rows of 4 groups" in page.words
    groups = {row[1] for row in page.cells if row[0] == "small" and len(row) > 8}
    assert {Path(group).parent for group in groups} == {tmp_path / "other", Path(recipe.cache.uri)}
    assert f"No precompute of teacher swin ({tmp_path}/other/swin-" in page.words
    # a file that is gone is known by its path; students that differ are named with their runs alone
    cells.unlink()
    evaluated_on(work / "whole", scenes, student="FCOS")
    page = Page(write_report(work, images=0).read_text())
    assert "3 runs on 2 val sets." in page.words
    assert next(row[0] for row in page.cells if row[0].startswith("whole")) == "wholeFCOS, ResNet-18"


def test_evaluations_of_a_stage_are_joined_over_stages_in_epochs(made) -> None:
    _, folder = made
    run = read_run(folder)
    series = run.series("bbox_mAP")
    assert [epoch for epoch, _ in series] == [1, 2, 3, 4]
    assert [series[1][1], series[3][1]] == [
        pytest.approx(100 * result(folder, n)["metrics"]["bbox_mAP"]) for n in (1, 2)
    ]
    first, second = run.curve("loss")
    assert 0 < first[0][0] <= 1
    assert first[-1][0] <= 2 < second[0][0]


def test_a_resumed_stage_counts_once_what_it_did_twice(tmp_path: Path) -> None:
    def log(name: str, lines: list[str]) -> None:
        (tmp_path / "stage-1" / name / "vis_data").mkdir(parents=True)
        (tmp_path / "stage-1" / name / "vis_data" / "scalars.json").write_text("\n".join(lines))

    def training(step: int, loss: float) -> str:
        return json.dumps({"lr": 0.1, "loss": loss, "epoch": 1 + (step - 1) // 10, "iter": step, "step": step})

    killed = [*(training(step, 1.0) for step in (5, 10, 15)), '{"coco/bbox_mAP": 0.1, "step": 1}', '{"lr": 0.1, "lo']
    log("20260101_000000", killed)
    log("20260101_000100", [*(training(step, 2.0) for step in (13, 18, 20)), '{"coco/bbox_mAP": 0.3, "step": 2}'])
    (stage,) = read_run(tmp_path).stages
    assert [value for _, value in stage.curves["loss"]] == [1.0, 1.0, 2.0, 2.0, 2.0]
    assert stage.evaluations["bbox_mAP"] == ((1.0, 0.1), (2.0, 0.3))
    assert stage.result is None
    assert stage.begun


def test_missing_parts_are_named_and_the_rest_is_shown(made, tmp_path: Path) -> None:
    _, folder = made
    shutil.copytree(folder, tmp_path / "run")
    (tmp_path / "run" / "stage-2" / "result.json").unlink()
    content = json.loads((tmp_path / "run" / "recipe.json").read_text())
    content["cache"]["uri"] = str(tmp_path / "gone")
    (tmp_path / "run" / "recipe.json").write_text(json.dumps(content))
    for scalars in (tmp_path / "run" / "stage-1").glob("*/vis_data/scalars.json"):
        scalars.unlink()
    page = Page(write_report(tmp_path / "run", images=1).read_text())
    assert f"The cache {tmp_path}/gone holds nothing of small, swin" in page.words
    assert "Stage 2 (swin) was begun and is not done" in page.words
    assert "Stage 1 (small) has no training scalars" in page.words
    assert ["2", "swin", "MGDLoss", "2", "begun, not done"] in page.cells
    assert "student after stage 1 (small)" in page.words
    (tmp_path / "run" / "recipe.json").unlink()
    shutil.rmtree(tmp_path / "run" / "stage-2")
    page = Page(write_report(tmp_path / "run").read_text())
    assert "No recipe.json" in page.words
    assert "No pictures" in page.words
    (tmp_path / "empty").mkdir()
    with pytest.raises(RecipeError, match="holds no stage-N"):
        write_report(tmp_path / "empty")


def test_a_full_cache_is_not_empty_because_a_stage_was_not_begun_yet(made, tmp_path: Path) -> None:
    recipe, folder = made
    cache = recipe.cache.model_copy(update={"uri": str(tmp_path / "cache")})
    mine = recipe.model_copy(update={"cache": cache, "work_dir": str(tmp_path / "run")})
    shutil.copytree(recipe.cache.uri, cache.uri)
    shutil.rmtree(copy_run(folder, tmp_path / "run") / "stage-2")
    keep_recipe(mine)
    # another recipe's targets of both teachers lie in the same cache
    others = mine.model_copy(update={"cache": cache.model_copy(update={"precision": "int8"})})
    for name in recipe.teachers:
        assert not precompute.fill(others, name)

    def shown() -> list[list[str]]:
        page = Page(write_report(tmp_path / "run", images=0).read_text())
        assert "holds nothing" not in page.words
        return [[row[0], row[2], row[5]] for row in page.cells if row[0] in ("small", "swin") and len(row) > 8]

    # of the stage that was begun its own; of the other, of which nothing says whose it is, all that there is
    assert sorted(shown()) == [["small", "20", "float16"], ["swin", "20", "float16"], ["swin", "20", "int8"]]
    record_use(mine, teacher_info(mine, "swin"))
    assert shown() == [["small", "20", "float16"], ["swin", "20", "float16"]]
    (group,) = (path for path in (tmp_path / "cache").glob("swin-*") if path.name == teacher_info(mine, "swin").name)
    shutil.rmtree(group)
    page = Page(write_report(tmp_path / "run", images=0).read_text())
    assert f"The cache {tmp_path}/cache holds nothing of swin that these runs read" in page.words
    # without the group that the student was trained from nobody knows how many forwards that was
    (group,) = (path for path in (tmp_path / "cache").glob("small-*") if path.name == teacher_info(mine, "small").name)
    shutil.rmtree(group)
    shutil.copytree(
        Path(recipe.cache.uri) / teacher_info(mine, "swin").name, tmp_path / "cache" / teacher_info(mine, "swin").name
    )
    text = write_report(tmp_path / "run", images=0).read_text()
    assert "<dt>teacher forwards made</dt><dd>unknown<" in text
    assert "<dt>saved</dt>" not in text


def test_several_runs_a_study_and_an_order_with_names_that_are_markup(made, tmp_path: Path) -> None:
    _, folder = made
    name = "<blink>\"&'"
    for arm in ("alone", name):
        shutil.copytree(folder, tmp_path / "work" / arm, ignore=shutil.ignore_patterns("*.pth"))
    costs = {"student": {name: 0.25, "b": 0.7125}, name: {"student": 0.5, "b": 0.6}, "b": {"student": 0.4, name: 0.3}}
    order = {
        "costs": costs,
        "aps": {name: 12.34, "b": 30.0},
        "sequence": ["b"],
        "reasons": {name: "<blink>", "b": "best"},
    }
    (tmp_path / "work" / "alone" / "order.json").write_text(json.dumps(order))
    arms = {f"{name}-0": {"mAP": 10.0}, f"{name}-1": {"mAP": 14.0}, "other-0": {"mAP": 9.5}, "killed-0": {}}
    (tmp_path / "study.json").write_text(json.dumps({name: {"settings": {"epochs": name}, "arms": arms}}))
    page = Page(write_report(tmp_path / "work", study=tmp_path / "study.json", images=0).read_text())
    assert "blink" not in page.tags
    assert page.words.count(name) >= 5
    assert ["student", NONE, "0.250", "0.713"] in page.cells
    assert [name, "0.500", NONE, "0.600"] in page.cells
    assert [name, "12.3", NONE, "<blink>"] in page.cells
    assert any(row[:4] == [name, "2", "12.00", "2.83"] for row in page.cells)
    assert any(row[:4] == ["other", "1", "9.50", NONE] for row in page.cells)
    (tmp_path / "study.json").write_text('{"arms": {}}')
    with pytest.raises(RecipeError, match="not a file of results"):
        write_report(tmp_path / "work", study=tmp_path / "study.json", images=0)


def test_a_run_whose_order_was_interrupted_has_no_order_yet(made, tmp_path: Path) -> None:
    _, folder = made
    shutil.copytree(folder, tmp_path / "run", ignore=shutil.ignore_patterns("*.pth"))
    file = tmp_path / "run" / "order.json"
    file.write_text('{"evaluated": {"0123-4567": 12.5}}')  # after the first teacher's evaluation
    assert [run.order for run in find_runs(tmp_path / "run")] == [None]
    file.write_text('{"evaluated": {}, "costs": {}}')
    with pytest.raises(RecipeError, match="Delete the damaged file"):
        find_runs(tmp_path / "run")


def test_records_of_precomputes_accumulate_and_a_recipe_with_credentials_is_not_written(made, tmp_path: Path) -> None:
    recipe, folder = made
    mine = recipe.model_copy(update={"work_dir": str(tmp_path / "run")})
    shutil.copytree(folder, tmp_path / "run", ignore=shutil.ignore_patterns("*.pth"))
    group = next(path.name for path in Path(recipe.cache.uri).iterdir() if path.name.startswith("small-"))
    for computed, seconds, share in ((15, 10.0, 1.0), (9, 12.0, 0.5), (0, 1.0, 0.0)):
        record_fill(mine, FillResult("small", group, 20, computed, (), 100, 1000, seconds, share))
    text = write_report(tmp_path / "run", images=0).read_text()
    # four rows were computed twice: 24 forwards, and 20 of the other teacher, of which nothing is recorded
    assert "<dt>teacher forwards made</dt><dd>44<" in text
    assert ["small", "24", "0", "22.0 s", "1.1", "72.7 %", "200 B", "2"] in Page(text).cells
    assert "No precompute of teacher swin is recorded" in text
    secret = mine.cache.model_copy(update={"uri": "s3://key:geheim@bucket/prefix"})
    with pytest.raises(RecipeError, match="holds credentials"):
        keep_recipe(mine.model_copy(update={"cache": secret, "work_dir": str(tmp_path / "new")}))
    assert not (tmp_path / "new").exists()


def test_the_demo_says_of_its_cache_what_the_report_does(made, tmp_path: Path) -> None:
    recipe, folder = made
    groups = [teacher_info(recipe, name).name for name in recipe.teachers]
    fills = [FillResult(group[:-9], group, 20, 20, (), 1000, 1000, 1.0, 1.0) for group in groups]
    page = Page(write_report(folder, out=tmp_path / "page.html", images=0).read_text())
    shown = re.search(r"cache on disk([\d.]+ [kM]B)40 rows of 2 teachers", page.words)
    assert shown
    assert f"2.00 kB of shards, {shown[1]} on disk" in cache_line(fills, recipe.cache.uri)


def test_a_teachers_boxes_lie_on_the_objects_of_the_image_as_it_is_stored(data: Path, tmp_path: Path) -> None:
    content = models.recipe(data, tmp_path, stages=[{"epochs": 1}])
    content["views"]["scale"] = [
        192,
        144,
    ]  # what the demo's teacher was trained on; images are larger and of four shapes
    config, checkpoint = DEMO / "retinanet_swin_w32.py", DEMO / "swin_w32.pth"
    content["teachers"] = {"swin": {"config": str(config), "checkpoint": str(checkpoint)}}
    taken = take_pictures(parse_recipe(content, "test"), "swin", {}, 6)
    best = []
    for picture in taken.images:
        assert (picture.width, picture.height) in {(256, 192), (192, 256), (224, 224), (288, 160)}
        found = np.array([seen.box for seen in picture.sights["swin"].objects], np.float32).reshape(-1, 4)
        truth = np.array([seen.box for seen in picture.truth], np.float32)
        best += bbox_overlaps(found, truth).max(axis=1).tolist()
        energy = picture.sights["swin"].energy
        assert list(energy) == ["P3", "P4", "P5", "P6", "P7"]
        assert all(1 <= share < 2 for share in energy["P3"].share)
    assert len(best) > 5
    assert np.median(best) > 0.6  # in the pixels of the view it would be near 0.3
