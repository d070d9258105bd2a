"""Weights that a student's config begins with: names, files, addresses, and what is said where they cannot be had."""

import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mmdet.registry import MODELS

from cache import RecipeError, TeacherLoadError
from tests import models
from trainer import Recipe, parse_recipe, pretrained, refuse_untrainable, stage_config
from trainer.config import load_config


class _Silent(SimpleHTTPRequestHandler):
    def log_message(self, *_arguments: Any) -> None: ...


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder, and the address at which its files are."""
    folder = tmp_path / "served"
    folder.mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Silent, directory=str(folder))) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{http.server_port}"
        http.shutdown()


def beginning(data: Path, folder: Path, source: str) -> Recipe:
    """A recipe without teachers whose student begins with weights from somewhere."""
    content = models.recipe(data, folder, stages=[{"epochs": 1}])
    content["student"]["cfg_options"]["model.backbone.init_cfg"] = {"type": "Pretrained", "checkpoint": source}
    return parse_recipe(content, "test")


def begun(recipe: Recipe) -> torch.nn.Module:
    model = MODELS.build(stage_config(recipe, 1).model)
    model.init_weights()
    return model.student


def test_weights_of_torchvision_are_fetched_without_torchvision(
    data: Path, tmp_path: Path, server: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, address = server
    recipe = beginning(data, tmp_path, "torchvision://resnet18")
    torch.manual_seed(1)
    config = load_config(recipe.student.config, recipe.student.cfg_options, "test")
    weights = MODELS.build(config.model.backbone).state_dict()
    torch.save(weights, folder / "resnet18-1.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr(pretrained, "_addresses", lambda: {"resnet18": f"{address}/resnet18-1.pth"})
    backbone = begun(recipe).backbone.state_dict()
    assert all(torch.equal(backbone[name], value) for name, value in weights.items())
    assert "torchvision" not in sys.modules


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet101"])  # all that mmdet's configs name
def test_the_names_of_mmdets_configs_are_known(data: Path, tmp_path: Path, name: str) -> None:
    refuse_untrainable(beginning(data, tmp_path, f"torchvision://{name}"))


@pytest.mark.parametrize(
    ("source", "why"),
    [("nowhere/resnet18.pth", "no such file: nowhere"), ("torchvision://resnet18x", "mmengine knows no 'torchvision:")],
)
def test_weights_that_cannot_be_had_are_refused_before_anything_runs(
    data: Path, tmp_path: Path, source: str, why: str
) -> None:
    recipe = beginning(data, tmp_path, source)
    with pytest.raises(
        RecipeError, match=rf"^student\.config: model\.backbone\.init_cfg\.checkpoint: {why}"
    ) as refused:
        refuse_untrainable(recipe)
    assert "student.cfg_options: {model.backbone.init_cfg.checkpoint: FILE}" in str(refused.value)
    # a student with weights of its own does not look at them
    own = recipe.student.model_copy(update={"checkpoint": str(models.checkpoint("retinanet-r18", data))})
    refuse_untrainable(recipe.model_copy(update={"student": own}))


def test_an_address_that_does_not_answer_names_the_weights_and_a_way_out(
    data: Path, tmp_path: Path, server: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    source = f"{server[1]}/gone.pth"
    with pytest.raises(
        RecipeError, match=rf"model\.backbone\.init_cfg\.checkpoint: {source}\): HTTPError: .*404.*FILE"
    ):
        begun(beginning(data, tmp_path, source))


def test_a_student_of_other_classes_begins_with_what_fits(data: Path, tmp_path: Path) -> None:
    recipe = beginning(data, tmp_path, "torchvision://resnet18")
    options = {**recipe.student.cfg_options, "model.backbone.init_cfg": None}
    config = load_config(recipe.student.config, options | {"model.bbox_head.num_classes": 80}, "test")
    torch.manual_seed(1)
    other = MODELS.build(config.model)
    torch.save({"state_dict": other.state_dict()}, tmp_path / "coco.pth")
    strict = recipe.student.model_copy(update={"cfg_options": options, "checkpoint": str(tmp_path / "coco.pth")})
    with pytest.raises(
        TeacherLoadError, match=r"(?s)retina_cls.*other classes.*model\.init_cfg: .*coco\.pth"
    ) as refused:
        begun(recipe.model_copy(update={"student": strict}))
    advised = yaml.safe_load(str(refused.value).rsplit("student.cfg_options: ", 1)[1])
    fitting = recipe.student.model_copy(update={"cfg_options": options | advised})
    student, given = begun(recipe.model_copy(update={"student": fitting})).state_dict(), other.state_dict()
    assert {name for name in given if not torch.equal(student[name], given[name])} == {
        "bbox_head.retina_cls.weight",
        "bbox_head.retina_cls.bias",
    }
