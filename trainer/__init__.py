"""Models: recipes, teachers, students, mechanisms and stages, on mmdet and mmengine. Runs without ray.

Importing this package registers its transforms, data set, sampler, model and hook with mmdet. What the floor above may use
is what is exported here.
"""

import io
import warnings
from contextlib import redirect_stdout

# mmdet prints and warns about its optional plugins on every import
with redirect_stdout(io.StringIO()), warnings.catch_warnings(action="ignore"):
    from mmdet.utils import register_all_modules

    register_all_modules(init_default_scope=True)

from trainer.adaptation import Cost, adaptation_costs
from trainer.annotations import Annotations, annotations_digest, read_annotations
from trainer.asking import Answer, RowAsker, ask, counts, service_name, service_url
from trainer.batches import TotalBatchSampler, ViewSampler, epoch_batches, epoch_order, share
from trainer.compute import Failure, UnitComputer
from trainer.cost import (
    WAYS,
    Job,
    Place,
    Spending,
    StageCost,
    Step,
    TeacherCost,
    Way,
    break_even_epochs,
    break_even_students,
    cheapest,
    spend,
    total,
)
from trainer.dataset import ViewedDataset
from trainer.distiller import Distiller
from trainer.evaluate import evaluate_teacher, evaluation_loader, refuse_other_classes
from trainer.first_epoch import first_epoch
from trainer.groups import teacher_info, wanted_record
from trainer.learning_rate import batch_note
from trainer.loop import ResumableEpochLoop, SeedStepHook, StageCheckpointHook
from trainer.measure import Measured, TeacherSeconds, measure
from trainer.mechanisms import Batch
from trainer.needs import Needs, needs_of
from trainer.order import (
    STUDENT,
    OrderRows,
    Selection,
    choose_rows,
    select_teachers,
    trained_student,
    with_candidates,
)
from trainer.pictures import LEAST_SCORE, Energy, Picture, Pictures, SeenObject, Sight, take_pictures
from trainer.portrait import draw_row, view_pixels
from trainer.pulse import Pulse, read_pulse
from trainer.recipe import Recipe, load_recipe, parse_recipe
from trainer.sample import Agreement, SampleReport, compare_sample
from trainer.sampled import ApplySampledView
from trainer.scenes import CLASSES, SceneOptions, generate
from trainer.specs import SplitSpec, StageSpec, TeacherSpec
from trainer.stage import StageResult, latest_checkpoint, open_stage, train_stage
from trainer.stage_config import TargetSource, refuse_untrainable, stage_config, stage_dir
from trainer.step import DistributedDistiller
from trainer.targets import CachedMaps, LiveMaps, TeacherMaps, assemble, pool_student
from trainer.teacher import Teacher, TeacherOutput, describe, fingerprint_record, head_file
from trainer.transforms import ApplyView, LoadTeacherTargets
from trainer.trial import shortest_trial

__all__ = [
    "CLASSES",
    "LEAST_SCORE",
    "STUDENT",
    "WAYS",
    "Agreement",
    "Annotations",
    "Answer",
    "ApplySampledView",
    "ApplyView",
    "Batch",
    "CachedMaps",
    "Cost",
    "Distiller",
    "DistributedDistiller",
    "Energy",
    "Failure",
    "Job",
    "LiveMaps",
    "LoadTeacherTargets",
    "Measured",
    "Needs",
    "OrderRows",
    "Picture",
    "Pictures",
    "Place",
    "Pulse",
    "Recipe",
    "ResumableEpochLoop",
    "RowAsker",
    "SampleReport",
    "SceneOptions",
    "SeedStepHook",
    "SeenObject",
    "Selection",
    "Sight",
    "Spending",
    "SplitSpec",
    "StageCheckpointHook",
    "StageCost",
    "StageResult",
    "StageSpec",
    "Step",
    "TargetSource",
    "Teacher",
    "TeacherCost",
    "TeacherMaps",
    "TeacherOutput",
    "TeacherSeconds",
    "TeacherSpec",
    "TotalBatchSampler",
    "UnitComputer",
    "ViewSampler",
    "ViewedDataset",
    "Way",
    "adaptation_costs",
    "annotations_digest",
    "ask",
    "assemble",
    "batch_note",
    "break_even_epochs",
    "break_even_students",
    "cheapest",
    "choose_rows",
    "compare_sample",
    "counts",
    "describe",
    "draw_row",
    "epoch_batches",
    "epoch_order",
    "evaluate_teacher",
    "evaluation_loader",
    "fingerprint_record",
    "first_epoch",
    "generate",
    "head_file",
    "latest_checkpoint",
    "load_recipe",
    "measure",
    "needs_of",
    "open_stage",
    "parse_recipe",
    "pool_student",
    "read_annotations",
    "read_pulse",
    "refuse_other_classes",
    "refuse_untrainable",
    "select_teachers",
    "service_name",
    "service_url",
    "share",
    "shortest_trial",
    "spend",
    "stage_config",
    "stage_dir",
    "take_pictures",
    "teacher_info",
    "total",
    "train_stage",
    "trained_student",
    "view_pixels",
    "wanted_record",
    "with_candidates",
]
