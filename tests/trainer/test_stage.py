"""Stages in this process, without ray: cached against online, hand-over, resume, what stock mmdet makes of the result."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mmdet.apis import inference_detector, init_detector
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from mmengine.runner import Runner
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cache import CorruptShardError, MissingRowsError, RecipeError, StaleCacheError
from tests import models
from tests.trainer import precompute
from trainer import Batch, latest_checkpoint, open_stage, parse_recipe, stage_config, stage_dir, train_stage
from trainer.checkpoint import not_finite, read_weights
from trainer.mechanisms import MECHANISMS, PKDLoss

TOLERANCE = 2e-3  # relative; float16 keeps 11 bits of each feature, and an optimiser step adds to the difference


def losses(recipe, stage: int, source: str, steps: int, mixed: bool = True) -> list[dict[str, float]]:
    cfg = stage_config(recipe, stage, source)
    cfg.work_dir = f"{recipe.work_dir}-{source}"
    runner = Runner.from_cfg(cfg)
    torch.manual_seed(0)
    runner.model.init_weights()
    runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    runner.model.train()
    loader = runner.build_dataloader(cfg.train_dataloader, seed=0)
    torch.manual_seed(1)
    result, shapes = [], set()
    for data in loader:
        shapes.add(tuple(sample.img_shape for sample in data["data_samples"]))
        logs = runner.model.train_step(data, runner.optim_wrapper)
        result.append({key: float(value) for key, value in logs.items()})
        if len(result) == steps:
            break
    assert not mixed or any(len(set(batch)) > 1 for batch in shapes), (
        "no batch mixes shapes; the test would show little"
    )
    return result


@pytest.mark.parametrize(
    ("mechanisms", "pool", "compression"),
    [
        ("FeatureMatchingLoss PKDLoss MGDLoss CWDLoss FGDLoss FBKDLoss", {}, "none"),
        ("FeatureMatchingLoss FGDLoss", {"P3": 2}, "zstd"),
    ],
)
def test_cached_and_online_losses_agree_on_mixed_shapes(
    data: Path, tmp_path: Path, mechanisms: str, pool: dict[str, int], compression: str
) -> None:
    specs = [{"type": name, "loss_weight": 0.01} for name in mechanisms.split()]
    stages = [{"teacher": "swin", "mechanisms": specs, "epochs": 1}]
    content = models.recipe(data, tmp_path, stages=stages)
    content["teachers"]["swin"]["pool"] = pool
    content["cache"]["compression"] = compression
    recipe = parse_recipe(content, "test")
    precompute.fill(recipe, "swin")
    cached, online = (losses(recipe, 1, source, 4) for source in ("cache", "online"))
    for step, (a, b) in enumerate(zip(cached, online, strict=True)):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key] == pytest.approx(b[key], rel=TOLERANCE), f"step {step}: {key}"
        # each mechanism's loss joins the student's own
        assert a["loss"] == pytest.approx(sum(value for key, value in a.items() if key.startswith("loss_")), rel=1e-5)
    for name in mechanisms.split():
        # the control: the losses of another view would not pass
        assert cached[0][f"loss_{name}"] != pytest.approx(cached[1][f"loss_{name}"], rel=TOLERANCE)


def test_cached_and_online_losses_agree_for_mechanisms_on_heads_and_detections(data: Path, tmp_path: Path) -> None:
    names = ["LDLoss", "DenseLogitLoss", "DetectionLoss", "CrossKDLoss"]
    stages = [{"teacher": "gfl", "mechanisms": [{"type": name} for name in names], "epochs": 1}]
    content = models.recipe(data, tmp_path, stages=stages, student="gfl-r18")
    # untrained scores are about 0.01, which no test configuration lets through
    content["teachers"]["gfl"] = models.teacher("gfl-r18", data)
    content["teachers"]["gfl"]["cfg_options"] = {
        **content["teachers"]["gfl"]["cfg_options"],
        "model.test_cfg.score_thr": 0.0,
    }
    recipe = parse_recipe(content, "test")
    assert precompute.fill(recipe, "gfl") == []
    cached, online = (losses(recipe, 1, source, 2) for source in ("cache", "online"))
    for a, b in zip(cached, online, strict=True):
        assert a.keys() == b.keys() >= {f"loss_{name}" for name in names} | {"coverage_LDLoss"}
        assert 0 < a["coverage_LDLoss"] <= 1
        for key in a:
            # untrained heads hardly differ: what float16 rounds of logits is a large part of what KL sees
            assert a[key] == pytest.approx(b[key], rel=3e-2, abs=1e-6), key
    content["teachers"]["gfl"]["cfg_options"] = {**models.SMALL["gfl-r18"][1], "model.bbox_head.num_classes": 5}
    content["teachers"]["gfl"]["checkpoint"] = str(models.checkpoint("gfl-r18", data))
    with pytest.raises(RecipeError, match=r"teachers\.gfl: its heads have 5 classes, dataset\.train has 6"):
        stage_config(parse_recipe(content, "test"), 1)


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory):
    """Two stages of a mask student from two teachers."""
    folder = tmp_path_factory.mktemp("trained")
    content = models.recipe(data, folder, student="mask-rcnn-r18")
    content["student"]["inherit"] = True
    content["stages"][0]["teacher"] = "mask"
    content["teachers"]["mask"] = models.teacher("mask-rcnn-swin", data)
    recipe = parse_recipe(content, "test")
    for name in ("mask", "swin"):
        precompute.fill(recipe, name)
    return recipe, [train_stage(recipe, stage) for stage in (1, 2)]


def test_each_stage_evaluates_boxes_and_masks(trained) -> None:
    _, results = trained
    for result in results:
        assert 0 <= result.metrics["bbox_mAP"] <= 1
        assert 0 <= result.metrics["segm_mAP"] <= 1
        assert result.teacher_forwards == 0
        assert result.images == -(-(20 - _empty(trained[0])) // 4) * 4  # the last step is filled


def _empty(recipe) -> int:
    content = json.loads(Path(recipe.dataset.train.ann_file).read_text())
    return len(content["images"]) - len({a["image_id"] for a in content["annotations"]})


def test_stock_mmdet_loads_the_students_checkpoint_with_no_key_missing_or_unexpected(
    trained, data: Path, capsys
) -> None:
    _, results = trained
    student = Path(results[1].student)
    model = init_detector(str(student.with_name("student.py")), str(student), device="cpu")
    assert "unexpected key" not in (printed := capsys.readouterr().out)
    assert "missing keys" not in printed
    assert set(model.state_dict()) == set(read_weights(student, "test"))
    assert model.dataset_meta["classes"][0] == "disc"
    result = inference_detector(model, next(iter((data / "val").iterdir())).as_posix())
    assert result.pred_instances.masks is not None


def test_a_stage_begins_with_the_weights_of_the_one_before_and_nothing_else(trained) -> None:
    recipe, results = trained
    cfg = stage_config(recipe, 2)
    cfg.work_dir = f"{recipe.work_dir}-begin"
    runner = Runner.from_cfg(cfg)
    runner.model.init_weights()
    first = read_weights(results[0].student, "test")
    begun = runner.model.student.state_dict()
    assert all(torch.equal(begun[key], value) for key, value in first.items())
    assert cfg.model.get("inherit_from") is None
    assert stage_config(recipe, 1).model.inherit_from == recipe.teachers["mask"].checkpoint
    student = recipe.student.model_copy(update={"inherit": "swin"})
    named = recipe.model_copy(update={"student": student})
    assert stage_config(named, 1).model.inherit_from == recipe.teachers["swin"].checkpoint


def test_the_student_of_averaged_weights_is_the_one_that_was_evaluated(data: Path, tmp_path: Path) -> None:
    content = models.recipe(data, tmp_path)
    content["student"]["cfg_options"]["custom_hooks"] = [{"type": "EMAHook", "momentum": 0.1}]
    content["stages"] = [{"epochs": 1}]
    recipe = parse_recipe(content, "test")
    written = read_weights(train_stage(recipe, 1).student, "test")
    kept = torch.load(latest_checkpoint(stage_dir(recipe, 1)), weights_only=False)
    averaged, raw = kept["state_dict"], kept["ema_state_dict"]
    assert all(torch.equal(value, averaged[f"student.{name}"]) for name, value in written.items())
    assert not all(torch.equal(value, raw[f"module.student.{name}"]) for name, value in written.items())


def test_a_stage_goes_on_when_damage_is_to_be_skipped_from_now_on(trained) -> None:
    recipe, results = trained
    cache = recipe.cache.model_copy(update={"on_damage": "skip", "local_dir": "somewhere"})
    assert train_stage(recipe.model_copy(update={"cache": cache}), 1) == results[0]


def test_each_stage_of_a_process_logs_into_its_own_folder_and_to_tensorboard(trained) -> None:
    recipe, _ = trained
    for stage, loss in ((1, "loss_PKDLoss"), (2, "loss_MGDLoss")):
        (log,) = stage_dir(recipe, stage).glob("*/vis_data/scalars.json")
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        assert {key for line in lines for key in line if key.endswith("Loss")} == {loss}
        (event,) = EventAccumulator(str(log.parent)).Reload().Scalars(loss)
        assert event.value == pytest.approx(next(line[loss] for line in lines if loss in line), rel=1e-5)
    options = {"visualizer.vis_backends": [{"type": "mmengine.MLflowVisBackend", "exp_name": "mine"}]}
    student = recipe.student.model_copy(update={"cfg_options": {**recipe.student.cfg_options, **options}})
    backends = stage_config(recipe.model_copy(update={"student": student}), 1).visualizer.vis_backends
    assert backends[0] == {"type": "mmengine.MLflowVisBackend", "exp_name": "mine"}
    assert [b["type"] for b in backends[1:]] == ["LocalVisBackend", "TensorboardVisBackend"]


def test_a_stage_that_is_done_is_not_trained_again_and_another_recipe_is_refused(trained) -> None:
    recipe, results = trained
    before = Path(results[0].student).stat().st_mtime_ns
    assert train_stage(recipe, 1) == results[0]
    assert Path(results[0].student).stat().st_mtime_ns == before
    teachers = {name: spec.model_copy(update={"detections": True}) for name, spec in recipe.teachers.items()}
    more = recipe.model_copy(update={"teachers": teachers})
    assert open_stage(more, 1)[1] == results[0], "of the same targets"
    assert stage_config(more, 1, "online").model == stage_config(recipe, 1, "online").model
    options = recipe.student.cfg_options | {"auto_scale_lr.base_batch_size": 4}  # the rate itself stays what it was
    student = recipe.student.model_copy(update={"cfg_options": options})
    assert train_stage(recipe.model_copy(update={"student": student}), 1) == results[0]
    longer = recipe.model_copy(
        update={"stages": (recipe.stages[0].model_copy(update={"epochs": 3}), *recipe.stages[1:])}
    )
    with pytest.raises(RecipeError, match=r"(?s)begun with another recipe:.*train_cfg\.max_epochs: was 1, asked for 3"):
        train_stage(longer, 1)


def test_what_is_not_in_the_cache_stops_a_stage_before_it_begins(data: Path, tmp_path: Path) -> None:
    recipe = parse_recipe(models.recipe(data, tmp_path), "test")
    with pytest.raises(MissingRowsError, match="no targets of teacher 'small'"):
        train_stage(recipe, 1)
    precompute.fill(recipe, "small")
    other = parse_recipe({**models.recipe(data, tmp_path), "views": {"scale": [96, 64]}}, "test")
    with pytest.raises(StaleCacheError, match=r"views\.scale: was \[\[128, 96\]\], asked for \[\[96, 64\]\]"):
        train_stage(other, 1)
    with pytest.raises(RecipeError, match="stage 2: stage 1 is not done"):
        train_stage(recipe, 2)


def test_a_damaged_row_stops_training_or_is_skipped_and_counted(data: Path, tmp_path: Path) -> None:
    content = models.recipe(data, tmp_path)
    content["stages"] = content["stages"][:1]
    recipe = parse_recipe(content, "test")
    precompute.fill(recipe, "small")
    for file in (tmp_path / "cache").glob("small-*/96x128/P3/c/0/0/0/0"):
        damaged = bytearray(file.read_bytes())
        damaged[: len(damaged) // 2] = b"\0" * (len(damaged) // 2)
        file.write_bytes(damaged)
    with pytest.raises(CorruptShardError, match=r"unit 96x128-000000 .*mtpd verify .* --repair"):
        train_stage(recipe, 1)
    content["cache"]["on_damage"] = "skip"
    content["work_dir"] = str(tmp_path / "skipping")
    result = train_stage(parse_recipe(content, "test"), 1)
    assert 0 < result.damaged_rows <= 2


def test_the_schedule_is_the_students_own_stretched_to_the_stage(data: Path, tmp_path: Path) -> None:
    content = models.recipe(data, tmp_path)
    content["stages"][0]["epochs"] = 24
    cfg = stage_config(parse_recipe(content, "test"), 1)
    warm_up, steps = cfg.param_scheduler
    assert steps.milestones == [16, 22]
    assert steps.end == cfg.train_cfg.max_epochs == 24
    assert warm_up.end == 24 * 5 // 10  # the config's 500 iterations are more than a tenth of these 120
    assert cfg.optim_wrapper.clip_grad.max_norm == 35


def test_a_stage_killed_and_started_again_ends_as_an_undisturbed_one(data: Path, tmp_path: Path) -> None:
    stages = [{"teacher": "small", "mechanisms": [{"type": "MGDLoss", "loss_weight": 1e-3}], "epochs": 6}]
    contents = [models.recipe(data, tmp_path / name, stages=stages) for name in ("whole", "killed")]
    contents[1]["cache"] = contents[0]["cache"]
    contents[0]["student"]["cfg_options"]["train_cfg.val_interval"] = 6
    contents[1]["student"]["cfg_options"]["train_cfg.val_interval"] = 6
    whole, killed = (parse_recipe(content, "test") for content in contents)
    precompute.fill(whole, "small")
    expected = train_stage(whole, 1)
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(contents[1]))
    code = "import sys; from trainer import load_recipe, train_stage; train_stage(load_recipe(sys.argv[1]), 1)"
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(file)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    folder = stage_dir(killed, 1)
    while not (folder / "iter_10.pth").exists() and child.poll() is None:
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL, "it was done before it could be killed"
    assert not (folder / "result.json").exists()
    # as a kill in the midst of writing leaves the newest one, the one before it deleted long ago
    newest = max(folder.glob("iter_*.pth"), key=lambda path: int(path.stem.removeprefix("iter_")))
    os.truncate(newest, newest.stat().st_size // 2)
    result = train_stage(killed, 1)
    assert result.metrics == expected.metrics
    a, b = (read_weights(r.student, "test") for r in (expected, result))
    assert all(torch.equal(a[key], b[key]) for key in a)


@MECHANISMS.register_module()
class BurstLoss(PKDLoss):
    """Not finite in one step."""

    steps = 0

    def loss(self, batch: Batch) -> torch.Tensor:
        self.steps += 1
        return super().loss(batch) * (torch.inf if self.steps == 7 else 1)


@OPTIM_WRAPPERS.register_module()
class SkippingOptimWrapper(OptimWrapper):
    """Skips a step whose loss is not finite, as the loss scaling of float16 does, which needs a GPU."""

    def update_params(self, loss: torch.Tensor, *arguments: Any, **options: Any) -> None:
        if loss.isfinite():
            super().update_params(loss, *arguments, **options)


def test_weights_that_are_not_finite_end_a_stage_and_are_written_nowhere_but_a_skipped_step_does_no_harm(
    data: Path, tmp_path: Path
) -> None:
    content = models.recipe(data, tmp_path)
    content["stages"] = [{"teacher": "small", "mechanisms": [{"type": "PKDLoss"}, {"type": "BurstLoss"}], "epochs": 2}]
    recipe = parse_recipe(content, "test")
    precompute.fill(recipe, "small")
    folder = stage_dir(recipe, 1)
    where = r"^stage-1, epoch 2: after step 10 of 10 .* weights are not finite .*; the first losses .*: loss_BurstLoss in step 7"
    with pytest.raises(RecipeError, match=rf"{where}\. {folder}/iter_5\.pth is from before"):
        train_stage(recipe, 1)
    assert not {"student.pth", "result.json"} & {file.name for file in folder.iterdir()}
    (kept,) = folder.glob("iter_*.pth")
    assert not not_finite(read_weights(kept, "test"))
    content["student"]["cfg_options"]["optim_wrapper.type"] = "SkippingOptimWrapper"
    content["work_dir"] = str(tmp_path / "skipping")
    content["training"] = {"checkpoint_steps": 7}
    result = train_stage(parse_recipe(content, "test"), 1)
    assert not not_finite(read_weights(result.student, "test"))
