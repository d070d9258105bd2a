"""What a recipe stores follows from its mechanisms, and reaches them alike from the cache and from a live teacher."""

import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from mmengine.runner import Runner
from torch import Tensor

from cache import GroupInfo, RecipeError, StaleCacheError, TeacherCache, open_storage, repair, verify
from tests import models
from tests.trainer import precompute
from trainer import (
    CLASSES,
    Batch,
    LoadTeacherTargets,
    OrderRows,
    needs_of,
    open_stage,
    parse_recipe,
    read_annotations,
    refuse_other_classes,
    stage_config,
)
from trainer.groups import teacher_info
from trainer.mechanisms import MECHANISMS, Mechanism

SEEN: list[Batch] = []


@MECHANISMS.register_module()
class ProbeLoss(Mechanism):
    """Wants everything, and keeps what it is given."""

    needs = frozenset({"features", "dense", "detections", "head"})

    def __init__(self, student, teacher, *, loss_weight: float = 1.0) -> None:
        super().__init__(student, teacher, loss_weight=loss_weight)
        self.pairs = {"P4": (student[1], teacher[1])}

    def loss(self, batch: Batch) -> Tensor:
        SEEN.append(batch)
        return batch.maps["P4"].square().mean()


def stages(*mechanisms: dict, teacher: str | list[str] = "mask") -> list[dict]:
    return [{"teacher": teacher, "mechanisms": list(mechanisms), "epochs": 1}]


@pytest.fixture
def content(data: Path, tmp_path: Path) -> dict:
    content = models.recipe(data, tmp_path)
    content["teachers"]["mask"] = models.teacher("mask-rcnn-swin", data)
    return content


@pytest.mark.parametrize(
    ("mechanisms", "levels"),
    [
        ([{"type": "PKDLoss"}], ["P3", "P4", "P5", "P6"]),  # not P2, three quarters of the teacher's bytes
        ([{"type": "PKDLoss", "levels": ["P4"]}, {"type": "MGDLoss", "levels": ["P3"]}], ["P3", "P4"]),
        ([{"type": "PKDLoss", "levels": ["P4"]}, {"type": "MGDLoss"}], ["P3", "P4", "P5", "P6"]),
    ],
)
def test_the_levels_that_the_mechanisms_match_are_stored_and_no_others(content, mechanisms, levels) -> None:
    recipe = parse_recipe({**content, "stages": stages(*mechanisms)}, "test")
    assert list(needs_of(recipe, "mask").levels) == levels
    assert [level.name for level in teacher_info(recipe, "mask").levels] == levels


@pytest.mark.parametrize(
    ("teacher", "mechanism", "message"),
    [
        ("mask", {"type": "CrossKDLoss"}, "CrossKDLoss: teacher: .* has no dense head"),
        ("small", {"type": "LDLoss"}, "the student's RetinaHead gives boxes, not distributions"),
        ("bare", {"type": "CrossKDLoss"}, r"does not read what is captured on P3, P4, .* \(its neck\)"),
    ],
)
def test_a_teacher_whose_head_does_not_fit_is_refused_before_it_is_run(content, teacher, mechanism, message) -> None:
    small, bare = content["teachers"]["small"], [f"neck.fpn_convs.{k}.conv" for k in range(5)]
    normed = {**small["cfg_options"], "model.neck.norm_cfg": {"type": "BN"}}
    content["teachers"]["bare"] = {**small, "capture": bare, "cfg_options": normed}
    recipe = parse_recipe({**content, "stages": stages(mechanism, teacher=teacher)}, "test")
    with pytest.raises(RecipeError, match=message):
        teacher_info(recipe, teacher)


def test_a_checkpoint_of_the_same_classes_in_another_order_is_refused(content, tmp_path: Path) -> None:
    file = tmp_path / "named.pth"
    weights = torch.load(content["teachers"]["small"]["checkpoint"])
    content["teachers"]["small"]["checkpoint"] = str(file)
    turned = (*CLASSES[1:], CLASSES[0])
    refused = rf"named\.pth: its classes are {', '.join(turned)}; .* in another order, {', '.join(CLASSES)}, "
    recipes = [
        (f"teachers.small.checkpoint: .*{refused}", {**content, "stages": stages({"type": kind}, teacher="small")})
        for kind in ("DetectionLoss", "CrossKDLoss", "DenseLogitLoss")
    ]
    heir = {**content, "student": {**content["student"], "inherit": "small"}, "stages": [{"epochs": 1}]}
    for names in (CLASSES, tuple("abcdef"), turned):
        torch.save({**weights, "meta": {"dataset_meta": {"classes": names}}}, file)
        calls = [(message, partial(teacher_info, parse_recipe(given, "test"), "small")) for message, given in recipes]
        calls.append((f"student.inherit: .*{refused}", partial(stage_config, parse_recipe(heir, "test"), 1)))
        calls.append((refused, partial(refuse_other_classes, parse_recipe(heir, "test"), "small")))
        for message, call in calls:
            with pytest.raises(RecipeError, match=message) if names == turned else nullcontext():
                call()
    # of features alone the order of classes does not matter
    teacher_info(parse_recipe({**content, "stages": stages({"type": "PKDLoss"}, teacher="small")}, "test"), "small")


def test_what_a_larger_recipe_stored_serves_a_smaller_one(content) -> None:
    larger = parse_recipe({**content, "stages": stages({"type": "PKDLoss"})}, "test")
    smaller = parse_recipe({**content, "stages": stages({"type": "PKDLoss", "levels": ["P5"]})}, "test")
    assert teacher_info(larger, "mask").digest != teacher_info(smaller, "mask").digest
    ids = read_annotations(larger.dataset.train.ann_file, "test").images.ids
    half = OrderRows(tuple((int(i), 0) for i in ids), ())
    precompute.fill(larger, "mask", half)
    assert teacher_info(smaller, "mask").digest != teacher_info(larger, "mask").digest, "half of the rows serve nobody"
    precompute.fill(larger, "mask")
    assert teacher_info(smaller, "mask").digest == teacher_info(larger, "mask").digest
    assert precompute.fill(smaller, "mask") == []
    assert len(list(Path(smaller.cache.uri).glob("mask-*"))) == 1
    cfg = stage_config(smaller, 1)
    assert cfg.train_dataloader.dataset.dataset.pipeline[-1].levels == ["P5"]


@pytest.mark.parametrize(
    ("mechanism", "said", "stored"),
    [("PKDLoss", None, False), ("PKDLoss", True, True), ("DetectionLoss", None, True), (None, None, True)],
)
def test_detections_are_stored_if_a_mechanism_or_the_recipe_says_so(content, mechanism, said, stored) -> None:
    content["teachers"]["swin"]["detections"] = said
    named = stages({"type": mechanism}, teacher="swin") if mechanism else stages({"type": "PKDLoss"}, teacher="small")
    recipe = parse_recipe({**content, "stages": named}, "test")
    assert needs_of(recipe, "swin").detections is stored
    assert teacher_info(recipe, "swin").detections is stored
    if mechanism:  # what a stage reads is another matter
        read = stage_config(recipe, 1).train_dataloader.dataset.dataset.pipeline[-1].detections
        assert read is (mechanism == "DetectionLoss")


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """How often modules of each class run."""
    ran: Counter[str] = Counter()
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, *_: ran.update([type(module).__name__])
    )
    try:
        yield ran
    finally:
        handle.remove()


def take_out(recipe, info: GroupInfo, units: int) -> None:
    """Lose shards, and repair."""
    storage = open_storage(recipe.cache.uri)
    for file in sorted((Path(recipe.cache.uri) / info.name).glob("*/P4/c/*/0/0/0"))[:units]:
        file.unlink()
    repair(storage, verify(storage, info))


def test_a_teacher_runs_no_heads_for_features_and_a_group_with_detections_serves_them_too(content) -> None:
    def recipe_of(detections: bool | None):
        content["teachers"]["mask"]["detections"] = detections
        return parse_recipe({**content, "stages": stages({"type": "PKDLoss", "levels": ["P4", "P5"]})}, "test")

    alone, whole = recipe_of(None), recipe_of(True)
    infos, caches = [], []
    for recipe, heads in ((alone, 0), (whole, 40)):
        with counted() as ran:
            assert precompute.fill(recipe, "mask") == []
        assert ran["FPN"] >= 40
        assert ran["RPNHead"] == heads
        infos.append(teacher_info(recipe, "mask"))
        caches.append(TeacherCache.open(recipe.cache.uri, "mask", fingerprint=infos[-1].record))
    (less, more), folder = infos, Path(alone.cache.uri)
    assert "detections" not in more.record, "named as it was when every group had them"
    assert [(folder / info.name / "detections").exists() for info in infos] == [False, True]
    for key in caches[1]:
        ours, theirs = (cache[key] for cache in caches)
        assert all(torch.equal(ours.features[level], theirs.features[level]) for level in ("P4", "P5"))
        assert (ours.detections is None, theirs.detections is None) == (True, False)
    with pytest.raises(StaleCacheError, match=r"Set teachers\.mask\.detections: true"):
        LoadTeacherTargets(alone.cache.uri, "mask", less.record, detections=True)
    assert teacher_info(alone, "mask") == teacher_info(recipe_of(False), "mask") == less

    shutil.rmtree(folder / less.name)
    assert teacher_info(alone, "mask") == more, "what holds more serves"
    take_out(alone, more, 3)
    assert teacher_info(alone, "mask") == more, "a few rows are computed into it, with heads"
    with counted() as ran:
        assert precompute.fill(alone, "mask") == []
    assert 0 < ran["RPNHead"] < 20
    take_out(alone, more, 7)
    assert teacher_info(alone, "mask") == less, "most rows are computed faster without"
    shutil.rmtree(folder / more.name)
    precompute.fill(alone, "mask")
    with pytest.raises(StaleCacheError, match=r"detections: was false"):
        open_stage(whole, 1)


def step(recipe, source: str) -> tuple[Batch, dict]:
    cfg = stage_config(recipe, 1, source)
    cfg.work_dir = f"{recipe.work_dir}-{source}"
    runner = Runner.from_cfg(cfg)
    runner.model.train()
    torch.manual_seed(0)
    data = next(iter(runner.build_dataloader(cfg.train_dataloader, seed=0)))
    runner.model(**runner.model.data_preprocessor(data, True), mode="loss")
    return SEEN.pop(), runner.model.state_dict()


def test_dense_outputs_detections_and_head_are_the_same_from_cache_and_live_teacher(content, data: Path) -> None:
    content["stages"] = stages({"type": "ProbeLoss"}, teacher="small")
    content["teachers"]["small"]["top_k"] = 40
    recipe = parse_recipe(content, "test")
    assert precompute.fill(recipe, "small") == []
    info = teacher_info(recipe, "small")
    assert {d.name: (d.anchors, d.classes, d.terms) for d in info.dense} == {f"P{k}": (9, 6, 4) for k in range(3, 8)}
    (cached, kept), (online, _) = (step(recipe, source) for source in ("cache", "online"))
    assert not any("teacher" in name or "live" in name for name in kept)
    for ours, theirs in zip(cached.dense, online.dense, strict=True):
        assert ours.keys() == theirs.keys() == {"P3", "P4", "P5", "P6", "P7"}
        for level, of in ours.items():
            assert torch.equal(of.indices, theirs[level].indices)
            torch.testing.assert_close(of.logits, theirs[level].logits, rtol=2e-3, atol=1e-3)
            torch.testing.assert_close(of.terms, theirs[level].terms, rtol=2e-3, atol=1e-3)
    assert all((a.boxes == b.boxes).all() for a, b in zip(cached.detections, online.detections, strict=True))
    maps = [torch.rand(1, 16, 8, 8)] * 5
    for ours, theirs in zip(cached.teacher_head(maps), online.teacher_head(maps), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    # a mechanism on maps alone reads the same group, and none of the rest
    content["stages"] = stages({"type": "PKDLoss"}, teacher="small")
    alone = stage_config(parse_recipe(content, "test"), 1).train_dataloader.dataset.dataset.pipeline[-1]
    assert (alone.top_k, alone.detections, alone.fingerprint) == (0, False, info.record)
    assert len(TeacherCache.open(recipe.cache.uri, "small")) == 40


def test_a_recipe_of_detections_alone_stores_no_maps_and_trains(content, data: Path) -> None:
    content["stages"] = stages({"type": "DetectionLoss", "loss_weight": 0.1}, teacher="small")
    recipe = parse_recipe(content, "test")
    assert precompute.fill(recipe, "small") == []
    assert not list(Path(recipe.cache.uri).glob("small-*/*/P*"))
    cfg = stage_config(recipe, 1)
    runner = Runner.from_cfg(cfg)
    runner.model.train()
    item = next(iter(runner.build_dataloader(cfg.train_dataloader, seed=0)))
    given = runner.model(**runner.model.data_preprocessor(item, True), mode="loss")
    assert torch.isfinite(given["loss_DetectionLoss"])


def test_more_dense_positions_than_asked_for_are_cut(content, data: Path) -> None:
    content["stages"] = stages({"type": "ProbeLoss"}, teacher="small")
    content["teachers"]["small"]["top_k"] = 40
    precompute.fill(parse_recipe(content, "test"), "small")
    content["teachers"]["small"]["top_k"] = 8
    recipe = parse_recipe(content, "test")
    (cached, _), (online, _) = (step(recipe, source) for source in ("cache", "online"))
    for ours, theirs in zip(cached.dense, online.dense, strict=True):
        assert all(
            torch.equal(of.indices, theirs[level].indices) and len(of.indices) == 8 for level, of in ours.items()
        )


@pytest.mark.parametrize("levels", [["P9"], ["P2"]])
def test_levels_that_one_side_lacks_are_refused_before_anything_is_computed(content, levels: list[str]) -> None:
    recipe = parse_recipe({**content, "stages": stages({"type": "PKDLoss", "levels": levels})}, "test")
    with pytest.raises(RecipeError, match=rf"stages: PKDLoss\.levels: the student has no level '{levels[0]}'"):
        teacher_info(recipe, "mask")


def test_a_teacher_without_a_dense_head_is_refused_where_one_is_wanted(content) -> None:
    recipe = parse_recipe({**content, "stages": stages({"type": "ProbeLoss"})}, "test")
    with pytest.raises(RecipeError, match=r"teachers\.mask: dense outputs are those of .* has no dense head"):
        teacher_info(recipe, "mask")


def test_an_ensemble_averages_its_teachers_losses(content, data: Path) -> None:
    losses = {}
    for names in (["small"], ["swin"], ["small", "swin"]):
        content["stages"] = stages({"type": "PKDLoss"}, teacher=names if len(names) > 1 else names[0])
        content["work_dir"] = f"{content['work_dir']}-{len(losses)}"
        recipe = parse_recipe(content, "test")
        for name in names:
            precompute.fill(recipe, name)
        runner = Runner.from_cfg(stage_config(recipe, 1))
        torch.manual_seed(0)
        runner.model.init_weights()
        runner.model.train()
        item = next(iter(runner.build_dataloader(runner.cfg.train_dataloader, seed=0)))
        given = runner.model(**runner.model.data_preprocessor(item, True), mode="loss")
        losses["+".join(names)] = {key: float(v) for key, v in given.items() if "PKD" in key}
    both = losses["small+swin"]
    assert set(both) == {"loss_PKDLoss_small", "loss_PKDLoss_swin"}
    for name in ("small", "swin"):
        assert both[f"loss_PKDLoss_{name}"] == pytest.approx(losses[name]["loss_PKDLoss"] / 2, rel=1e-4)
