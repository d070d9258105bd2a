"""The driver of a precompute where nothing is left to compute, which needs no Ray; and groups that several recipes share."""

from pathlib import Path

import pytest

from cache import open_storage, read_head
from services import maintain
from services.filling import FillResult
from services.precompute import fill, needed_teachers, show_failures, used_teachers
from tests import models
from tests.trainer import precompute
from trainer import Failure, parse_recipe, teacher_info


def crosskd(data: Path, folder: Path, **more: object) -> dict:
    content = models.recipe(data, folder, **more)
    content["stages"] = [{"teacher": "small", "mechanisms": [{"type": "CrossKDLoss"}], "epochs": 1}]
    return content


def test_a_full_group_gets_its_attributes_and_head_back(data: Path, tmp_path: Path) -> None:
    recipe = parse_recipe(crosskd(data, tmp_path), "test")
    precompute.fill(recipe, "small")
    info = teacher_info(recipe, "small")
    folder = Path(recipe.cache.uri) / info.name
    (folder / "head.safetensors").unlink()
    (folder / "zarr.json").write_text("{}")
    assert fill(recipe, "small").computed == 0
    assert read_head(open_storage(recipe.cache.uri), info)
    assert teacher_info(recipe, "small") == info


def test_a_finished_recipe_frees_its_own_group_and_none_that_only_serves_it(data: Path, tmp_path: Path) -> None:
    larger = parse_recipe(crosskd(data, tmp_path), "test")
    precompute.fill(larger, "small")
    content = models.recipe(data, tmp_path, work_dir=str(tmp_path / "smaller"))
    content["stages"] = [{"teacher": "small", "mechanisms": [{"type": "PKDLoss", "levels": ["P4"]}], "epochs": 1}]
    smaller = parse_recipe(content, "test")
    assert teacher_info(smaller, "small") == teacher_info(larger, "small")
    storage = open_storage(larger.cache.uri)
    for recipe in (larger, smaller):
        done = Path(recipe.work_dir) / "stage-1" / "result.json"
        done.parent.mkdir(parents=True)
        done.write_text("{}")
    reasons = [
        [g.reason for g in maintain.garbage(maintain.Target(storage, recipe), superseded=False, finished=True)]
        for recipe in (smaller, larger)
    ]
    assert reasons == [[], ["stage is done"]]


def test_teachers_of_trained_stages_alone_are_not_needed_any_more(data: Path, tmp_path: Path) -> None:
    content = models.recipe(data, tmp_path)
    content["stages"] = [*content["stages"], content["stages"][0]]
    recipe = parse_recipe(content, "test")
    assert needed_teachers(recipe) == used_teachers(recipe) == ["small", "swin"]
    trained = {}
    for stage, left in ((2, ["small"]), (1, ["small"]), (3, [])):
        trained[stage] = Path(recipe.work_dir) / f"stage-{stage}" / "result.json"
        trained[stage].parent.mkdir(parents=True)
        trained[stage].write_text("{}")
        assert needed_teachers(recipe) == left
    assert needed_teachers(recipe, [2]) == []
    trained[2].unlink()
    assert needed_teachers(recipe, [2]) == ["swin"]
    assert needed_teachers(recipe, [1, 3]) == []
    assert used_teachers(recipe) == ["small", "swin"]


def test_a_fault_that_every_row_has_is_not_put_on_the_images(capsys: pytest.CaptureFixture[str]) -> None:
    def shown(total: int, *reasons: str) -> str:
        failures = tuple(Failure(image, 0, f"{image}.jpg", reason) for image, reason in enumerate(reasons))
        show_failures(FillResult("small", "small-1", total, 0, failures, 0, 0, 1.0, 0.0))
        return capsys.readouterr().err

    common = shown(3, "ValueError: norm", "ValueError: norm", "ValueError: norm")
    assert "none of its 3 rows could be computed, each for the same reason: ValueError: norm. No image" in common
    for others in (shown(3, "cannot be read", "ValueError: norm", "ValueError: norm"), shown(9, "gone", "gone")):
        assert "of 3 images" in others or "of 2 images" in others
        assert "Mend or remove these images" in others
