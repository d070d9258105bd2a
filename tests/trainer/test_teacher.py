from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from cache import TeacherLoadError, ViewPolicy
from tests import models
from trainer import Teacher, TeacherSpec, describe, fingerprint_record

EXPECTED_LEVELS = {
    "retinanet-r18": {"P3": 16, "P4": 16, "P5": 16, "P6": 16, "P7": 16},
    "retinanet-swin": {"P3": 16, "P4": 16, "P5": 16, "P6": 16, "P7": 16},
    "mask-rcnn-swin": {"P2": 16, "P3": 16, "P4": 16, "P5": 16, "P6": 16},
    "dino-r18": {"P3": 32, "P4": 32, "P5": 32, "P6": 32},
}
POLICY = ViewPolicy(((128, 96),), "both")


def spec(name: str, folder: Path, **more: object) -> TeacherSpec:
    return TeacherSpec.model_validate(models.teacher(name, folder, **more))


def pixels(height: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", list(EXPECTED_LEVELS))
def test_one_forward_gives_levels_named_by_stride_and_detections(data: Path, name: str) -> None:
    teacher = Teacher(spec(name, data), name)
    assert {level.name: level.channels for level in teacher.levels} == EXPECTED_LEVELS[name]
    images = [pixels(90, 120), pixels(96, 128, 1)]
    output = teacher(images)
    divisor = describe(spec(name, data), name, {"precision": "int8"}).divisor
    height, width = (-(-side // divisor) * divisor for side in (96, 128))
    for level in teacher.levels:
        assert output.features[level.name].shape == (2, level.channels, *level.map_size(height, width))
    assert len(output.detections) == 2
    for image, found in zip(images, output.detections, strict=True):
        assert found.boxes.shape == (len(found), 4)
        assert (found.boxes[:, 2] <= image.shape[2] + 1e-3).all()
        assert (found.boxes[:, 3] <= image.shape[1] + 1e-3).all()
        assert found.labels.max(initial=0) < 6
        assert (found.masks is not None) == ("mask" in name)
        for counts in found.masks or ():
            assert coco_mask.decode({"size": list(image.shape[1:]), "counts": counts}).shape == tuple(image.shape[1:])


@pytest.mark.parametrize("name", ["retinanet-swin", "dino-r18"])
def test_targets_do_not_depend_on_batch_mates_nor_on_earlier_calls(data: Path, name: str) -> None:
    # DropPath left in train mode, as in the official code, would fail this
    teacher = Teacher(spec(name, data), name)
    image = pixels(96, 128)
    alone = teacher([image]).features
    batched = teacher([pixels(96, 128, 3), image]).features
    for level, maps in alone.items():
        torch.testing.assert_close(batched[level][1], maps[0], rtol=1e-4, atol=1e-4)
        assert torch.equal(teacher([image], detect=False).features[level], maps)


@pytest.mark.parametrize(
    ("name", "top_k", "heads"),
    [("mask-rcnn-swin", 0, set()), ("retinanet-r18", 0, set()), ("retinanet-r18", 40, {"bbox_head"})],
)
def test_heads_that_nothing_wants_do_not_run_and_the_rest_is_the_same_to_the_bit(
    data: Path, name: str, top_k: int, heads: set[str]
) -> None:
    teacher, ran = Teacher(spec(name, data), name, top_k=top_k), set()
    for part, module in teacher._model.named_modules():
        module.register_forward_hook(lambda *_, part=part: ran.add(part.partition(".")[0]))
    last = teacher._model.roi_head.mask_head if "mask" in name else teacher._model.bbox_head  # behind all NMS
    with patch.object(last, "predict_by_feat", wraps=last.predict_by_feat) as found:
        whole = teacher([pixels(96, 128)])
        assert ran > {"data_preprocessor", "backbone", "neck"}
        ran.clear()
        found.reset_mock()
        less = teacher([pixels(96, 128)], detect=False)
        assert not found.called
    assert ran == {"data_preprocessor", "backbone", "neck"} | heads
    assert (len(whole.detections), less.detections) == (1, [])
    for level, maps in whole.features.items():
        assert torch.equal(less.features[level], maps)
    for ours, theirs in zip(less.dense, whole.dense, strict=True):
        for level, of in ours.items():
            assert torch.equal(of.indices, theirs[level].indices)
            assert torch.equal(of.logits, theirs[level].logits)
            assert torch.equal(of.terms, theirs[level].terms)


def test_the_teacher_normalises_as_its_own_config_says(data: Path) -> None:
    options = {"model.data_preprocessor.mean": [0.0, 0.0, 0.0], "model.data_preprocessor.bgr_to_rgb": False}
    plain = spec("retinanet-r18", data)
    other = TeacherSpec.model_validate({**plain.model_dump(), "cfg_options": {**plain.cfg_options, **options}})
    image = pixels(96, 128)
    assert not torch.allclose(Teacher(plain, "a")([image]).features["P3"], Teacher(other, "b")([image]).features["P3"])


def test_autocast_changes_little_and_is_in_the_fingerprint(data: Path) -> None:
    full, half = spec("retinanet-swin", data), spec("retinanet-swin", data, autocast="bfloat16")
    image = pixels(96, 128)
    a, b = Teacher(full, "t")([image]).features["P3"], Teacher(half, "t")([image]).features["P3"].float()
    assert not torch.equal(a, b)
    assert torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.99
    assert fingerprint_record(full, "t", POLICY, "int8") != fingerprint_record(half, "t", POLICY, "int8")


@pytest.mark.parametrize("name", ["retinanet-swin", "mask-rcnn-swin", "dino-r18"])
def test_autocast_rounds_no_boxes(data: Path, name: str) -> None:
    _, options = models.SMALL[name]
    sure = {} if "dino" in name else {"model.test_cfg." + ("rcnn." if "mask" in name else "") + "score_thr": 0.0}
    plain = models.teacher(name, data, cfg_options={**options, **sure})
    found = []
    for more in ({}, {"autocast": "bfloat16"}):
        output = Teacher(TeacherSpec.model_validate({**plain, **more}), "t")([pixels(96, 128)])
        assert all(maps.dtype == torch.float32 for maps in output.features.values())
        found.append(output.detections[0])
    assert len(found[0])
    assert len(found[1])
    # features differ by a percent, boxes by parts of a pixel; bfloat16 has no number between 128 and 129
    full, half = (len(np.unique(np.round(one.boxes[(one.boxes > 64) & (one.boxes < 96)] % 1, 3))) for one in found)
    assert half > full / 2
    if "dino" not in name:  # whose untrained decoder moves nothing off a grid
        assert half > 10


def test_named_modules_are_captured_before_what_follows_them(data: Path) -> None:
    names = [f"neck.fpn_convs.{i}.conv" for i in range(3)]
    teacher = Teacher(spec("retinanet-r18", data, capture=names, levels=["P4", "P3"]), "t")
    assert [level.name for level in teacher.levels] == ["P4", "P3"]
    assert set(teacher([pixels(96, 128)]).features) == {"P3", "P4"}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"capture": ["nek"]}, r"teachers\.t\.capture: the detector has no module 'nek'; its parts are .*neck"),
        ({"capture": ["bbox_head.retina_cls"]}, "did not run in the forward pass"),
        ({"capture": ["neck", "neck.fpn_convs.0"]}, r"two captured maps have stride 8 \(P3\)"),
        ({"levels": ["P2"]}, r"teachers\.t\.levels: 'P2' is not among the captured levels P3, P4"),
    ],
)
def test_what_cannot_be_captured_is_explained(data: Path, more: dict, message: str) -> None:
    with pytest.raises(TeacherLoadError, match=message):
        Teacher(spec("retinanet-r18", data, **more), "t")


def test_a_checkpoint_that_does_not_fit_is_refused(data: Path) -> None:
    other = spec("retinanet-r18", data).model_copy(
        update={"checkpoint": str(models.checkpoint("retinanet-swin", data))}
    )
    with pytest.raises(TeacherLoadError, match=r"teachers\.t\.checkpoint: .* does not fit its config"):
        Teacher(other, "t")


def test_the_fingerprint_follows_what_decides_a_target_and_nothing_else(data: Path, tmp_path: Path) -> None:
    first = spec("retinanet-r18", data)
    record = fingerprint_record(first, "t", POLICY, "int8")

    def differs(**update: object) -> bool:
        return fingerprint_record(first.model_copy(update=update), "t", POLICY, "int8") != record

    moved = tmp_path / "moved.pth"
    moved.write_bytes(Path(first.checkpoint).read_bytes())
    assert not differs(checkpoint=str(moved))
    assert not differs(batch_size=8)
    assert not differs(cfg_options={**first.cfg_options, "model.train_cfg.assigner.pos_iou_thr": 0.7})
    assert not differs(cfg_options={**first.cfg_options, "train_dataloader.batch_size": 7})
    assert differs(checkpoint=str(models.checkpoint("retinanet-r18", tmp_path, seed=1)))
    assert differs(cfg_options={**first.cfg_options, "model.data_preprocessor.mean": [1.0, 2.0, 3.0]})
    assert differs(capture=("neck.fpn_convs.0",))
    assert fingerprint_record(first, "t", ViewPolicy(((128, 96),), "none"), "int8") != record
    assert fingerprint_record(first, "t", POLICY, "float16") != record
    assert np.array_equal(record["model"]["data_preprocessor"]["mean"], [123.675, 116.28, 103.53])
