"""A teacher's box AP on the val set, measured as its students' is."""

from pathlib import Path

from mmengine.config import ConfigDict
from mmengine.runner import Runner

from cache import RecipeError
from trainer.annotations import read_annotations
from trainer.checkpoint import load_strict
from trainer.classes import refuse_other_order
from trainer.recipe import Recipe
from trainer.specs import StageSpec
from trainer.stage_config import stage_config
from trainer.teacher import build_model, class_counts


def refuse_other_classes(recipe: Recipe, name: str) -> None:
    """A teacher can be evaluated only where its heads have the data set's classes.

    Raises:
        RecipeError: none of its heads has so many, or they come in another order.
    """
    classes = read_annotations(recipe.dataset.val.ann_file, "dataset.val.ann_file").classes
    counts = class_counts(recipe.teachers[name], name)
    if counts and len(classes) not in counts:
        raise RecipeError(
            f"teachers.{name}: cannot be evaluated: its heads have {', '.join(map(str, sorted(counts)))} classes, the val set "
            f"has {len(classes)}. Give its box AP in points: teachers.{name}.ap"
        )
    refuse_other_order(recipe.teachers[name].checkpoint, classes, f"teachers.{name}.checkpoint")


def evaluation_loader(recipe: Recipe) -> ConfigDict:
    """The loader of the val set as students are evaluated, but for a reduced input scale of theirs."""
    alone = recipe.model_copy(
        update={
            "stages": (StageSpec(),),
            "student": recipe.student.model_copy(update={"inherit": False, "input_scale": 1.0}),
        }
    )
    return stage_config(alone, 1).val_dataloader


def evaluate_teacher(recipe: Recipe, name: str, work_dir: Path) -> float:
    """Box AP of a teacher on the recipe's val set, in points: COCO's, from the images that students are evaluated on.

    mmengine's own test loop with the student's val pipeline (resized to the largest scale of the views), in float32, on a
    GPU if there is one.

    Args:
        work_dir: for mmengine's logs.

    Raises:
        RecipeError: the teacher has other classes than the data set.
        TeacherLoadError: config and checkpoint do not fit.
    """
    refuse_other_classes(recipe, name)
    loader = evaluation_loader(recipe)
    spec = recipe.teachers[name]
    model = build_model(spec, name)
    load_strict(model, spec.checkpoint, f"teachers.{name}.checkpoint")
    runner = Runner(
        model=model,
        work_dir=str(work_dir),
        test_dataloader=loader,
        test_cfg=dict(type="TestLoop"),
        test_evaluator=dict(type="CocoMetric", metric="bbox", ann_file=recipe.dataset.val.ann_file),
        default_scope="mmdet",
        log_level="WARNING",
        experiment_name=f"evaluate-{name}-{spec.checkpoint}",
    )
    metrics = runner.test()
    # a teacher that detects nothing at all gets no metrics from mmdet
    return 100 * float(metrics.get("coco/bbox_mAP", 0.0))
