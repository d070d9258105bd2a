import os
from pathlib import Path

import pytest
import torch
from mmdet.registry import MODELS
from torch import nn

from cache import RecipeError, TeacherLoadError
from tests import models
from trainer.checkpoint import inherit, read_classes, read_weights, save_student
from trainer.config import load_config


class Evil:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


def test_weights_are_read_and_pickled_code_is_not_run(tmp_path: Path) -> None:
    weights = {"module.a": torch.arange(3.0), "module.b": torch.ones(2, dtype=torch.bfloat16)}
    torch.save({"state_dict": weights, "meta": Evil(tmp_path / "ran")}, tmp_path / "x.pth")
    read = read_weights(tmp_path / "x.pth", "k")
    assert list(read) == ["a", "b"]
    assert torch.equal(read["a"], weights["module.a"])
    assert torch.equal(read["b"], weights["module.b"])
    assert not (tmp_path / "ran").exists()
    torch.save({"state_dict": {"a": Evil(tmp_path / "ran")}}, tmp_path / "y.pth")
    with pytest.raises(TeacherLoadError, match="holds no weights"):
        read_weights(tmp_path / "y.pth", "k")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 torn"])
def test_a_file_that_is_no_checkpoint(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(TeacherLoadError, match=r"k: .*x\.pth: not a readable checkpoint"):
        read_weights(tmp_path / "x.pth", "k")


def build(name: str, **options: object) -> nn.Module:
    config, small = models.SMALL[name]
    return MODELS.build(load_config(config, {**small, **options}, "test").model)


def test_everything_outside_the_backbone_that_fits_is_inherited() -> None:
    student, teacher = build("retinanet-r18"), build("retinanet-swin")
    before = {k: v.clone() for k, v in student.state_dict().items()}
    result = inherit(student, teacher.state_dict())
    after = student.state_dict()
    assert all(torch.equal(after[k], teacher.state_dict()[k]) for k in result.copied)
    assert all(torch.equal(after[k], before[k]) for k in before if k not in result.copied)
    assert "bbox_head.retina_cls.weight" in result.copied
    assert not any(k.startswith("backbone.") for k in result.copied)
    # a Swin with maps of 16, 32, 64 channels for the ResNet's 16, 32, 64 behind P3 to P5: all lateral convolutions fit here
    assert "neck.lateral_convs.0.conv.weight" in result.copied


def test_of_other_classes_only_what_does_not_depend_on_them_is_inherited() -> None:
    student = build("retinanet-r18", **{"model.bbox_head.num_classes": 3})
    result = inherit(student, build("retinanet-r18").state_dict())
    assert {k for k in result.left if "bbox_head" in k} == {"bbox_head.retina_cls.weight", "bbox_head.retina_cls.bias"}


@pytest.mark.parametrize("classes", [6, 2])
def test_a_cascade_gives_its_first_stage_and_its_regressor_to_every_class(classes: int) -> None:
    student = build(
        "mask-rcnn-r18",
        **{"model.roi_head.bbox_head.num_classes": classes, "model.roi_head.mask_head.num_classes": classes},
    )
    heads = {k: v for k, v in build("mask-rcnn-r18").state_dict().items() if k.startswith("roi_head.")}
    cascade = {}
    for stage in range(3):
        for name, value in heads.items():
            kind = "mask_head" if "mask_head" in name else "bbox_head"
            value = torch.full_like(value, stage + 1.0)
            if "fc_reg" in name:  # class-agnostic: four numbers for all classes
                value = torch.arange(4.0).reshape(4, *[1] * (value.dim() - 1)).expand(4, *value.shape[1:]) + 10 * stage
            cascade[name.replace(f"roi_head.{kind}.", f"roi_head.{kind}.{stage}.")] = value
    inherit(student, cascade)
    head = student.roi_head.bbox_head
    assert torch.equal(head.fc_reg.bias.reshape(classes, 4), torch.arange(4.0).expand(classes, 4))
    assert (head.shared_fcs[0].weight == 1).all()
    assert ((head.fc_cls.weight == 1).all().item()) == (classes == 6)


@pytest.mark.parametrize("zipped", [True, False])
def test_the_names_of_classes_are_read_as_each_mmdet_wrote_them_and_nothing_is_run(
    tmp_path: Path, zipped: bool
) -> None:
    evil, file = Evil(tmp_path / "ran"), tmp_path / "x.pth"
    metas = {
        ("a", "b"): {"dataset_meta": {"classes": ("a", "b"), "palette": evil}, "cfg": evil, "time": evil},
        ("b", "a"): {"dataset_meta": {"CLASSES": ["b", "a"]}},
        ("c",): {"CLASSES": ("c",), "mmdet_version": "2.28.2"},
    }
    for nothing in ({"dataset_meta": {"classes": evil}}, {"CLASSES": [evil]}, {"dataset_meta": evil}, evil, None, {}):
        metas[len(metas)] = nothing
    for expected, meta in metas.items():
        content = {"state_dict": {"a": torch.ones(2)}, "meta": meta, "optimizer": {"state": {0: torch.ones(3)}}}
        torch.save(content, file, _use_new_zipfile_serialization=zipped)
        assert read_classes(file, "k") == (expected if isinstance(expected, tuple) else None)
    torch.save({"a": torch.ones(2)}, file, _use_new_zipfile_serialization=zipped)
    assert read_classes(file, "k") is None
    assert not (tmp_path / "ran").exists()


def test_a_student_that_is_not_finite_is_not_written(tmp_path: Path) -> None:
    student = nn.BatchNorm2d(2)
    student.running_var[1] = torch.inf
    with pytest.raises(
        RecipeError, match=r"x\.pth: not written: 1 of the student's weights are not finite \(running_var"
    ):
        save_student(student, tmp_path / "x.pth", ("a",))
    assert not list(tmp_path.iterdir())
