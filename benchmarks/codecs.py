"""What each precision of the cache keeps of a trained detector's features, and what its error does to the losses.

The first table: the demo's two teachers on generated scenes and, where there is a folder of them, on real photographs. Per
level and precision the bytes of a row (maps and scales; not the 28 bytes of checksum, label and index entry), the
signal-to-noise ratio of the restored map against the float32 map (mean over images, and the worst image) and their
cosine. ``P3 / 2`` stores P3 averaged over windows of 2 x 2; it is compared at P3's own size, every average repeated.

The second table: each mechanism on the demo's student, once as it is initialised and once after a short training with that
mechanism and float32 targets. The same student and batches, in one case with float32 targets T, in the other with
restored ones T + n:

- ``loss``: the relative change of the loss, mean and deviation over batches; ``energy``: the part of it that n has by
  itself, ``sum n^2 / N`` (MGD). They are equal where n is uncorrelated with what is left of ``G - T``.
- ``error``, ``angle``, ``slope``: of the gradient with respect to the student's maps: ``|g' - g| / |g|``, the angle between
  both, and the regression ``<g', g> / <g, g>`` - a slope of 1 means that no part of the error lies along the gradient.
- ``neck error``, ``cosine``, ``sum``: of the gradient with respect to the neck's weights, averaged over all batches: the
  relative error that is left, its cosine with the gradient, and ``B |mean e|^2 / mean |e|^2`` over B batches: 1 for errors
  that are independent and average out, B for one that is always the same.

Run from the repository's root::

    OMP_NUM_THREADS=1 python -m benchmarks.codecs --json codecs.json
"""

import json
import logging
import math
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from io import StringIO
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import mmcv
import torch
import torch.nn.functional as F
import typer
from mmengine.runner import Runner
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks import fidelity
from cache import Precision, decode, encode, pool
from cache.shard import compress
from trainer import Distiller, LiveMaps, Teacher, TeacherSpec, assemble, stage_config

Row = dict[str, Any]

PRECISIONS: tuple[Precision, ...] = ("float16", "int8", "int4")
TEACHERS = ("r18_w20", "swin_w32")
PHOTOGRAPHS = Path(__file__).parents[2] / "shared" / "data" / "bccd" / "images"
PHOTOGRAPH_SCALE = (640, 480)


def restore(maps: Tensor, precision: Precision, window: int = 1) -> tuple[Tensor, int, int]:
    """Maps (1, C, h, w) as they come back from the cache, their bytes as stored, and those with zstd."""
    encoded = encode(pool(maps, window), precision)
    stored = [encoded.values.numpy(), *([] if encoded.scales is None else [encoded.scales.numpy()])]
    plain, packed = (sum(compress(array, how).size for array in stored) for how in ("none", "zstd"))
    size = tuple(-(-side // window) for side in maps.shape[-2:])
    restored = decode(encoded.values, encoded.scales, size)
    height, width = maps.shape[-2:]
    return F.interpolate(restored, scale_factor=window)[..., :height, :width], plain, packed


def snr(signal: Tensor, noise: Tensor) -> float:
    """Signal-to-noise ratio in dB."""
    return 20 * math.log10(float(signal.norm()) / float(noise.norm()))


def features(name: str, images: Sequence[Path], scale: tuple[int, int]) -> Iterator[dict[str, Tensor]]:
    """A demo teacher's float32 maps of one image after the other."""
    config, checkpoint = fidelity.DEMO / f"retinanet_{name}.py", fidelity.DEMO / f"{name}.pth"
    teacher = Teacher(TeacherSpec(config=str(config), checkpoint=str(checkpoint)), name)
    for file in images:
        view = mmcv.imrescale(mmcv.imread(file), scale)
        yield teacher([torch.from_numpy(view).permute(2, 0, 1)], detect=False).features


def kept(data: str, teacher: str, images: Sequence[Path], scale: tuple[int, int]) -> list[Row]:
    """Bytes and errors per level and precision, means over images."""
    values: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for levels in features(teacher, images, scale):
        cases = [(level, precision, 1) for level in levels for precision in PRECISIONS] + [("P3", "int8", 2)]
        for level, precision, window in cases:
            maps = levels[level].double()
            restored, plain, packed = restore(levels[level], precision, window)
            numbers = values[level if window == 1 else f"{level} / {window}", precision]
            numbers["bytes"].append(plain)
            numbers["zstd_bytes"].append(packed)
            numbers["snr"].append(snr(maps, restored - maps))
            numbers["cosine"].append(float(F.cosine_similarity(maps.flatten(), restored.double().flatten(), dim=0)))
    rows = []
    for (level, precision), numbers in values.items():
        mean = {key: statistics.mean(list_) for key, list_ in numbers.items()}
        whole = statistics.mean(values[level[:2], "float16"]["bytes"])
        shares = {"percent": 100 * mean["bytes"] / whole, "zstd_percent": 100 * mean["zstd_bytes"] / whole}
        names = {"data": data, "teacher": teacher, "level": level, "precision": precision}
        rows.append({**names, **mean, **shares, "worst_snr": min(numbers["snr"])})
    return rows


def gradient(distiller: Distiller, maps: Sequence[Tensor], targets: Sequence[LiveMaps], seed: int) -> Row:
    """The mechanism's loss for these targets, and its gradients with respect to the student's maps and neck."""
    (mechanism,) = distiller.mechanisms.values()
    student = dict(zip(mechanism.pairs, maps, strict=True))
    placed = {level: assemble(targets, level, maps.shape[-2:]) for level, maps in student.items()}
    teacher, valid = ({level: both[n] for level, both in placed.items()} for n in (0, 1))
    torch.manual_seed(seed)  # MGD draws its masks
    loss = mechanism(student, teacher, valid)
    by_map = torch.autograd.grad(loss, maps, retain_graph=True)
    by_weight = torch.autograd.grad(maps, list(distiller.student.neck.parameters()), by_map, retain_graph=True)
    flat = {"maps": by_map, "neck": by_weight, "targets": list(teacher.values())}
    return {"loss": float(loss), **{key: torch.cat([p.flatten() for p in part]).double() for key, part in flat.items()}}


def compare(exact: Row, stored: Row, weight_per_image: float) -> Row:
    """One batch: the loss and the gradient by the maps, with stored targets against exact ones."""
    g, other = exact["maps"], stored["maps"]
    slope = float(other @ g / (g @ g))
    return {
        "loss": 100 * (stored["loss"] / exact["loss"] - 1),
        "energy": 100 * weight_per_image * float((stored["targets"] - exact["targets"]).square().sum()) / exact["loss"],
        "error": 100 * float((other - g).norm() / g.norm()),
        "angle": math.degrees(math.atan2(float((other - slope * g).norm()), slope * float(g.norm()))),
        "slope": slope,
        "neck": stored["neck"] - exact["neck"],
    }


def disturbed(distiller: Distiller, batches: Sequence[Any], names: Row) -> list[Row]:
    """What each precision does to the loss and its gradients, over batches."""
    found: dict[str, list[Row]] = defaultdict(list)
    mean_gradient: Tensor | float = 0.0
    for seed, batch in enumerate(batches):
        data = distiller.data_preprocessor(dict(batch), True)
        maps = distiller.student.neck(distiller.student.backbone(data["inputs"]))
        targets = [sample.teacher_maps for sample in data["data_samples"]]
        exact = gradient(distiller, maps, targets, seed)
        mean_gradient = mean_gradient + exact["neck"] / len(batches)
        for precision in PRECISIONS:
            lossy = [
                LiveMaps({k: restore(m[None], precision)[0][0] for k, m in t.maps.items()}, t.map_sizes) for t in targets
            ]
            weight = fidelity.MECHANISMS[names["mechanism"]]["loss_weight"] / len(targets)
            found[precision].append(compare(exact, gradient(distiller, maps, lossy, seed), weight))
    return [{**names, "precision": p, **summary(rows, mean_gradient)} for p, rows in found.items()]


def summary(batches: Sequence[Row], mean_gradient: Tensor) -> Row:
    """Means over batches, and what of the gradient by the neck's weights does not average out."""
    errors = [batch.pop("neck") for batch in batches]
    mean_error = torch.stack(errors).mean(dim=0)
    persistent = len(errors) * mean_error.square().sum() / torch.stack([e.square().sum() for e in errors]).mean()
    return {
        **{key: statistics.mean(batch[key] for batch in batches) for key in batches[0]},
        "loss_deviation": statistics.stdev(batch["loss"] for batch in batches),
        "neck_error": 100 * float(mean_error.norm() / mean_gradient.norm()),
        "neck_cosine": float(F.cosine_similarity(mean_error, mean_gradient, dim=0)),
        "neck_sum": float(persistent),
    }


def losses(root: Path, mechanism: str, count: int, epochs: int) -> list[Row]:
    """A student before and after a short training with one mechanism."""
    cfg = stage_config(fidelity.make_recipe(root, mechanism, "online", 0, epochs), 1, "online")
    rows: list[Row] = []
    with redirect_stdout(StringIO()):  # pycocotools prints
        runner = Runner.from_cfg(cfg)
        loader = runner.build_dataloader(cfg.train_dataloader, seed=0)
        for state in ("initialised", "trained"):
            runner.model.init_weights() if state == "initialised" else runner.train()
            runner.model.train()
            rows += disturbed(runner.model, list(islice(loader, count)), {"mechanism": mechanism, "student": state})
    return rows


def show(title: str, rows: Sequence[Row], columns: dict[str, tuple[str, str]], console: Console) -> None:
    """A table: for every column its key and how the number is written."""
    table = Table(title=title)
    for heading, (_, form) in columns.items():
        table.add_column(heading, justify="right" if form else "left")
    for row in rows:
        table.add_row(*(format(row[key], form) for key, form in columns.values()))
    console.print(table)
