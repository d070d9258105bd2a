from pathlib import Path

import cv2
import numpy as np
import pytest

from cache import MissingRowsError
from tests import models
from tests.trainer import precompute
from trainer import compare_sample, generate, parse_recipe


def test_a_sample_agrees_until_an_image_is_another_one(tmp_path: Path) -> None:
    data = tmp_path / "data"
    generate(data, "train", 6, seed=3)
    generate(data, "val", 1, seed=3, first_id=1000)
    content = models.recipe(data, tmp_path)
    content["cache"]["precision"] = "int4"
    content["teachers"]["swin"] |= {"pool": {"P3": 2}, "detections": True}
    content["teachers"]["swin"]["cfg_options"]["model.test_cfg.score_thr"] = 0.0  # an untrained head is sure of nothing
    recipe = parse_recipe(content, "test")
    with pytest.raises(MissingRowsError):
        compare_sample(recipe, "swin", 4)
    precompute.fill(recipe, "swin")

    report = compare_sample(recipe, "swin", 12)
    assert report.agrees
    assert [level.rows for level in report.levels] == [12] * 5
    for level in report.levels:
        # beyond 100 dB both are the rounding of float32 itself
        assert min(level.measured_snr, 100) == pytest.approx(min(level.recorded_snr, 100), abs=0.01)
        assert level.flipped_cosine is not None
    # int4 is noticed, and is no more than that; the last level has one value a channel, which nothing is lost of
    assert all(0.9 < level.least_cosine <= level.cosine < 0.9999 for level in report.levels[:2])
    assert [(one.what, one.found) for one in report.heads] == [("detections", 1.0)]
    assert report.heads[0].compared > 0
    assert report.heads[0].largest_error < 1e-3
    # the control: the features of a mirrored image are not its mirrored features
    assert min(level.flipped_cosine or 1 for level in report.levels) < 0.9

    files = sorted((data / "train").iterdir())
    height, width = cv2.imread(str(files[0])).shape[:2]
    cv2.imwrite(str(files[0]), np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))
    changed = compare_sample(recipe, "swin", 12)
    assert min(level.least_cosine for level in changed.levels) < 0.9
    files[1].unlink()
    gone = compare_sample(recipe, "swin", 12)
    assert len(gone.failures) == 2


def test_dense_outputs_are_compared_too_and_need_no_maps(tmp_path: Path) -> None:
    data = tmp_path / "data"
    generate(data, "train", 3, seed=3)
    generate(data, "val", 1, seed=3, first_id=1000)
    content = models.recipe(data, tmp_path)
    content["stages"] = [{"teacher": "small", "mechanisms": [{"type": "DenseLogitLoss"}], "epochs": 1}]
    recipe = parse_recipe(content, "test")
    precompute.fill(recipe, "small")
    report = compare_sample(recipe, "small", 6)
    assert report.agrees
    assert report.levels == ()
    assert [one.what for one in report.heads] == ["P3", "P4", "P5", "P6", "P7"], "no detections are stored"
    assert all(one.found == 1 for one in report.heads)
    # stored as float16, and the logits of an untrained head lie near -4.6
    assert all(0 < one.largest_error < 2e-2 for one in report.heads)
    file = sorted((data / "train").iterdir())[0]
    height, width = cv2.imread(str(file)).shape[:2]
    cv2.imwrite(str(file), np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))
    assert not compare_sample(recipe, "small", 6).agrees
