"""images/s of a precompute on Ray against the bare forward of its teacher, on the same views, on CPUs.

The teacher is a Swin-T detector as mmdet ships its config, with random weights; the images are generated (640 x 480, JPEG),
the view is 1333 x 800 without a flip; int8 P3-P7 and detections are stored. Two contenders, each in an actor of its own that
lives through the whole run and has ``--threads`` threads of torch, take turns on the same views:

- "precompute": ``services.precompute.fill``, what ``mtpd precompute`` calls, into an empty cache: images are read, decoded
  and resized, the teacher runs, features are quantised, shards are written, flushed and committed. Its pool is handed a few
  units at a time; between these it rests.
- "bare": mmdet's ``test_step`` on the views of these units, decoded before the clock starts; before and after each turn of the
  precompute, whose yardstick is the mean of the two: what other programs on the machine take falls on both alike.

The start (Ray's actors, imports, the model's weights, a forward to warm up) is no part of a rate. The rate of a turn is "steady":
from its first commit to its last, so that a unit's decoding and writing overlap with others' forwards as in a long run. "cpu"
compares, between the same commits, the processor's seconds a view of all threads of the actor: what is added to the forward,
whoever else is on the machine. Ratios are medians of the turns' own; at least 0.95 is aimed at.

With random weights nothing scores above the shipped threshold; ``--score-threshold 0`` gives 100 detections a view::

    OMP_NUM_THREADS=1 python -W ignore -m benchmarks.precompute --json precompute.json
"""

import io
import json
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import redirect_stdout
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, ClassVar
from unittest import mock

import cv2
import numpy as np
import psutil
import ray
import torch
import typer
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from rich.console import Console
from rich.table import Table

import cache
from services import precompute
from services.pool import Pool
from trainer import Recipe, Teacher, UnitComputer, parse_recipe
from trainer.compute import Pixels
from trainer.config import load_config

CONFIGS = {
    "mask-rcnn": ("mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py", "model.test_cfg.rcnn.score_thr"),
    "retinanet": ("mmdet::swin/retinanet_swin-t-p4-w7_fpn_1x_coco.py", "model.test_cfg.score_thr"),
}
WIDTH, HEIGHT, UNIT_ROWS = 640, 480, 2
TURN = 3  # units
TARGET = 0.95


def make_recipe(root: Path, teacher: str, images: int, threshold: float) -> dict[str, Any]:
    """Images, annotations, a checkpoint, and the recipe of them; ``cache.uri`` is still to be given."""
    rng, entries, (config, key) = np.random.default_rng(0), [], CONFIGS[teacher]
    for i in range(images):
        coarse = rng.integers(256, size=(HEIGHT // 8, WIDTH // 8, 3), dtype=np.uint8)
        cv2.imwrite(str(root / f"{i}.jpg"), cv2.resize(coarse, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC))
        entries.append({"id": i, "width": WIDTH, "height": HEIGHT, "file_name": f"{i}.jpg"})
    thing = {"images": entries, "categories": [{"id": 1, "name": "thing"}], "annotations": []}
    (root / "all.json").write_text(json.dumps(thing))
    torch.manual_seed(0)
    model = MODELS.build(load_config(config, {}, "teacher").model)
    torch.save({"state_dict": model.state_dict()}, root / "w.pth")
    spec = {"config": config, "cfg_options": {key: threshold}, "checkpoint": str(root / "w.pth")}
    split = {"ann_file": str(root / "all.json"), "img_dir": str(root)}
    return {
        "dataset": {"train": split, "val": split},
        "views": {"scale": [1333, 800], "flip": "none"},
        "cache": {"uri": "", "unit_rows": UNIT_ROWS},
        "teachers": {"teacher": spec},
        "student": {"config": "mmdet::retinanet/retinanet_r50_fpn_1x_coco.py"},
        "stages": [{"teacher": "teacher", "mechanisms": [{"type": "PKDLoss", "loss_weight": 1.0}]}],
        "work_dir": str(root / "work"),
    }


class Turns(Pool):
    """The pool of a precompute, which rests while the bare teacher runs.

    Attributes:
        bare: the actor of the bare teacher.
        turns: what was measured, one for each turn.
        seconds: after so many no turn begins.
    """

    bare: Any
    seconds: float
    turns: ClassVar[list[dict[str, float]]]

    def run(self, units: Iterable[cache.Unit]) -> Iterator[Any]:
        """As `Pool.run`."""
        source, before, begun = iter(units), None, time.monotonic()
        while (turn := list(islice(source, TURN))) and (len(self.turns) < 2 or time.monotonic() - begun < self.seconds):
            rows = [row for unit in turn for row in unit.rows]
            before = before or ray.get(self.bare.run.remote(rows))
            commits = []
            for outcome in super().run(turn):
                commits.append((time.monotonic(), actor_seconds(), outcome))
                yield outcome
            after = ray.get(self.bare.run.remote(rows))
            (first, used_first, unit), (last, used_last, _) = commits[0], commits[-1]
            views = len(rows) - unit.rows
            device = sum(record.device_seconds for *_, record in commits[1:])
            measured = {"steady": views / (last - first), "cpu": views / (used_last - used_first)}
            both = {key: statistics.mean((before[key], after[key])) for key in after}
            self.turns.append(both | measured | {"on_the_device": device / (last - first)})
            before = after


def actor_seconds() -> float:
    """Processor's seconds that the teacher's actor has used; Ray's processes descend from this one."""
    below = psutil.Process().children(recursive=True)
    actors = [process.cpu_times() for process in below if "ray::TeacherActor" in " ".join(process.cmdline())]
    return sum(times.user + times.system for times in actors)


@ray.remote
class Bare:
    """A teacher, and its views decoded."""

    def load(self, recipe: Recipe) -> int:
        """Load the teacher, run one forward. Returns the threads of torch."""
        plan, spec = precompute.plan_teacher(recipe, "teacher"), recipe.teachers["teacher"]
        self._teacher = Teacher(spec, "teacher")
        self._computer = UnitComputer(self._teacher, plan.info, recipe.policy, recipe.dataset.train, batch_size=1)
        self._forward(self._computer.decode(next(plan.units()))[0][0])
        return torch.get_num_threads()

    def run(self, rows: list[cache.Row]) -> dict[str, float]:
        """Views a second of the bare forward, and a second of the processor."""
        views, _ = self._computer.decode_rows(rows)
        wall, processor = time.monotonic(), time.process_time()
        for pixels in views:
            self._forward(pixels)
        wall, processor = time.monotonic() - wall, time.process_time() - processor
        return {"bare": len(views) / wall, "bare_cpu": len(views) / processor}

    @torch.no_grad()
    def _forward(self, pixels: Pixels) -> None:
        size = tuple(pixels.image.shape[-2:])
        sample = DetDataSample(metainfo=dict(img_shape=size, ori_shape=size, scale_factor=(1.0, 1.0)))
        self._teacher._model.test_step(dict(inputs=[pixels.image], data_samples=[sample]))


def main(
    turns: Annotated[int, typer.Option(min=1, help="Turns that count, after a first.")] = 12,
    seconds: Annotated[float, typer.Option(help="After so many no turn begins.")] = 600,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch in each actor.")] = 1,
    teacher: Annotated[str, typer.Option(help=f"One of {', '.join(CONFIGS)}.")] = "mask-rcnn",
    threshold: Annotated[float, typer.Option("--score-threshold", help="Of the detections.")] = 0.05,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write everything measured here.")] = None,
) -> None:
    """Measure what a precompute costs beside its teacher."""
    logging.disable(logging.WARNING)
    os.environ.update(OMP_NUM_THREADS=str(threads), RAY_USAGE_STATS_ENABLED="0", RAY_AUTH_MODE="disabled")
    ray.init("local", include_dashboard=False, log_to_driver=False, logging_level="ERROR", object_store_memory=2**28)
    with tempfile.TemporaryDirectory() as name:
        content = make_recipe(Path(name), teacher, (turns + 1) * TURN * UNIT_ROWS, threshold)
        content["cache"]["uri"] = str(Path(name) / "cache")
        recipe = parse_recipe(content, "benchmark")
        Turns.bare, Turns.turns, Turns.seconds = Bare.options(num_cpus=0).remote(), [], seconds
        used = ray.get(Turns.bare.load.remote(recipe))
        with mock.patch.object(precompute, "Pool", Turns), redirect_stdout(io.StringIO()):
            result = precompute.fill(recipe, "teacher")
        assert not result.failures
    ray.shutdown()
    measured = {key: [turn[key] for turn in Turns.turns[1:]] for key in Turns.turns[0]}
    middle = {key: statistics.median(values) for key, values in measured.items()}
    pairs = {"steady": "bare", "cpu": "bare_cpu"}
    paired = {key: np.divide(measured[key], measured[other]).tolist() for key, other in pairs.items()}
    ratios = {key: statistics.median(values) for key, values in paired.items()}
    table = Table("", "per s", "of bare", "turns", title=f"{teacher} Swin-T, views a second, {used} thread(s) of torch")
    table.add_row("bare", f"{middle['bare']:.3f}")
    for key in pairs:
        table.add_row(
            key, f"{middle[key]:.3f}", f"{ratios[key]:.3f}", " ".join(f"{value:.2f}" for value in paired[key])
        )
    Console().print(table)
    print(
        f"on the device {middle['on_the_device']:.1%} of the time; compute {middle['compute']:.3f} times the bare forward's CPU"
    )
    print(
        f"steady at least {TARGET} of bare: {ratios['steady'] >= TARGET}; in processor's seconds: {ratios['cpu'] >= TARGET}"
    )
    if json_path:
        json_path.write_text(
            json.dumps({"median": middle, "ratios": ratios, "paired": paired, "turns": Turns.turns}, indent=1)
        )


if __name__ == "__main__":
    typer.run(main)
