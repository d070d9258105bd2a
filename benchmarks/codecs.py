"""What each precision of the cache keeps of a trained detector's features, and what its error does to the losses.

The first table: the demo's teachers on generated scenes and, where they are there, on photographs. Per level and precision
a row's bytes (maps and scales; not the 28 bytes of checksum, label and index entry) and their share of float16; then the
restored map against the float32 one: signal-to-noise ratio in dB (mean over images, and the worst), cosine, slope of the
regression. ``P3 / 2`` is pooled by 2 x 2, compared at P3's own size with every average repeated.

The second table: each mechanism on the demo's student with the Swin teacher's neck, as it is initialised (random
backbone) and after a short training. The same student and B batches of 4 scenes with float32 targets T and with restored
ones T + n; in percent, means over batches: ``loss``, its change; ``energy``, ``sum n^2 / N``, MGD's expected change if n is
uncorrelated with ``G - T``; of the gradient by the student's maps ``error``, ``|g' - g| / |g|``, ``angle`` in degrees, and
``slope``, ``<g', g> / <g, g>``, 1 if no part of the error lies along the gradient. Of the gradient by the neck's weights,
averaged over the batches, with its error e: ``neck error``, ``neck cosine`` of both, and ``neck sum``,
``B |mean e|^2 / mean |e|^2``: 1 for independent errors, which average out, B for one that is always the same.

Run from the repository's root: ``OMP_NUM_THREADS=1 python -m benchmarks.codecs --json codecs.json``.
"""

import json
import logging
import math
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
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
from torch import Tensor

from benchmarks import fidelity
from cache import Precision, decode, encode, pool
from cache.shard import compress
from services.present import table
from trainer import Batch, Distiller, LiveMaps, Teacher, TeacherSpec, assemble, stage_config

Row = dict[str, Any]
PRECISIONS: tuple[Precision, ...] = ("float16", "int8", "int4")
PHOTOGRAPHS = Path(__file__).parents[2] / "shared" / "data" / "bccd" / "images"
# how numbers are written, by their column
FORMS = {"bytes": ",.0f", "zstd bytes": ",.0f", "cosine": ".6f", "slope": ".4f", "loss": "+.3f", "neck cosine": "+.3f"}
FORMS |= dict.fromkeys(("%", "zstd %", "snr", "worst snr"), ".1f")
FORMS |= dict.fromkeys(("images", "teacher", "level", "precision", "mechanism", "student"), "")


def means(rows: Sequence[Row]) -> Row:
    """Mean of every number."""
    return {key: statistics.mean(row[key] for row in rows) for key in rows[0]}


def joined(tensors: Iterable[Tensor]) -> Tensor:
    """All numbers in one vector, float64."""
    return torch.cat([tensor.flatten() for tensor in tensors]).double()


def restore(maps: Tensor, precision: Precision, window: int = 1) -> tuple[Tensor, int, int]:
    """Maps (1, C, h, w) as they come back from the cache, their bytes as stored, and those with zstd."""
    height, width = maps.shape[-2:]
    encoded = encode(pool(maps, window), precision)
    arrays = [array.numpy() for array in (encoded.values, encoded.scales) if array is not None]
    plain, packed = (sum(compress(array, how).size for array in arrays) for how in ("none", "zstd"))
    restored = decode(encoded.values, encoded.scales, (-(-height // window), -(-width // window)))
    return F.interpolate(restored, scale_factor=window)[..., :height, :width], plain, packed


def kept(maps: Sequence[Tensor], precision: Precision, window: int = 1) -> Row:
    """Bytes and errors of one image's maps."""
    restored, plain, packed = zip(*(restore(one, precision, window) for one in maps), strict=True)
    exact, stored = joined(maps), joined(restored)
    sizes = {"bytes": sum(plain), "zstd bytes": sum(packed)}
    shares = {key.replace("bytes", "%"): 50 * size / exact.numel() for key, size in sizes.items()}
    snr = 20 * math.log10(float(exact.norm() / (stored - exact).norm()))
    slope, cosine = float(stored @ exact / exact.square().sum()), float(F.cosine_similarity(exact, stored, dim=0))
    return {**sizes, **shares, "snr": snr, "cosine": cosine, "slope": slope}


def features(name: str, images: Sequence[Path], scale: tuple[int, int]) -> list[Row]:
    """What the cache keeps of a demo teacher's maps, per level and precision."""
    files = {"config": fidelity.DEMO / f"retinanet_{name}.py", "checkpoint": fidelity.DEMO / f"{name}.pth"}
    teacher = Teacher(TeacherSpec.model_validate(files), name)
    found: dict[tuple[str, Precision], list[Row]] = defaultdict(list)
    for file in images:
        view = torch.from_numpy(mmcv.imrescale(mmcv.imread(file), scale)).permute(2, 0, 1)
        levels = {level: [maps] for level, maps in teacher([view], detect=False).features.items()}
        levels["all"] = [maps for (maps,) in levels.values()]
        for level, maps in levels.items():
            for precision in PRECISIONS:
                found[level, precision].append(kept(maps, precision))
        found["P3 / 2", "int8"].append(kept(levels["P3"], "int8", window=2))
    return [
        {"teacher": name, "level": level, "precision": p, **means(rows), "worst snr": min(row["snr"] for row in rows)}
        for (level, p), rows in found.items()
    ]


def gradient(
    distiller: Distiller, maps: Sequence[Tensor], targets: Sequence[LiveMaps], samples: Sequence[Any], seed: int
) -> Row:
    """The mechanism's loss for these targets, and its gradients by the student's maps and by its neck's weights."""
    (mechanism,) = distiller.mechanisms.values()
    student = dict(zip(mechanism.pairs, maps, strict=True))
    placed = {level: assemble(targets, level, own.shape[-2:]) for level, own in student.items()}
    teacher, valid = ({level: both[n] for level, both in placed.items()} for n in (0, 1))
    torch.manual_seed(seed)  # MGD draws its masks
    loss = mechanism(Batch(student, teacher, valid, samples))
    by_map = torch.autograd.grad(loss, maps, retain_graph=True)
    by_weight = torch.autograd.grad(maps, list(distiller.student.neck.parameters()), by_map, retain_graph=True)
    return {"loss": float(loss), "maps": joined(by_map), "neck": joined(by_weight), "targets": joined(teacher.values())}


def compare(exact: Sequence[Row], stored: Sequence[Row], share: float | None) -> Row:
    """Stored targets against exact ones, batch by batch. ``share``: what one squared error adds to a loss that is a sum."""
    rows = []
    for e, s in zip(exact, stored, strict=True):
        slope = float(s["maps"] @ e["maps"] / e["maps"].square().sum())
        error = float((s["maps"] - e["maps"]).norm() / e["maps"].norm())
        angle = math.degrees(math.atan2(math.sqrt(max(0, error**2 - (slope - 1) ** 2)), slope))
        rows.append({"loss": 100 * (s["loss"] / e["loss"] - 1), "error": 100 * error, "angle": angle, "slope": slope})
        if share is not None:
            rows[-1]["energy"] = 100 * share * float((s["targets"] - e["targets"]).square().sum()) / e["loss"]
    errors = torch.stack([s["neck"] - e["neck"] for e, s in zip(exact, stored, strict=True)])
    mean, by_neck = errors.mean(dim=0), torch.stack([e["neck"] for e in exact]).mean(dim=0)
    left, cosine = 100 * float(mean.norm() / by_neck.norm()), float(F.cosine_similarity(mean, by_neck, dim=0))
    total = len(errors) * float(mean.square().sum() / errors.square().sum(dim=1).mean())
    return {**means(rows), "neck error": left, "neck cosine": cosine, "neck sum": total}


def disturbance(distiller: Distiller, batches: Iterable[Any], share: float | None) -> list[Row]:
    """What each precision does to the loss and its gradients; ``share`` as in `compare`."""
    found: dict[str, list[Row]] = defaultdict(list)
    for seed, batch in enumerate(batches):
        data = distiller.data_preprocessor(dict(batch), True)
        maps = distiller.student.neck(distiller.student.backbone(data["inputs"]))
        samples = data["data_samples"]
        exact = [next(iter(sample.teacher_maps.values())) for sample in samples]
        found["float32"].append(gradient(distiller, maps, exact, samples, seed))
        for p in PRECISIONS:
            stored = [LiveMaps({k: restore(m[None], p)[0][0] for k, m in t.maps.items()}, t.map_sizes) for t in exact]
            found[p].append(gradient(distiller, maps, stored, samples, seed))
    return [{"precision": p, **compare(found["float32"], found[p], share)} for p in PRECISIONS]


def losses(root: Path, mechanism: str, count: int, epochs: int) -> list[Row]:
    """A student before and after a short training with one mechanism."""
    cfg = stage_config(fidelity.make_recipe(root, mechanism, "online", 0, epochs), 1, "online")
    share = fidelity.SETTINGS[mechanism]["loss_weight"] / fidelity.BATCH if mechanism == "MGDLoss" else None
    rows = []
    with redirect_stdout(StringIO()):  # pycocotools prints
        runner = Runner.from_cfg(cfg)
        loader = runner.build_dataloader(cfg.train_dataloader, seed=0)
        for student, prepare in (("initialised", runner.model.init_weights), ("trained", runner.train)):
            prepare()
            runner.model.train()
            found = disturbance(runner.model, islice(loader, count), share)
            rows += [{"mechanism": mechanism, "student": student, **row} for row in found]
    return rows


def show(title: str, rows: Sequence[Row]) -> None:
    """A table of all that the rows hold."""
    columns = list(max(rows, key=len))
    table(title, columns, [[format(row.get(k, math.nan), FORMS.get(k, ".3f")) for k in columns] for row in rows])


def main(
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all numbers here.")] = None,
    images: Annotated[int, typer.Option(min=1, help="Images of each kind in the first table.")] = 40,
    photographs: Annotated[Path, typer.Option(help="A folder of photographs.")] = PHOTOGRAPHS,
    batches: Annotated[int, typer.Option(min=2, help="Batches in the second table.")] = 25,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of the short training, of 100 scenes.")] = 4,
) -> None:
    """Measure both tables."""
    logging.disable(logging.INFO)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        fidelity.draw(root / "data", 100, images)
        pictures = [("scenes", root / "data" / "val", fidelity.SCALE), ("photographs", photographs, (640, 480))]
        by_level = [
            {"images": kind, **row}
            for kind, source, scale in pictures
            for teacher in ("r18_w20", "swin_w32")
            if source.is_dir()
            for row in features(teacher, sorted(source.glob("*.jpg"))[:images], scale)
        ]
        show("what is kept of the features", by_level)
        by_mechanism = [row for mechanism in fidelity.SETTINGS for row in losses(root, mechanism, batches, epochs)]
        show("what the error does to losses and gradients", by_mechanism)
    if json_path:
        settings = {"images": images, "batches": batches, "epochs": epochs, "mechanisms": fidelity.SETTINGS}
        json_path.write_text(json.dumps({"settings": settings, "features": by_level, "losses": by_mechanism}, indent=1))


if __name__ == "__main__":
    typer.run(main)
