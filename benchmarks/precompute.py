"""images/s of a whole precompute on Ray against the bare forward of its teacher, on the same views, on CPUs.

The teacher is a Swin-T detector as mmdet ships its config, with random weights; the images are generated (640 x 480, JPEG),
the view is 1333 x 800 without a flip; int8 P3-P7 and detections are stored, so that both run the whole detector. Two
contenders take turns, each in a fresh actor with all CPUs and ``--threads`` threads of torch:

- "precompute": ``services.precompute.fill``, what ``mtpd precompute`` calls, into an empty cache: images are read, decoded
  and resized, the teacher runs, features are quantised, shards are written, flushed and committed.
- "bare": mmdet's ``test_step`` on the same views, decoded before the clock starts, after one forward to warm up.

The start (Ray's actor, imports, the model's weights) is no part of a rate. Rates of the precompute: "all" from the first unit
handed out to the last committed, first decoding and last writing included, which a long run spreads over many units;
"steady" from the first commit to the last: at least 0.95 of the bare rate is aimed at. "cpu" compares the processor's seconds
a view, of all threads of the actor, between the same commits. What other programs on the machine disturb least is the ratio
"by parts": the share of the precompute's time in which its device is busy, over how much longer the actor's computation
(teacher, quantisation) takes than the bare forward, both called in turn on each view in the bare actor. A third in turn there,
"features", is what the teacher takes where nothing wants detections: backbone and neck.

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
from pathlib import Path
from typing import Annotated, Any
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
from services import filling, precompute
from services.pool import Pool
from trainer import Recipe, Teacher, UnitComputer, parse_recipe
from trainer.compute import Pixels
from trainer.config import load_config

CONFIGS = {
    "mask-rcnn": ("mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py", "model.test_cfg.rcnn.score_thr"),
    "retinanet": ("mmdet::swin/retinanet_swin-t-p4-w7_fpn_1x_coco.py", "model.test_cfg.score_thr"),
}
WIDTH, HEIGHT, UNIT_ROWS = 640, 480, 2
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
    spec = {"config": config, "cfg_options": {key: threshold}, "checkpoint": str(root / "w.pth"), "detections": True}
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


class Recorded(Pool):
    """The pool of a precompute, with the moment at which each unit was committed."""

    last: "Recorded"

    def run(self, units: Iterable[cache.Unit]) -> Iterator[Any]:
        """As `Pool.run`."""
        Recorded.last, self.outcomes = self, []
        for outcome in super().run(units):
            self.outcomes.append((time.monotonic(), actor_seconds(), outcome))
            yield outcome


def actor_seconds() -> float:
    """Processor's seconds that the teacher's actor has used; Ray's processes descend from this one."""
    below = psutil.Process().children(recursive=True)
    actors = [process.cpu_times() for process in below if "ray::TeacherActor" in " ".join(process.cmdline())]
    return sum(times.user + times.system for times in actors)


def run_precompute(recipe: Recipe, images: int) -> dict[str, float]:
    """A precompute into an empty cache; rates in images/s."""
    begin = time.monotonic()
    with mock.patch.object(filling, "Pool", Recorded), redirect_stdout(io.StringIO()):
        result = precompute.fill(recipe, "teacher")
    pool = Recorded.last
    assert not result.failures
    (first, used_first, unit), (last, used_last, _) = pool.outcomes[0], pool.outcomes[-1]
    device = sum(record.device_seconds for *_, record in pool.outcomes)
    begun, later = pool.begun or begin, images - unit.rows
    rates = dict(all=images / (last - begun), steady=later / (last - first), cpu=later / (used_last - used_first))
    return rates | dict(start_s=begun - begin, on_the_device=device / (last - begun))


@ray.remote
class Bare:
    """A teacher, and its views decoded."""

    def load(self, recipe: Recipe) -> int:
        """Load the teacher, decode every view, run one forward. Returns the threads of torch."""
        plan, spec = precompute.plan_teacher(recipe, "teacher"), recipe.teachers["teacher"]
        self._teacher = Teacher(spec, "teacher")
        self._computer = UnitComputer(self._teacher, plan.info, recipe.policy, recipe.dataset.train, batch_size=1)
        self._pixels = [pixels for unit in plan.units() for pixels in self._computer.decode(unit)[0]]
        self._forward(self._pixels[0])
        return torch.get_num_threads()

    def run(self) -> dict[str, float]:
        """Rates of the bare forward; beside it, in turn on each view, what targets take to compute, and features alone."""
        calls = {
            "bare": self._forward,
            "compute": lambda one: self._computer.compute([one]),
            "features": lambda one: self._teacher([one.image], detect=False),
        }
        spent = {kind: np.zeros(2) for kind in calls}
        for pixels in self._pixels:
            for kind, call in calls.items():
                before = np.array([time.monotonic(), time.process_time()])
                call(pixels)
                spent[kind] += np.array([time.monotonic(), time.process_time()]) - before
        wall, cpu = len(self._pixels) / spent["bare"]
        of_bare = {kind: spent[kind][1] / spent["bare"][1] for kind in ("compute", "features")}
        return {"bare": wall, "bare_cpu": cpu, **of_bare}

    @torch.no_grad()
    def _forward(self, pixels: Pixels) -> None:
        size = tuple(pixels.image.shape[-2:])
        sample = DetDataSample(metainfo=dict(img_shape=size, ori_shape=size, scale_factor=(1.0, 1.0)))
        self._teacher._model.test_step(dict(inputs=[pixels.image], data_samples=[sample]))


def main(
    images: Annotated[int, typer.Option(min=2 * UNIT_ROWS)] = 8,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch in an actor.")] = 1,
    teacher: Annotated[str, typer.Option(help=f"One of {', '.join(CONFIGS)}.")] = "mask-rcnn",
    threshold: Annotated[float, typer.Option("--score-threshold", help="Of the detections.")] = 0.05,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write everything measured here.")] = None,
) -> None:
    """Measure what a precompute costs beside its teacher."""
    logging.disable(logging.WARNING)
    os.environ.update(OMP_NUM_THREADS=str(threads), RAY_USAGE_STATS_ENABLED="0", RAY_AUTH_MODE="disabled")
    ray.init("local", include_dashboard=False, log_to_driver=False, logging_level="ERROR", object_store_memory=2**28)
    measured: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        content = make_recipe(Path(name), teacher, images, threshold)
        for number in range(rounds):
            content["cache"]["uri"] = str(Path(name) / f"cache-{number}")
            recipe = parse_recipe(content, "benchmark")
            bare = Bare.options(num_cpus=ray.cluster_resources()["CPU"]).remote()
            used = ray.get(bare.load.remote(recipe))
            one = ray.get(bare.run.remote())
            ray.kill(bare)
            for key, value in (one | run_precompute(recipe, images)).items():
                measured.setdefault(key, []).append(value)
    ray.shutdown()
    middle = {key: statistics.median(values) for key, values in measured.items()}
    pairs = {"all": "bare", "steady": "bare", "bare_cpu": "bare_cpu", "cpu": "bare_cpu"}
    ratios = {key: statistics.median(np.divide(measured[key], measured[other])) for key, other in pairs.items()}
    table = Table("", "images/s", "of bare", title=f"{teacher} Swin-T, {images} views, {used} thread(s) of torch")
    for key in ("bare", *pairs):
        table.add_row(key, f"{middle[key]:.3f}", f"{ratios.get(key, 1):.3f}")
    Console().print(table)
    parts = middle["on_the_device"] / middle["compute"]
    print(f"start {middle['start_s']:.1f} s; on the device {middle['on_the_device']:.1%}")
    print(f"compute: {middle['compute']:.3f} times the processor's seconds of bare; by parts {parts:.3f} of bare")
    print(f"features alone: {middle['features']:.3f} times the processor's seconds of bare")
    print(f"of the bare rate at least {TARGET}: steady {ratios['steady'] >= TARGET}, by parts {parts >= TARGET}")
    if json_path:
        json_path.write_text(json.dumps({"median": middle, "ratios": ratios, "rounds": measured}, indent=1))


if __name__ == "__main__":
    typer.run(main)
