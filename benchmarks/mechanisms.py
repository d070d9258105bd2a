"""What each mechanism on features costs beside the student's own training step.

RetinaNet R50 with random weights, one random image of 800 x 1344 with 12 boxes: forward, its losses, backward. Then each
mechanism of the registry that needs features alone, with its defaults, on maps of the size of that student's P3 to P7
(256 channels) and random targets: forward, backward into the student's maps and its own adapters. CPU time of one thread
(what else runs on the machine does not count), median of rounds that take the contenders in turn; the first round warms up.

    OMP_NUM_THREADS=1 python -W ignore -m benchmarks.mechanisms --json mechanisms.json
"""

import json
import logging
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from torch import Tensor, nn

from cache import Level
from services.present import table
from trainer import Batch
from trainer.config import load_config
from trainer.mechanisms import MECHANISMS

HEIGHT, WIDTH = 800, 1344
LEVELS = tuple(Level(f"P{power}", 256, 2**power) for power in range(3, 8))


def student_step() -> tuple[Callable[[], object], DetDataSample]:
    """One forward and backward pass of the student, and the sample that it sees."""
    options = {"model.backbone.init_cfg": None}
    model = MODELS.build(load_config("mmdet::retinanet/retinanet_r50_fpn_1x_coco.py", options, "student.config").model)
    model.init_weights()
    model.train()
    corners = torch.rand(12, 2) * torch.tensor([WIDTH - 200, HEIGHT - 200])
    boxes = torch.cat([corners, corners + 30 + torch.rand(12, 2) * 170], dim=1)
    shapes = dict(img_shape=(HEIGHT, WIDTH), batch_input_shape=(HEIGHT, WIDTH), pad_shape=(HEIGHT, WIDTH))
    truth = InstanceData(bboxes=boxes, labels=torch.randint(80, (12,)))
    sample = DetDataSample(metainfo=shapes, gt_instances=truth)
    image = torch.randn(1, 3, HEIGHT, WIDTH)

    def step() -> None:
        losses = model.loss(image, [sample])
        torch.stack([value for parts in losses.values() for value in parts]).sum().backward()

    return step, sample


def mechanism_step(mechanism: nn.Module, sample: DetDataSample) -> Callable[[], object]:
    """One forward and backward pass of a mechanism on random maps."""

    def maps() -> dict[str, Tensor]:
        return {level.name: torch.randn(1, level.channels, *level.map_size(HEIGHT, WIDTH)) for level in LEVELS}

    students, targets = maps(), maps()
    for one in students.values():
        one.requires_grad_()
    valid = {name: torch.ones_like(one[:, :1], dtype=torch.bool) for name, one in targets.items()}
    batch = Batch(students, targets, valid, [sample])
    return lambda: mechanism(batch).backward()


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Rounds after the first.")] = 5,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write everything measured here.")] = None,
) -> None:
    """Measure the cost of each mechanism."""
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    own, sample = student_step()
    contenders = {"the student's own step": own}
    for name, kind in sorted(MECHANISMS.module_dict.items()):
        if kind.needs == {"features"}:
            contenders[name] = mechanism_step(kind(LEVELS, LEVELS), sample)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds + 1):
        for name, step in contenders.items():
            begin = time.process_time()
            step()
            seconds[name].append(time.process_time() - begin)
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    whole = medians["the student's own step"]
    rows = [(name, f"{median:.2f}", f"{median / whole:.1%}") for name, median in medians.items()]
    table(f"{HEIGHT} x {WIDTH}, one image, P3 to P7", ("", "CPU s", "of the student's step"), rows)
    if json_path:
        json_path.write_text(json.dumps(seconds, indent=1))


if __name__ == "__main__":
    typer.run(main)
