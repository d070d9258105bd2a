"""The teacher service, and students that ask it, on a real Ray Serve with two CPUs."""

import json
import os
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import ray
import torch

from cache import (
    CorruptShardError,
    LeaseHeldError,
    LocalStorage,
    MissingRowsError,
    RecipeError,
    TeacherCache,
    repair,
    verify,
)
from services.serving import beside_training, service
from services.train import train
from tests import models
from tests.trainer import precompute
from trainer import Answer, Recipe, RowAsker, ask, counts, parse_recipe, service_url, teacher_info, train_stage

POISON = 4  # image whose file is no image


@pytest.fixture(scope="module", autouse=True)
def two_cpus() -> Iterator[None]:
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


def recipe_of(data: Path, folder: Path, on_missing: str, **cache: object) -> Recipe:
    content = models.recipe(data, folder)
    content["cache"] |= {"on_missing": on_missing, **cache}
    content["actors"], content["training"] = {"max": 1, "cpus": 1}, {"cpus": 1}
    return parse_recipe(content, "test")


@pytest.fixture(scope="module")
def address() -> str:
    """Where Serve listens; it has one address for all services of a cluster."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def test_training_from_an_empty_cache_has_its_rows_computed(data: Path, address: str, tmp_path: Path) -> None:
    recipe = recipe_of(data, tmp_path, "compute", service=address)
    with beside_training(recipe):
        train(recipe, [1], quiet=True)
    read = len(TeacherCache.open(recipe.cache.uri, "small"))
    assert 16 < read < 40  # the units of the rows that one epoch reads, and no others


def test_training_from_a_full_cache_starts_and_asks_no_service(data: Path, address: str, tmp_path: Path) -> None:
    recipe = recipe_of(data, tmp_path, "compute", service=address)
    for name in recipe.teachers:
        precompute.fill(recipe, name)
    with beside_training(recipe):
        assert counts(service_url(recipe)) is None
        assert train_stage(recipe, 1).teacher_forwards == 0


@pytest.fixture(scope="module")
def served(data: Path, address: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recipe]:
    """The running service of a recipe of which nothing is committed, and one of whose images is none."""
    root = tmp_path_factory.mktemp("served")
    shutil.copytree(data, root / "data")
    (root / "data" / "train" / f"{POISON:08d}.jpg").write_bytes(b"not an image")
    recipe = recipe_of(root / "data", root, "compute", service=address)
    with service(recipe, ["small"]):
        question = {"teacher": "small", "group": teacher_info(recipe, "small").name}
        assert ask(service_url(recipe), question).state == "committed"
        yield recipe


def put(recipe: Recipe, image_id: int, view: int) -> Answer:
    (group,) = Path(recipe.cache.uri).glob("small-*")
    question = {"teacher": "small", "group": group.name, "image_id": image_id, "view": view}
    while (answer := ask(service_url(recipe), question)).state == "pending":
        pass
    return answer


def did(recipe: Recipe) -> dict[str, int]:
    found = counts(service_url(recipe))
    assert found is not None
    return found["small"]


def rows(recipe: Recipe) -> list[tuple[int, int]]:
    images = json.loads(Path(recipe.dataset.train.ann_file).read_text())["images"]
    return [(image["id"], view) for image in images for view in (0, 1)]


def replicas() -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # one that is gone, or that an earlier cluster left as a zombie
            found += [process] if "teacher-small" in " ".join(process.cmdline()) else []
    return found


def test_fifty_who_ask_for_one_row_have_one_unit_computed(served: Recipe) -> None:
    assert replicas() == []  # none before the first miss
    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(lambda _: put(served, 7, 1), range(50)))
    assert {answer.state for answer in answers} == {"committed"}
    found = did(served)
    assert (found["units"], found["retried"]) == (1, 0)
    cache = TeacherCache.open(served.cache.uri, "small")
    assert len(cache) == found["computed"]
    assert (7, 1) in cache


def test_a_replica_killed_at_work_costs_no_row_and_a_poison_image_is_named(served: Recipe, tmp_path: Path) -> None:
    group = Path(served.cache.uri) / teacher_info(served, "small").name
    (replica,), before = replicas(), did(served)["asked"]
    replica.suspend()  # until all have asked, or it would be done before it is killed
    with ThreadPoolExecutor(80) as pool:
        asked = {key: pool.submit(put, served, *key) for key in rows(served)}
        while did(served)["asked"] < before + len(asked):
            time.sleep(0.01)
        replica.resume()
        time.sleep(0.05)
        os.kill(replica.pid, signal.SIGKILL)
        answers = {key: future.result() for key, future in asked.items()}
    poisoned = {key: answer for key, answer in answers.items() if key[0] == POISON}
    assert {answer.state for key, answer in answers.items() if key not in poisoned} == {"committed"}
    assert {answer.state for answer in poisoned.values()} == {"failed"}
    found = did(served)
    assert found["retried"] > 0
    assert (found["computed"], found["failed"]) == (38, 2)  # each row once
    cache = TeacherCache.open(served.cache.uri, "small")
    with pytest.raises(MissingRowsError, match=rf"image {POISON}, view 1 .*{POISON:08d}\.jpg: "):
        RowAsker(cache, service_url(served), print).wait(POISON, 1)
    # what the service computes is what a precompute computes
    other = served.model_copy(update={"cache": served.cache.model_copy(update={"uri": str(tmp_path / "cache")})})
    assert len(precompute.fill(other, "small")) == 2
    expected = TeacherCache.open(other.cache.uri, "small")
    assert sorted(cache) == sorted(expected)
    for key in expected:
        for level, values in expected[key].features.items():
            assert torch.equal(cache[key].features[level], values)
    # whoever is killed may leave a temporary file
    assert len(list(group.glob("*/P3/c/*/0/0/0"))) == did(served)["units"]
    assert not (group / "detections").exists(), "nothing wants them"


def test_a_lost_shard_heals(served: Recipe) -> None:
    cache, storage = TeacherCache.open(served.cache.uri, "small"), LocalStorage(Path(served.cache.uri))
    before, place = cache[9, 0].features["P3"].clone(), cache.index.find(9, 0)
    assert place is not None
    lost = Path(served.cache.uri) / cache.info.name / place.bucket / "P3" / "c" / str(place.row // 4) / "0" / "0" / "0"
    lost.unlink()
    cache = TeacherCache.open(served.cache.uri, "small")
    with pytest.raises(CorruptShardError):
        cache[9, 0]
    while True:
        try:
            repair(storage, verify(storage, cache.info))
            break
        except LeaseHeldError:  # the desk keeps it for some seconds
            time.sleep(0.2)
    cache.refresh()
    assert (9, 0) not in cache
    computed, asker = did(served)["computed"], RowAsker(cache, service_url(served), print)
    asker.wait(9, 0)
    assert torch.equal(cache[9, 0].features["P3"], before)
    assert 0 < did(served)["computed"] - computed <= 4


def test_images_that_are_new_in_the_annotation_file_are_computed(served: Recipe) -> None:
    assert put(served, 500, 0).state == "refused"
    file, folder = Path(served.dataset.train.ann_file), Path(served.dataset.train.img_dir)
    content = json.loads(file.read_text())
    like = next(image for image in content["images"] if image["id"] == 7)
    # before all others, so that a plan that counted anew would give their places away
    content["images"].insert(0, {**like, "id": 500, "file_name": "500.jpg"})
    shutil.copy(folder / like["file_name"], folder / "500.jpg")
    file.write_text(json.dumps(content))
    computed = did(served)["computed"]
    assert {put(served, 500, view).state for view in (0, 1)} == {"committed"}
    assert did(served)["computed"] == computed + 2
    cache = TeacherCache.open(served.cache.uri, "small")
    for view in (0, 1):
        for level, values in cache[7, view].features.items():
            assert torch.equal(cache[500, view].features[level], values)
    assert not verify(LocalStorage(Path(served.cache.uri)), cache.info).damages


def test_a_wrong_question_is_refused(served: Recipe) -> None:
    assert "no image 999 with a view 0" in put(served, 999, 0).reason
    assert "no image 7 with a view 2" in put(served, 7, 2).reason
    other = ask(service_url(served), {"teacher": "small", "group": "small-00000000", "image_id": 7, "view": 0})
    assert other.state == "refused"
    assert "not small-00000000" in other.reason
    assert ask(service_url(served), {"teacher": "swin", "group": "x"}).state == "refused"
    assert "not a question" in ask(service_url(served), {"image_id": 7}).reason


def test_a_service_that_nobody_starts_is_said_to_be_missing(data: Path, address: str, tmp_path: Path) -> None:
    full = recipe_of(data, tmp_path, "compute", service=address)
    cramped = full.model_copy(update={"training": full.training.model_copy(update={"cpus": 2})})
    with pytest.raises(RecipeError, match="no room for a teacher beside the training"), beside_training(cramped):
        pass
    with pytest.raises(MissingRowsError, match=r"does not answer .*mtpd serve RECIPE"):
        ask(service_url(full), {}, patience=0.5)
