"""Sampled views replayed for teacher and student; a student at reduced scale; several scales."""

import json
import math
import random
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmcv.transforms import BaseTransform
from mmdet.registry import DATASETS, TRANSFORMS

from cache import RecipeError, SampledPolicy, TeacherCache, make_plan
from tests import models
from tests.trainer import precompute
from tests.trainer.test_stage import losses
from trainer import (
    ApplySampledView,
    Distiller,
    LiveMaps,
    Recipe,
    Teacher,
    UnitComputer,
    parse_recipe,
    read_annotations,
    stage_config,
    teacher_info,
    train_stage,
)
from trainer.evaluate import evaluation_loader
from trainer.mechanisms import MECHANISMS
from trainer.mechanisms.base import fit

SIZE = [96, 128]
CROP = [
    {"type": "RandomResize", "scale": [[160, 120], [240, 200]], "keep_ratio": True},
    {"type": "RandomCrop", "crop_size": [120, 90], "allow_negative_crop": True},
    {"type": "RandomFlip", "prob": [0.4, 0.3], "direction": ["horizontal", "vertical"]},
    {"type": "PhotoMetricDistortion"},
]
MOSAIC = [
    {"type": "Mosaic", "img_scale": [128, 96], "pad_val": 114.0},
    {"type": "RandomAffine", "scaling_ratio_range": [0.5, 1.5], "border": [-64, -48]},
    {"type": "MixUp", "img_scale": [128, 96], "ratio_range": [0.8, 1.6], "pad_val": 114.0},
    {"type": "Resize", "scale": [128, 96], "keep_ratio": False},
]
PASTE = [{"type": "Resize", "scale": [128, 96]}, {"type": "CopyPaste", "max_num_pasted": 20}, *CROP[2:]]


def sampled(data: Path, folder: Path, pipeline: list, *, count: int = 2, masks: bool = False, **more) -> Recipe:
    views = {"sampled": {"pipeline": pipeline, "count": count, "size": SIZE, "masks": masks, "val_scale": [128, 96]}}
    return parse_recipe(models.recipe(data, folder, views=views, **more), "test")


def generators() -> tuple:
    """Where the process's generators are."""
    kind, numbers, *rest = np.random.get_state()  # noqa: NPY002 - what transforms draw from
    return kind, numbers.tolist(), rest, random.getstate(), torch.get_rng_state().tolist()


@pytest.mark.parametrize(("pipeline", "masks"), [(CROP, False), (MOSAIC, False), (PASTE, True)])
def test_teacher_and_student_see_the_same_pixels(data: Path, tmp_path: Path, pipeline: list, masks: bool) -> None:
    student = "mask-rcnn-r18" if masks else "retinanet-r18"
    recipe = sampled(data, tmp_path, pipeline, masks=masks, student=student)
    info = teacher_info(recipe, "small")
    images = read_annotations(recipe.dataset.train.ann_file, "test").images
    computer = UnitComputer(
        Teacher(recipe.teachers["small"], "small"), info, recipe.policy, recipe.dataset.train, batch_size=1, decoders=2
    )
    before = generators()
    seen = {}
    for unit in make_plan(images, recipe.policy, info).units():
        pixels, failures = computer.decode(unit)
        assert failures == []
        seen |= {(one.row.image_id, one.row.view): one.image for one in pixels}
    assert generators() == before
    assert len(seen) == 40
    dataset = DATASETS.build(stage_config(recipe, 1, "online").train_dataloader.dataset)
    objects = 0
    for item in reversed(range(len(dataset))):  # another order, and images without objects filtered out
        sample = dataset[item]
        packed = sample["data_samples"]
        assert torch.equal(sample["inputs"], seen[packed.img_id, packed.view])
        assert sample["inputs"].dtype == torch.uint8
        assert packed.img_shape == tuple(SIZE)
        found = packed.gt_instances
        objects += len(found)
        if masks and len(found):
            assert found.masks.masks.shape[1:] == tuple(SIZE)
    assert objects > 20
    different = [not torch.equal(seen[i, 0], seen[i, 1]) for i in images.ids.tolist()]
    assert np.mean(different) > 0.9


def white_view(folder: Path, pipeline: list, count: int) -> ApplySampledView:
    """Views of a black image, 160 wide and 120 high, of one white object with a mask."""
    image = np.zeros((120, 160, 3), np.uint8)
    image[40:80, 60:110] = 255
    cv2.imwrite(str(folder / "a.png"), image)
    polygon = [60, 40, 110, 40, 110, 80, 60, 80]
    annotation = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [60, 40, 50, 40], "area": 2000, "iscrowd": 0}
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": 160, "height": 120}],
        "categories": [{"id": 1, "name": "white"}],
        "annotations": [{**annotation, "segmentation": [polygon]}],
    }
    (folder / "white.json").write_text(json.dumps(content))
    policy = SampledPolicy(count, (120, 160), dict(pipeline=pipeline, seed=0, pad=0, masks=True))
    return ApplySampledView(policy.to_json(), str(folder / "white.json"), str(folder))


def test_boxes_and_masks_lie_on_the_pixels_of_their_objects(tmp_path: Path) -> None:
    view = white_view(tmp_path, CROP[:3], 12)
    loaded, corners = view.load(1), set()
    for number in range(12):
        made = view.make(loaded, number)
        if not len(made["gt_bboxes"]):
            continue
        box = made["gt_bboxes"].tensor[0].numpy()
        for bright in (made["img"][..., 0] > 127, made["gt_masks"].masks[0] > 0):
            ys, xs = np.nonzero(bright)
            assert np.abs(box - (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)).max() <= 1.5
        corners.add(tuple(box.round().tolist()))
    assert len(corners) > 8


AWAY = {"prob": 1.0, "min_mag": 0.0, "max_mag": 1.0, "img_border_value": 0}


def test_boxes_that_a_pipeline_leaves_without_area_are_dropped_with_all_that_is_theirs(tmp_path: Path) -> None:
    space = [[{"type": kind, **AWAY}] for kind in ("TranslateX", "TranslateY")]
    view = white_view(tmp_path, [{"type": "RandAugment", "aug_space": space, "aug_num": 2}], 40)
    loaded, counts = view.load(1), []
    for number in range(40):
        made = view.make(loaded, number)
        boxes = made["gt_bboxes"].tensor
        assert (boxes[:, 2:] - boxes[:, :2] >= 1).all()
        assert len(made["gt_bboxes_labels"]) == len(made["gt_ignore_flags"]) == len(made["gt_masks"]) == len(boxes)
        assert made["gt_masks"].masks.any() == (made["img"] > 127).any() == (len(boxes) > 0)
        counts.append(len(boxes))
    assert 5 < sum(counts) < 35


@pytest.mark.parametrize("student", ["retinanet-r18", "mask-rcnn-r18"])
def test_images_that_a_pipeline_leaves_without_boxes_are_trained_on(data: Path, tmp_path: Path, student: str) -> None:
    pipeline = [{"type": "Resize", "scale": [128, 96]}, {"type": "TranslateX", **AWAY}, {"type": "TranslateY", **AWAY}]
    recipe = sampled(
        data, tmp_path, pipeline, masks=student == "mask-rcnn-r18", student=student, stages=[{"epochs": 1}]
    )
    dataset = DATASETS.build(stage_config(recipe, 1).train_dataloader.dataset)
    empty = [not len(dataset[item]["data_samples"].gt_instances) for item in range(len(dataset))]
    assert 4 < sum(empty) < len(empty)
    assert np.isfinite([list(step.values()) for step in losses(recipe, 1, "cache", 3, mixed=False)]).all()


def test_a_cache_of_sampled_views_gives_the_losses_of_the_teacher_beside_the_student(
    data: Path, tmp_path: Path
) -> None:
    stages = [{"teacher": "small", "mechanisms": [{"type": "FeatureMatchingLoss", "loss_weight": 0.1}], "epochs": 1}]
    recipe = sampled(data, tmp_path, CROP, stages=stages)
    assert precompute.fill(recipe, "small") == []
    cached, online = (losses(recipe, 1, source, 2, mixed=False) for source in ("cache", "online"))
    for a, b in zip(cached, online, strict=True):
        assert a == pytest.approx(b, rel=2e-3)
    assert train_stage(recipe, 1).images > 0


def test_other_annotations_or_another_pipeline_are_another_cache(data: Path, tmp_path: Path) -> None:
    recipe = sampled(data, tmp_path, CROP)
    content = json.loads(Path(recipe.dataset.train.ann_file).read_text())
    content["info"] = "this decides nothing"
    records = [teacher_info(recipe, "small").record["views"]]
    for number, change in enumerate((lambda: None, lambda: content["annotations"][0]["bbox"].__setitem__(0, 1))):
        change()
        file = tmp_path / f"{number}.json"
        file.write_text(json.dumps(content))
        split = recipe.dataset.train.model_copy(update={"ann_file": str(file)})
        other = recipe.model_copy(update={"dataset": recipe.dataset.model_copy(update={"train": split})})
        records.append(other.policy.to_json())
    assert records[0] == records[1] != records[2]
    assert sampled(data, tmp_path, CROP[:2]).policy.to_json() != records[0]


def test_a_view_that_cannot_be_made_is_a_failure_of_its_row(data: Path, tmp_path: Path) -> None:
    large = [{"type": "RandomChoiceResize", "scales": [[128, 96], [256, 192]], "keep_ratio": False}]
    failures = precompute.fill(sampled(data, tmp_path / "a", large, count=3), "small")
    assert 0 < len(failures) < 60
    assert all(f"view {f.view} is 256x192 after the pipeline" in f.reason for f in failures)
    cache = TeacherCache.open(str(tmp_path / "a" / "cache"), "small")
    assert len(cache) == 60 - len(failures)
    negative = [{"type": "RandomCrop", "crop_size": [2, 2], "allow_negative_crop": False}]
    failures = precompute.fill(sampled(data, tmp_path / "b", negative), "small")
    assert failures
    assert "(RandomCrop) refuses it 15 times" in failures[0].reason


def test_a_partner_that_cannot_be_read_is_named(data: Path, tmp_path: Path) -> None:
    recipe = sampled(data, tmp_path, MOSAIC)
    images = tmp_path / "images"
    images.mkdir()
    for file in Path(recipe.dataset.train.img_dir).iterdir():
        if file.name != "00000003.jpg":
            (images / file.name).write_bytes(file.read_bytes())
    view = ApplySampledView(recipe.policy.to_json(), recipe.dataset.train.ann_file, str(images))
    reasons = []
    for image_id in (1, 2, 4, 5, 6, 7, 8):
        try:
            view.make(view.load(image_id), 0)
        except ValueError as error:
            reasons.append(str(error))
    assert reasons
    assert all(
        r == f"is mixed with {images}/00000003.jpg, which cannot be read: No such file or directory" for r in reasons
    )


def test_a_mixing_transform_that_looks_at_an_image_without_objects_draws_another(data: Path, tmp_path: Path) -> None:
    refusing = {"type": "RandomCrop", "crop_type": "relative", "crop_size": [1.0, 1.0], "allow_negative_crop": False}
    recipe = sampled(data, tmp_path, [refusing, *MOSAIC], count=4)
    computer = UnitComputer(
        Teacher(recipe.teachers["small"], "small"),
        info := teacher_info(recipe, "small"),
        recipe.policy,
        recipe.dataset.train,
        batch_size=1,
    )
    images = read_annotations(recipe.dataset.train.ann_file, "test").images
    content = json.loads(Path(recipe.dataset.train.ann_file).read_text())
    empty = set(images.ids.tolist()) - {annotation["image_id"] for annotation in content["annotations"]}
    assert empty
    failed = [
        failure for unit in make_plan(images, recipe.policy, info).units() for failure in computer.decode(unit)[1]
    ]
    assert sorted((f.image_id, f.view) for f in failed) == [(i, view) for i in sorted(empty) for view in range(4)]
    assert all("(RandomCrop) refuses it 15 times" in f.reason for f in failed)


@TRANSFORMS.register_module()
class OwnGenerator(BaseTransform):
    """A transform whose randomness nobody seeds."""

    def transform(self, results: dict) -> dict:
        results["img"] = np.roll(results["img"], int(np.random.default_rng().integers(1, 50)), axis=1)
        return results


def test_a_pipeline_that_cannot_be_replayed_stops_the_precompute(data: Path, tmp_path: Path) -> None:
    resize = {"type": "Resize", "scale": [128, 96]}
    with pytest.raises(RecipeError, match=r"made twice, view \d of image \d+ differs"):
        precompute.fill(sampled(data, tmp_path, [resize, {"type": "OwnGenerator"}]), "small")


@pytest.mark.parametrize(
    ("views", "expected"),
    [
        ({}, r"give exactly one of the two"),
        ({"scale": [128, 96], "sampled": {"pipeline": CROP, "count": 1, "size": SIZE}}, "give exactly one of the two"),
        ({"sampled": {"pipeline": CROP, "count": 1, "size": SIZE}, "flip": "none"}, "flip belongs to `scale`"),
        ({"sampled": {"pipeline": [], "count": 1, "size": SIZE}}, "a pipeline is a list of mmdet transforms"),
        ({"sampled": {"pipeline": [{"type": "Rotator"}], "count": 1, "size": SIZE}}, "transform 1: Rotator: "),
        (
            {"sampled": {"pipeline": [CROP[0], {"type": "PackDetInputs"}], "count": 1, "size": SIZE}},
            "transform 2: PackDetInputs: loading and packing are not part of a view",
        ),
        (
            {"sampled": {"pipeline": [{"type": "CachedMosaic"}], "count": 1, "size": SIZE}},
            "transform 1: CachedMosaic mixes images that it met before.*take Mosaic",
        ),
    ],
)
def test_each_fault_of_the_views_is_told(data: Path, tmp_path: Path, views: dict, expected: str) -> None:
    with pytest.raises(RecipeError, match=r"test: views[^\n]*" + expected):
        parse_recipe(models.recipe(data, tmp_path, views=views), "test")


def test_students_are_evaluated_in_the_geometry_of_the_views(data: Path, tmp_path: Path) -> None:
    content = models.recipe(data, tmp_path)
    for loader in ("val", "test"):  # as SSD's
        content["student"]["cfg_options"][f"{loader}_dataloader.dataset.pipeline.1.keep_ratio"] = False
    views = {"sampled": {"pipeline": CROP, "count": 2, "size": [96, 160]}}
    for given, scale in ((views, (160, 96)), ({"sampled": {**views["sampled"], "val_scale": [100, 80]}}, (100, 80))):
        recipe = parse_recipe({**content, "views": given}, "test")
        cfg = stage_config(recipe, 1, "online")
        for loader in (cfg.val_dataloader, cfg.test_dataloader, evaluation_loader(recipe)):
            resize = loader.dataset.pipeline[1]
            assert (resize.type, tuple(resize.scale), resize.keep_ratio) == ("Resize", scale, True)


FEATURES = [name for name, kind in MECHANISMS.module_dict.items() if kind.needs == {"features"}]


def test_a_student_at_half_scale_trains_against_targets_of_whole_views(data: Path, tmp_path: Path) -> None:
    mechanisms = [{"type": name, "loss_weight": 0.01} for name in FEATURES]
    stages = [{"teacher": "swin", "mechanisms": mechanisms, "epochs": 1}]
    content = models.recipe(data, tmp_path, stages=stages)
    content["student"]["input_scale"] = 0.5
    content["teachers"]["swin"]["pool"] = {"P3": 2}
    recipe = parse_recipe(content, "test")
    precompute.fill(recipe, "swin")
    cached, online = (losses(recipe, 1, source, 2) for source in ("cache", "online"))
    for a, b in zip(cached, online, strict=True):
        assert np.isfinite(list(a.values())).all()
        assert a == pytest.approx(b, rel=2e-3)
    cfg = stage_config(recipe, 1)
    scales = [t["scale"] for t in cfg.val_dataloader.dataset.pipeline if t["type"] == "Resize"]
    assert scales == [(64, 48)]
    content["student"]["input_scale"] = 1.0
    whole = stage_config(parse_recipe(content, "test"), 1).train_dataloader.dataset.dataset.pipeline
    assert "Resize" not in [t["type"] for t in whole]


@pytest.mark.parametrize("scale", [0.5, 0.7, 1.0])
def test_what_a_small_student_has_in_the_padding_does_not_reach_its_pooled_maps(
    data: Path, tmp_path: Path, scale: float
) -> None:
    content = models.recipe(data, tmp_path)
    content["student"]["input_scale"] = scale
    arguments = {k: v for k, v in stage_config(parse_recipe(content, "test"), 1, "online").model.items() if k != "type"}
    distiller = Distiller(**{**arguments, "teachers": {"small": {"levels": {"P3": [16, 8, 2]}}}})
    sizes = [(12, 16), (7, 9)]  # of the teacher's own maps before they are pooled
    teachers = [LiveMaps({"P3": torch.rand(16, -(-h // 2), -(-w // 2))}, {"P3": (h, w)}) for h, w in sizes]
    maps = torch.rand(2, 16, math.ceil(14 * scale), math.ceil(18 * scale))
    outside = torch.ones_like(maps, dtype=torch.bool)
    for n, (h, w) in enumerate(sizes):
        outside[n, :, : math.ceil(h * scale), : math.ceil(w * scale)] = False
    seen = []
    for noise in (0.0, 1e3):
        one = torch.where(outside, noise, maps).requires_grad_()
        batch = distiller._batch("small", teachers, {"P3": one}, maps, [], {"features": ()})
        seen.append(batch.maps["P3"] * batch.valid["P3"])
        (gradient,) = torch.autograd.grad(seen[-1].sum(), one)
        assert not gradient[outside].any()
        assert gradient[:, :, :4, :5].all()
    torch.testing.assert_close(*seen)


@pytest.mark.parametrize("scale", [0.5, 0.7])
def test_maps_of_a_small_student_line_up_with_the_teachers(data: Path, tmp_path: Path, scale: float) -> None:
    """A ramp of brightness, averaged over the cells of each level, must be the same ramp on both sides."""
    content = models.recipe(data, tmp_path)
    content["student"]["input_scale"] = scale
    recipe = parse_recipe(content, "test")
    arguments = {k: v for k, v in stage_config(recipe, 1, "online").model.items() if k != "type"}
    distiller = Distiller(**{**arguments, "teachers": {"small": {"levels": {"P3": [16, 8, 1]}}}})
    height, width = 192, 288
    ramp = torch.arange(width).float().expand(height, width)[None, None] + 0.5
    small = torch.nn.functional.interpolate(ramp, (round(height * scale), round(width * scale)), mode="area")
    student = torch.nn.functional.pad(small, (0, -small.shape[-1] % 32, 0, -small.shape[-2] % 32))
    maps = {"P3": torch.nn.functional.avg_pool2d(student, 8)}
    teacher = LiveMaps({"P3": torch.nn.functional.avg_pool2d(ramp, 8)[0]}, {"P3": (24, 36)})
    batch = distiller._batch("small", [teacher], maps, ramp, [], {"features": ()})
    ours, theirs = fit(batch.maps["P3"], batch.valid["P3"]), batch.targets["P3"]
    assert batch.valid["P3"].sum() == 24 * 36
    inner = (..., slice(2, 20), slice(2, 32))
    assert (ours - theirs)[inner].abs().max() <= 4  # pixels: half a cell of stride 8


def test_several_scales_train_from_the_cache(data: Path, tmp_path: Path) -> None:
    content = models.recipe(data, tmp_path, views={"scale": [[128, 64], [128, 96], [96, 64]]})
    recipe = parse_recipe(content, "test")
    assert precompute.fill(recipe, "small") == []
    assert len(TeacherCache.open(recipe.cache.uri, "small")) == 20 * 6
    cached, online = (losses(recipe, 1, source, 3) for source in ("cache", "online"))
    for a, b in zip(cached, online, strict=True):
        assert a == pytest.approx(b, rel=2e-3)
    scales = [t["scale"] for t in stage_config(recipe, 1).val_dataloader.dataset.pipeline if t["type"] == "Resize"]
    assert scales == [(128, 96)]
