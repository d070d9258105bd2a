"""A training step with targets from the cache over the same step without any teacher: the part ``steps`` of `benchmarks.cost`.

Between the two stands a step whose targets lie in memory as floats: what it takes beyond the plain step is the mechanism's own
forward and backward, which no cache can take away. Loading is part of every step, in one process and one thread.
"""

import json
import statistics
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.runner import Runner

from benchmarks.arms import read, record
from services.present import table
from tests.trainer import precompute
from trainer import LiveMaps, Recipe, parse_recipe, stage_config
from trainer.config import load_config

TARGET = 1.05


def measure_steps(json_path: Path, root: Path, small: Recipe, rounds: int) -> None:
    """Time the kinds of step of both students, in turn; ten times as many rounds of the small one."""
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    students = {
        "RetinaNet R18, quarter width, 144 x 192, batch 8": (small, 10 * rounds),
        "RetinaNet R50, 416 x 672, batch 1": (_large(root / "large"), rounds),
    }
    for name, (recipe, count) in students.items():
        if name not in read(json_path).get("steps", {}).get("arms", {}):
            record(json_path, "steps", {}, name, time_steps(recipe, count))


def show_steps(content: dict[str, Any]) -> None:
    """The table of all that is there."""
    rows = [
        [name, *(f"{arm[kind]:.1f}" for kind in ("plain", "memory", "cached"))]
        + [f"{arm[ratio]:.3f}" for ratio in ("memory_of_plain", "cached_of_memory", "cached_of_plain")]
        for name, arm in content.get("steps", {}).get("arms", {}).items()
    ]
    kinds = ["plain, ms an image", "targets in memory", "cached", "mechanism (memory/plain)", "cache (cached/memory)"]
    table(f"steps; wanted of cached/plain: at most {TARGET}", ["student", *kinds, "cached/plain"], rows)


class Contender:
    """A model with its loader and optimiser, which takes one step after the other."""

    def __init__(self, cfg: Config) -> None:
        alone = dict(num_workers=0, persistent_workers=False)
        self.loader = Runner.build_dataloader({**cfg.train_dataloader, **alone}, seed=0)
        torch.manual_seed(0)
        self.model = MODELS.build(cfg.model)
        self.model.student.init_weights()
        self.model.train()
        self._optimizer = build_optim_wrapper(self.model, cfg.optim_wrapper)

    def load(self, items: list[int]) -> Any:
        """A batch, as a loader without workers makes it."""
        return self.loader.collate_fn([self.loader.dataset[item] for item in items])

    def step(self, batch: Any) -> None:
        """Forward, losses, backward, optimiser."""
        self.model.train_step(batch, self._optimizer)


class Ready(LiveMaps):
    """Maps that are on the device already."""

    def to(self, *_: object, **__: object) -> "Ready":
        """Themselves."""
        return self


def in_memory(batch: Any) -> None:
    """Put floats in the place of what was read, as if the teacher's maps cost nothing."""
    batch["teacher_maps"] = {
        teacher: [Ready({level: maps.level(level) for level in maps.map_sizes}, maps.map_sizes) for maps in given]
        for teacher, given in batch["teacher_maps"].items()
    }


def time_steps(recipe: Recipe, rounds: int) -> dict[str, Any]:
    """Time each kind of step on the same batches, in an order that changes from round to round.

    Returns:
        Milliseconds an image of ``plain``, ``memory`` (maps that cost nothing) and ``cached``, and their ratios, as medians.
    """
    (name,) = recipe.teachers
    precompute.fill(recipe, name)
    cached = stage_config(recipe, 1)
    (stage,) = recipe.stages
    without = {
        "stages": (stage.model_copy(update={"teacher": None, "mechanisms": ()}),),
        "student": recipe.student.model_copy(update={"inherit": recipe.inherit_from or False}),
    }
    alone = recipe.model_copy(update=without)
    contenders = {
        "plain": Contender(stage_config(alone, 1)),
        "memory": Contender(cached),
        "cached": Contender(cached),
    }
    batches = list(contenders["plain"].loader.batch_sampler)
    full = [batch for batch in batches if len(batch) == len(batches[0])]
    times: dict[str, list[float]] = {kind: [] for kind in contenders}
    order = list(contenders)
    for number in range(rounds + 1):
        items = full[number % len(full)]
        for kind in order:
            contender = contenders[kind]
            if kind == "memory":
                batch = contender.load(items)
                in_memory(batch)
                begin = time.perf_counter()
                contenders["plain"].load(items)  # as long as it takes without targets
            else:
                begin = time.perf_counter()
                batch = contender.load(items)
            contender.step(batch)
            times[kind].append((time.perf_counter() - begin) / len(items))
        order = order[1:] + order[:1]
    return {
        **{kind: 1000 * statistics.median(of[1:]) for kind, of in times.items()},
        **{
            f"{a}_of_{b}": statistics.median(x / y for x, y in zip(times[a][1:], times[b][1:], strict=True))
            for a, b in (("cached", "plain"), ("memory", "plain"), ("cached", "memory"))
        },
        "rounds": rounds,
    }


def _large(root: Path) -> Recipe:
    """RetinaNet R50 at half its usual size, from an R18 of the same family; both random: a step's time is meant."""
    _draw(root)
    shipped = "mmdet::retinanet/retinanet_r50_fpn_1x_coco.py"
    small = {
        "model.backbone.init_cfg": None,
        "model.backbone.depth": 18,
        "model.neck.in_channels": [64, 128, 256, 512],
    }
    file = root / "r18.pth"
    if not file.exists():
        torch.save({"state_dict": MODELS.build(load_config(shipped, small, "teacher").model).state_dict()}, file)
    data = {"ann_file": str(root / "all.json"), "img_dir": str(root)}
    options = {"model.backbone.init_cfg": None, "train_dataloader.batch_size": 1}
    content = {
        "dataset": {"train": data, "val": data},
        "views": {"scale": [666, 400], "flip": "none"},
        "cache": {"uri": str(root / "cache"), "unit_rows": 2},
        "teachers": {"r18": {"config": shipped, "cfg_options": small, "checkpoint": str(file)}},
        "student": {"config": shipped, "cfg_options": options},
        "stages": [{"teacher": "r18", "mechanisms": [{"type": "PKDLoss"}]}],
        "work_dir": str(root / "work"),
    }
    return parse_recipe(content, "benchmark")


def _draw(root: Path, images: int = 3) -> None:
    """Images that the view 666 x 400 pads to 416 x 672, with twelve boxes each."""
    root.mkdir(parents=True, exist_ok=True)
    rng, entries, objects = np.random.default_rng(0), [], []
    for number in range(images):
        coarse = rng.integers(256, size=(48, 80, 3), dtype=np.uint8)
        cv2.imwrite(str(root / f"{number}.jpg"), cv2.resize(coarse, (640, 384), interpolation=cv2.INTER_CUBIC))
        entries.append({"id": number, "width": 640, "height": 384, "file_name": f"{number}.jpg"})
        for x, y in rng.uniform(0, (500, 250), size=(12, 2)).tolist():
            box = [x, y, *rng.uniform(20, 130, size=2).tolist()]
            kind = {"image_id": number, "category_id": 1, "iscrowd": 0, "area": box[2] * box[3], "bbox": box}
            objects.append({"id": len(objects), **kind})
    thing = {"images": entries, "categories": [{"id": 1, "name": "thing"}], "annotations": objects}
    (root / "all.json").write_text(json.dumps(thing))
