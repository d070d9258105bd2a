"""verify and gc, as the command line uses them, on a cache alone and on a recipe."""

import os
import shutil
import time
from pathlib import Path

import pytest
import ray
import yaml
from typer.testing import CliRunner

from cache import CorruptShardError, Lease, LocalStorage, MtpdError, RecipeError, TeacherCache
from services.cli import app
from tests import models
from tests.cache import make
from tests.cache.fixtures.write import HERE
from tests.trainer import precompute
from trainer import STUDENT, choose_rows, load_recipe, parse_recipe, stage_dir, with_candidates

GROUP = make.info()


def run(*arguments: str) -> tuple[int, str, MtpdError | None]:
    """Exit code, output, and the error that `main` would print."""
    result = CliRunner().invoke(app, list(arguments))
    error = result.exception if isinstance(result.exception, MtpdError) else None
    return result.exit_code, result.output, error


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    storage = LocalStorage(tmp_path / "cache")
    make.fill(storage, GROUP, make.images(6))
    return storage


def damage(storage: LocalStorage) -> None:
    file = storage.root / GROUP.name / "64x64" / "P3" / "c" / "1" / "0" / "0" / "0"
    file.write_bytes(b"\0" + file.read_bytes()[1:])


def test_verify_names_the_damage_and_the_repair_then_repairs(storage: LocalStorage) -> None:
    uri = str(storage.root)
    code, output, error = run("verify", uri)
    assert code == 0
    assert "12 rows in 3 units" in output
    damage(storage)
    code, output, error = run("verify", uri)
    assert isinstance(error, CorruptShardError)
    assert f"mtpd verify {uri} --repair" in str(error)
    code, output, error = run("verify", uri, "--repair")
    assert code == 0
    assert "1 damaged unit taken out of the manifest" in output
    assert len(TeacherCache.open(uri, "t")) == 8
    assert run("verify", uri)[0] == 0


def test_a_repair_computes_again_and_fails_where_an_image_is_gone(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "data")
    content = models.recipe(tmp_path / "data", tmp_path)
    content["stages"], content["actors"] = content["stages"][:1], {"max": 1, "cpus": 1}
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(content))
    recipe = load_recipe(file)
    precompute.fill(recipe, "small")
    before = TeacherCache.open(recipe.cache.uri, "small")
    shard = next((Path(recipe.cache.uri) / before.info.name).glob("*/P3/c/0/0/0/0"))
    shard.write_bytes(b"\0" + shard.read_bytes()[1:])
    bucket = shard.parents[5].name
    gone = next(
        key for key in before if (place := before.index.find(*key)) and (place.bucket, place.row) == (bucket, 0)
    )
    name = f"{gone[0]:08d}.jpg"
    (tmp_path / "data" / "train" / name).unlink()
    ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        code, output, error = run("verify", str(file), "--repair")
    finally:
        ray.shutdown()
    assert (code, error) == (1, None)
    assert name in output
    after = TeacherCache.open(recipe.cache.uri, "small")
    lost = set(before) - set(after)
    assert gone in lost
    assert {image for image, _ in lost} == {gone[0]}  # the rest of the unit was computed again


def test_gc_lists_first_removes_on_demand_and_leaves_a_running_writer_alone(storage: LocalStorage) -> None:
    folder = storage.root / GROUP.name
    (folder / "manifest" / "part-64x64-000001.parquet").unlink()
    old = folder / "64x64" / "P3" / ".x.tmp"
    old.write_bytes(b"killed")
    os.utime(old, (time.time() - 10_000, time.time() - 10_000))
    fresh = old.with_name(".y.tmp")
    fresh.write_bytes(b"being written")
    before = {file for file in folder.rglob("*") if file.is_file()}
    code, output, _ = run("gc", str(storage.root))
    assert code == 0
    assert "not committed" in output
    assert "temporary file" in output
    assert {file for file in folder.rglob("*") if file.is_file()} == before
    with Lease(storage, GROUP.name):
        assert "left alone" in run("gc", str(storage.root), "--delete")[1]
        assert before <= {file for file in folder.rglob("*") if file.is_file()}
    assert run("gc", str(storage.root), "--delete")[0] == 0
    gone = before - {file for file in folder.rglob("*") if file.is_file()}
    assert old in gone
    assert len(gone) == 1 + 4 + 1  # the temporary file, a unit's shards and its detections
    assert fresh.exists()
    cache = TeacherCache.open(str(storage.root), "t")
    assert all(cache[key].features for key in cache)
    assert len(cache) == 8
    assert "nothing to remove" in run("gc", str(storage.root))[1]


def test_whole_groups_go_only_when_the_recipe_is_done_with_them(data: Path, tmp_path: Path) -> None:
    content = models.recipe(data, tmp_path)
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(content))
    recipe = load_recipe(file)
    precompute.fill(recipe, "small")
    content["cache"]["precision"] = "int8"
    file.write_text(yaml.safe_dump(content))
    recipe = load_recipe(file)
    precompute.fill(recipe, "small")
    assert len(list((tmp_path / "cache").glob("small-*"))) == 2
    assert "superseded" not in run("gc", str(file))[1]
    assert "superseded" in run("gc", str(file), "--superseded", "--delete")[1]
    assert len(list((tmp_path / "cache").glob("small-*"))) == 1
    assert len(TeacherCache.open(recipe.cache.uri, "small")) == 40  # that of the recipe is what is left
    assert "stage is done" not in run("gc", str(file), "--finished")[1]
    stage_dir(recipe, 1).mkdir(parents=True)
    (stage_dir(recipe, 1) / "result.json").write_text("{}")
    assert run("gc", str(file), "--finished", "--delete")[0] == 0
    assert not list((tmp_path / "cache").glob("small-*"))
    with pytest.raises(RecipeError, match=r"gc RECIPE\.yaml"):
        raise run("gc", str(tmp_path / "cache"), "--finished")[2] or AssertionError


@pytest.mark.parametrize("change", ["half scale", "no teachers", "a teacher of that name", "no checkpoint"])
def test_the_students_group_stops_no_gc_of_a_recipe_that_has_no_order(data: Path, tmp_path: Path, change: str) -> None:
    content = models.recipe(data, tmp_path)
    content["student"]["checkpoint"] = str(models.checkpoint("retinanet-r18", data, seed=1))
    candidates = with_candidates(parse_recipe(content, "test"))
    precompute.fill(candidates, STUDENT, choose_rows(range(1, 21), 2, 4))
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(content))
    assert "superseded" not in run("gc", str(file), "--superseded")[1]
    if change == "half scale":
        content["student"]["input_scale"] = 0.5
    elif change == "no teachers":
        content |= {"teachers": {}, "stages": [{"epochs": 1}]}
    elif change == "no checkpoint":
        del content["student"]["checkpoint"]
    else:
        content["teachers"][STUDENT] = content["teachers"].pop("swin")
        content["stages"][1]["teacher"] = STUDENT
    file.write_text(yaml.safe_dump(content))
    code, output, error = run("gc", str(file))
    assert (code, error) == (0, None)
    assert "superseded" not in output
    code, output, error = run("gc", str(file), "--superseded")
    assert (code, error) == (0, None)
    assert "superseded" in output  # the one group that there is


def test_groups_of_format_version_1_are_left_alone(tmp_path: Path) -> None:
    shutil.copytree(HERE / "v1", tmp_path / "cache")
    code, output, error = run("verify", str(tmp_path / "cache"))
    assert (code, error) == (0, None)
    assert "not verified" in output
    code, output, error = run("gc", str(tmp_path / "cache"), "--delete")
    assert (code, error) == (0, None)
    assert "left alone" in output
    assert len(TeacherCache.open(str(tmp_path / "cache"), "eight")) == 6


def test_what_needs_a_recipe_or_is_nowhere_says_so(storage: LocalStorage, tmp_path: Path) -> None:
    assert "needs the recipe" in str(run("verify", str(storage.root), "--sample", "3")[2])
    assert "no such folder" in str(run("verify", str(tmp_path / "nowhere"))[2])
