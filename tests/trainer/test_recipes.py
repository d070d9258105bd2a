"""The recipes for COCO, all but their data and checkpoints real: each is planned, its cache filled, a step of each stage made."""

import json
import logging
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import yaml
from mmdet.datasets import CocoDataset
from mmdet.registry import MODELS
from mmengine.optim import build_optim_wrapper
from mmengine.runner import Runner
from torch import Tensor, nn

from cache import RecipeError, load_index, make_plan, open_storage
from tests.trainer import precompute
from trainer import load_recipe, parse_recipe, read_annotations, stage_config, stage_dir, teacher_info
from trainer.config import load_config
from trainer.needs import needs_of

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes" / "coco").glob("*.yaml"))
CLASSES = CocoDataset.METAINFO["classes"]
# no downloads, one image a step, in this process
_OPTIONS: dict[str, Any] = {
    "model.backbone.init_cfg": None,
    **{
        f"{split}_dataloader.{key}": value
        for split in ("train", "val")
        for key, value in (("num_workers", 0), ("persistent_workers", False))
    },
}


def content(recipe: Path) -> dict[str, Any]:
    return yaml.safe_load(recipe.read_text())


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)  # init_weights lists every parameter, Swin says that nothing is downloaded
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of one image with the 80 classes of COCO; checkpoints and caches come beside it."""
    folder = tmp_path_factory.mktemp("coco")
    rng = np.random.default_rng(0)
    cv2.imwrite(str(folder / "000000000009.jpg"), rng.integers(0, 256, (96, 128, 3)).astype(np.uint8))
    objects = [
        {
            "id": n + 1,
            "image_id": 9,
            "category_id": n + 1,
            "bbox": [x, y, w, h],
            "area": w * h,
            "iscrowd": 0,
            "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
        }
        for n, (x, y, w, h) in enumerate([(8, 8, 40, 30), (60, 20, 60, 70), (30, 60, 20, 20)])
    ]
    images = [{"id": 9, "file_name": "000000000009.jpg", "width": 128, "height": 96}]
    categories = [{"id": n + 1, "name": name} for n, name in enumerate(CLASSES)]
    text = json.dumps({"images": images, "annotations": objects, "categories": categories})
    (folder / "annotations.json").write_text(text)
    return folder


def adapted(recipe: Path, place: Path) -> dict[str, Any]:
    """A recipe's content with other data, other checkpoints, small views and nothing downloaded."""
    made = content(recipe)
    split = {"ann_file": str(place / "annotations.json"), "img_dir": str(place)}
    made["dataset"] = {"train": split, "val": split}
    scales = made["views"]["scale"]
    made["views"]["scale"] = [[128, 96], [96, 64]][: len(scales)] if isinstance(scales[0], list) else [128, 96]
    if "dino" in recipe.stem:
        made["views"]["scale"] = [256, 192]  # it wants more positions than it has queries, 900
    made["cache"]["uri"] = str(place / "cache")
    made["work_dir"] = str(place / "work" / recipe.stem)
    made["training"] |= {"workers": 1, "batch_size": 1}
    if made["stages"] == "auto":  # the order itself is another test's; here the first and the last have their stages
        order, (first, *_, last) = made.pop("order"), made["teachers"]
        made["teachers"] = {name: made["teachers"][name] for name in (first, last)}
        made["stages"] = [{"teacher": t, **{k: order[k] for k in ("mechanisms", "epochs")}} for t in made["teachers"]]
    student = made["student"]
    for entry in (*made["teachers"].values(), *([student] if student.get("checkpoint") else [])):
        entry["checkpoint"] = str(checkpoint(entry["config"], place / Path(entry["checkpoint"]).name))
    # a thousand proposals through a fully connected layer cost more than all the rest
    for entry in made["teachers"].values():
        if "rcnn" in entry["config"] or "htc" in entry["config"]:
            entry["cfg_options"] = {"model.test_cfg.rpn.max_per_img": 20}
    student["cfg_options"] = {**student.get("cfg_options", {}), **_OPTIONS}
    if "rcnn" in student["config"]:
        student["cfg_options"] |= {
            "model.train_cfg.rpn_proposal.max_per_img": 20,
            "model.train_cfg.rcnn.sampler.num": 20,
        }
    return made


def checkpoint(config: str, file: Path) -> Path:
    """Random weights for a config."""
    if not file.exists():
        torch.manual_seed(0)
        model = MODELS.build(load_config(config, {"model.backbone.init_cfg": None}, "test").model)
        if hasattr(model, "level_embed"):
            nn.init.normal_(model.level_embed)  # mmdet leaves it as the memory was
        save_thin(model, file)
    return file


def save_thin(model: nn.Module, file: Path) -> None:
    """A checkpoint of few megabytes: large tensors become random ones whose rows overlap in memory, which torch stores once.

    Each is uniform within 1 / sqrt(inputs), as torch initialises convolutions; all of as many inputs share one memory.
    """
    generator, shift = torch.Generator().manual_seed(0), 61
    memory: dict[int, Tensor] = {}
    weights = model.state_dict()
    large = {name: value for name, value in weights.items() if value.is_floating_point() and value.numel() > 2**14}
    rows = max(len(value) for value in large.values())
    for name, value in large.items():
        inputs = value[0].numel()
        if inputs not in memory:
            memory[inputs] = (torch.rand(rows * shift + inputs, generator=generator) * 2 - 1) / inputs**0.5
        weights[name] = memory[inputs].as_strided(value.shape, (shift, *value[0].contiguous().stride()))
    torch.save({"state_dict": weights}, file)


def matched(made: dict[str, Any], teacher: str) -> set[str]:
    """The levels that a recipe must store of a teacher, by hand."""
    found: set[str] = set()
    for stage in made["stages"]:
        for mechanism in stage["mechanisms"] if stage["teacher"] == teacher else ():
            finest = 2 if "rcnn" in made["student"]["config"] else 3
            count = len(made["student"].get("capture", range(5)))
            if mechanism["type"] != "LDLoss":
                found |= set(mechanism.get("levels", [f"P{finest + k}" for k in range(count)]))
    return found


@pytest.fixture(scope="module")
def known() -> dict[str, Path]:
    """Teachers whose targets are cached, and the students of stages that made their step: recipes share many of both."""
    return {}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda file: file.stem)
def test_a_recipe_is_planned_cached_and_every_stage_makes_a_step(
    place: Path, known: dict[str, Path], recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)  # recipes name their own configs from here
    made = adapted(recipe, place)
    parsed = parse_recipe(made, recipe.name)
    images = read_annotations(parsed.dataset.train.ann_file, "test").images
    for name in parsed.teachers:
        stored = repr((parsed.teachers[name], parsed.views, needs_of(parsed, name)))
        if stored not in known:
            assert precompute.fill(parsed, name) == []
            known[stored] = place
        info = teacher_info(parsed, name)
        plan = make_plan(images, parsed.policy, info, committed=load_index(open_storage(parsed.cache.uri), info))
        assert plan.total == len(parsed.policy)
        assert plan.todo == 0
        assert {level.name for level in info.levels} >= matched(made, name)
        assert set(needs_of(parsed, name).levels) == matched(made, name)
        assert {level.channels for level in info.levels} <= {256}
    for number, spec in enumerate(parsed.stages, start=1):
        cfg = stage_config(parsed, number)
        step = repr((parsed.student, parsed.teachers[spec.teachers[0]], spec.mechanisms, number == 1))
        if step not in known:
            model = MODELS.build(cfg.model)
            model.init_weights()
            model.train()
            # a Runner would spend seconds on formatting the config
            (data,) = Runner.build_dataloader(cfg.train_dataloader, seed=0)
            logs = model.train_step(data, build_optim_wrapper(model, cfg.optim_wrapper))
            losses = {key: value.item() for key, value in logs.items()}
            assert all(np.isfinite(value) for value in losses.values()), losses
            for mechanism in spec.mechanisms:
                assert losses[f"loss_{mechanism['type']}"] > 0, losses
            known[step] = place / f"student-{len(known)}.pth"
            save_thin(model.student, known[step])
        student = stage_dir(parsed, number) / "student.pth"
        student.parent.mkdir(parents=True, exist_ok=True)
        student.symlink_to(known[step])


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda file: file.stem)
def test_a_recipe_says_what_to_expect_and_what_to_download(recipe: Path) -> None:
    head = recipe.read_text().split("dataset:")[0]
    made = content(recipe)
    assert re.search(r"^# Expected: (not known|\d\d\.\d .*\((published|read from|figure))", head, re.M), head
    assert made["work_dir"].endswith(recipe.stem)
    for entry in (*made["teachers"].values(), made["student"], made.get("order", {})):
        name = Path(entry.get("checkpoint") or "none").name
        if name == "none":
            continue
        stem = re.search(rf"^#   {re.escape(name)} .*AP\): (\S+\.pth)$", head, re.M)
        if stem is None:
            assert f"{name}: no download exists" in head
        else:  # the file is one that mmdet's own lists name for this config, or its 3x weights for the 1x config
            assert Path(stem[1]).name in _published()


@cache
def _published() -> str:
    """What mmdet's own lists of models say."""
    configs = Path(load_config("mmdet::retinanet/retinanet_r50_fpn_1x_coco.py", None, "test").filename).parents[1]
    return "\n".join(file.read_text() for file in configs.glob("*/metafile.yml"))


def test_without_the_data_a_recipe_names_each_file_that_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError) as error:
        load_recipe(RECIPES[0])
    for key in ("dataset.train.ann_file", "dataset.val.img_dir", "teachers."):
        assert key in str(error.value)
    assert "no such file: " in str(error.value)
