"""`mtpd inspect`: words that are those of the stored row, and a picture in which detections are where they are."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from cache import Detections, LocalStorage, MissingRowsError, RecipeError, TeacherCache, records_of
from services.cli import app
from tests import models
from tests.cache import make
from tests.trainer import precompute
from trainer import draw_row, load_recipe, read_annotations, view_pixels


def run(*arguments: str) -> str:
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False).output


def test_of_a_recipe_the_picture_shows_the_view_that_the_teacher_saw(data: Path, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    content = models.recipe(data, tmp_path)
    content["stages"] = content["stages"][:1]
    file.write_text(yaml.safe_dump(content))
    recipe = load_recipe(file)
    precompute.fill(recipe, "small")
    output = run("verify", str(file), "--sample", "1")
    assert "live teacher against the cache" in output
    assert "what its head gives" not in output, "features alone are stored"
    output = run("inspect", str(file), "--image", "3", "--out", str(tmp_path / "out" / "rows.png"))
    cache = TeacherCache.open(recipe.cache.uri, "small")
    records = records_of(LocalStorage(Path(recipe.cache.uri)), cache.info, 3)
    assert [record.view for record in records] == [0, 1]
    for record in records:
        maps = cache[3, record.view].dequantize()["P3"]
        assert f"image 3, view {record.view}: row {record.row} of {record.bucket}" in output
        assert f"float16 {list(maps.shape)}" in output
        assert f"{float(maps.min()):.3g} to {float(maps.max()):.3g}" in output
    assert output.count("no detections: none are stored in this group") == 2
    picture = cv2.imread(str(tmp_path / "out" / "rows.png"))
    assert picture.shape[0] == 2 * (320 + 24)
    # what is drawn on the left is the image, and in the second row its mirror image
    images = read_annotations(recipe.dataset.train.ann_file, "test").images
    source = cv2.imread(str(data / "train" / images.file_names[images.ids.tolist().index(3)]))
    width = round(320 * records[0].width / records[0].height)
    plain = cv2.resize(source, (width, 320)).astype(float)
    for top, expected in ((24, plain), (24 + 344, plain[:, ::-1])):
        drawn = picture[top : top + 320, :width].astype(float)
        others = [np.abs(drawn - other).mean() for other in (expected, expected[:, ::-1])]
        assert others[0] < 12 < others[1]
    pixels, same = view_pixels(recipe, records[0])
    assert pixels.shape[:2] == (records[0].height, records[0].width)
    assert same


def test_boxes_are_drawn_where_they_are_and_energy_is_of_the_view_without_padding(tmp_path: Path) -> None:
    storage, group = LocalStorage(tmp_path), make.info()
    make.fill(storage, group, make.images(3))
    cache = TeacherCache.open(str(tmp_path), "t")
    record = records_of(storage, group, 1)[0]
    targets = cache[1, 0]
    targets.detections = Detections(
        np.array([[16, 12, 48, 36], [0, 0, 4, 4]], np.float32), np.array([0.9, 0.1], np.float32), np.zeros(2, np.int32)
    )
    assert (record.height, record.width) == (48, 64)
    drawn = draw_row(targets, record, {"P3": 8, "P4": 16}, np.zeros((64, 64, 3), np.uint8))
    view = drawn[24:, : round(320 * 64 / 48)]
    green = np.argwhere((view == (80, 220, 80)).all(axis=2))
    scale = 320 / 48
    assert green.min(axis=0) == pytest.approx([12 * scale, 16 * scale], abs=1)
    assert green.max(axis=0) == pytest.approx([36 * scale, 48 * scale], abs=1)
    # 6 rows of P3 lie in the view, the seventh is padding
    tile = drawn[24:, view.shape[1] : view.shape[1] * 2]
    energy = targets.dequantize()["P3"].abs().mean(dim=0)[:6, :8]
    brightest = np.unravel_index(int(energy.argmax()), (6, 8))
    grey = cv2.cvtColor(tile, cv2.COLOR_BGR2GRAY)
    at = np.unravel_index(int(grey.argmax()), grey.shape)
    assert (at[0] * 6 // 320, at[1] * 8 // tile.shape[1]) == brightest


def test_of_a_cache_alone_it_tells_the_buckets_and_what_is_not_there(tmp_path: Path) -> None:
    make.fill(LocalStorage(tmp_path / "c"), make.info(), make.images(6))
    output = run("inspect", str(tmp_path / "c"), "--out", str(tmp_path / "rows.png"))
    assert "P3 int8[4, 8, 8]" in output
    assert "image 1, view 1" in output  # the first image is drawn
    assert cv2.imread(str(tmp_path / "rows.png")) is not None
    with pytest.raises(MissingRowsError, match="image 9"):
        run("inspect", str(tmp_path / "c"), "--image", "9")
    with pytest.raises(RecipeError, match="teacher 'u'"):
        run("inspect", str(tmp_path / "c"), "--teacher", "u")
    with pytest.raises(RecipeError, match="cannot be written"):
        run("inspect", str(tmp_path / "c"), "--out", str(tmp_path / "rows.png" / "below.png"))


def test_an_image_that_has_changed_since_is_told(data: Path, tmp_path: Path) -> None:
    content = models.recipe(data, tmp_path)
    annotations = json.loads((data / "annotations" / "train.json").read_text())
    (tmp_path / "images").mkdir()
    for entry in annotations["images"]:
        (tmp_path / "images" / entry["file_name"]).write_bytes((data / "train" / entry["file_name"]).read_bytes())
    content["dataset"]["train"]["img_dir"] = str(tmp_path / "images")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    recipe = load_recipe(tmp_path / "recipe.yaml")
    precompute.fill(recipe, "small")
    first = annotations["images"][0]
    blank = np.zeros((first["height"], first["width"], 3), np.uint8)
    cv2.imwrite(str(tmp_path / "images" / first["file_name"]), blank)
    command = ["inspect", str(tmp_path / "recipe.yaml"), "--image", str(first["id"]), "--out", str(tmp_path / "o.png")]
    assert f"image {first['id']} has changed since" in run(*command)
    (tmp_path / "images" / first["file_name"]).unlink()
    assert "drawn without the image" in run(*command)
