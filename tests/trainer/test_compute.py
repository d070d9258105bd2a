"""A unit's targets: what a live teacher gives on the pixels that ApplyView makes, and bad images apart."""

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from cache import TeacherCache
from tests import models
from tests.trainer import precompute
from trainer import ApplyView, Teacher, TeacherSpec, parse_recipe
from trainer.checkpoint import read_weights


def test_the_cache_holds_what_the_live_teacher_gives_for_every_view(data: Path, tmp_path: Path) -> None:
    content = models.recipe(data, tmp_path)
    content["teachers"]["swin"]["detections"] = True
    recipe = parse_recipe(content, "test")
    assert precompute.fill(recipe, "swin") == []
    cache = TeacherCache.open(recipe.cache.uri, "swin")
    teacher = Teacher(recipe.teachers["swin"], "swin")
    entries = json.loads(Path(recipe.dataset.train.ann_file).read_text())["images"]
    assert len(cache) == 2 * len(entries)
    for entry in entries[:6]:
        image = cv2.imread(f"{recipe.dataset.train.img_dir}/{entry['file_name']}")
        for view in (0, 1):
            made = ApplyView([[128, 96]])(
                {"img": image, "img_shape": image.shape[:2], "ori_shape": image.shape[:2], "view": view}
            )
            pixels = torch.from_numpy(np.ascontiguousarray(made["img"].transpose(2, 0, 1)))
            live = teacher([pixels])
            cached = cache[entry["id"], view]
            for level, maps in live.features.items():
                assert torch.equal(cached.features[level], maps[0].half())
            assert np.array_equal(cached.detections.boxes, live.detections[0].boxes)
        # the control: a mirrored map is not the map of the mirrored image
        mirrored = cache[entry["id"], 0].dequantize()["P3"]
        assert not torch.allclose(mirrored.flip(2), cache[entry["id"], 1].dequantize()["P3"], rtol=1e-2, atol=1e-2)


@pytest.fixture
def broken(data: Path, tmp_path: Path) -> dict:
    """A recipe on a copy of the data in which four images cannot be used."""
    shutil.copytree(data, tmp_path / "data")
    folder = tmp_path / "data" / "train"
    (folder / "00000003.jpg").unlink()
    (folder / "00000005.jpg").write_bytes(b"no image")
    (folder / "00000007.jpg").write_bytes((folder / "00000007.jpg").read_bytes()[:40])
    cv2.imwrite(str(folder / "00000009.jpg"), np.zeros((77, 99, 3), np.uint8))
    return models.recipe(tmp_path / "data", tmp_path)


def test_images_that_cannot_be_used_are_named_and_the_rest_goes_on(broken: dict, data: Path) -> None:
    recipe = parse_recipe(broken, "test")
    failures = precompute.fill(recipe, "small")
    assert {(f.image_id, f.view) for f in failures} == {(i, v) for i in (3, 5, 7, 9) for v in (0, 1)}
    reasons = {f.image_id: f.reason for f in failures}
    assert reasons[3] == "cannot be read: No such file or directory"
    assert "cannot be decoded" in reasons[5]
    assert "cannot be decoded" in reasons[7]
    assert "is 99x77, the annotation file says" in reasons[9]
    cache = TeacherCache.open(recipe.cache.uri, "small")
    assert len(cache) == 2 * 16
    assert (3, 0) not in cache
    # mended: only these are computed, and nothing else moves
    for image in (3, 5, 7, 9):
        name = f"{image:08d}.jpg"
        shutil.copy(data / "train" / name, Path(recipe.dataset.train.img_dir) / name)
    before = {key: cache[key].features["P3"].clone() for key in cache}
    assert precompute.fill(recipe, "small") == []
    cache = TeacherCache.open(recipe.cache.uri, "small")
    assert len(cache) == 2 * 20
    assert all(torch.equal(cache[key].features["P3"], value) for key, value in before.items())


@pytest.mark.parametrize("precision", ["int8", "float16"])
def test_nan_from_a_teacher_is_refused_with_the_image_named(data: Path, tmp_path: Path, precision: str) -> None:
    content = models.recipe(data, tmp_path)
    content["cache"]["precision"] = precision
    weights = read_weights(content["teachers"]["small"]["checkpoint"], "test")
    weights["neck.fpn_convs.1.conv.bias"][0] = float("nan")
    torch.save(weights, tmp_path / "nan.pth")
    content["teachers"]["small"]["checkpoint"] = str(tmp_path / "nan.pth")
    recipe = parse_recipe(content, "test")
    failures = precompute.fill(recipe, "small")
    assert len(failures) == 40
    assert "NaN or Inf" in failures[0].reason
    assert failures[0].file_name.endswith(".jpg")
    assert len(TeacherCache.open(recipe.cache.uri, "small")) == 0


def test_masks_travel_as_rle_of_the_view(data: Path, tmp_path: Path) -> None:
    content = models.recipe(data, tmp_path)
    content["teachers"]["mask"] = {**models.teacher("mask-rcnn-swin", data), "levels": ["P4"]}
    content["teachers"]["mask"]["cfg_options"] = {
        **content["teachers"]["mask"]["cfg_options"],
        "model.test_cfg.rcnn.score_thr": 0.0,
        "model.test_cfg.rcnn.max_per_img": 3,
    }
    recipe = parse_recipe(content, "test")
    assert precompute.fill(recipe, "mask") == []
    cache = TeacherCache.open(recipe.cache.uri, "mask")
    assert list(cache.levels) == ["P4"]
    spec = TeacherSpec.model_validate(content["teachers"]["mask"])
    image = cv2.imread(f"{recipe.dataset.train.img_dir}/00000001.jpg")
    made = ApplyView([[128, 96]])({"img": image, "img_shape": image.shape[:2], "ori_shape": image.shape[:2], "view": 1})
    live = Teacher(spec, "mask")([torch.from_numpy(np.ascontiguousarray(made["img"].transpose(2, 0, 1)))]).detections[0]
    stored = cache[1, 1].detections
    assert len(stored) == 3
    assert stored.masks == live.masks
    assert np.array_equal(stored.boxes, live.boxes)
