"""One, two and three workers, with and without micro-batches, make the same steps."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import models
from tests.trainer import precompute
from tests.trainer.workers import WORLDS
from trainer import parse_recipe

TOLERANCE = 1e-4  # of the change that the steps made, and of each loss
ROUGH = 0.5  # of bfloat16, whose numbers have eight bits
STEPS = 3
_FROZEN = {"model.backbone.norm_eval": True}
_MECHANISMS = ("FeatureMatchingLoss", "PKDLoss", "MGDLoss", "CWDLoss", "FGDLoss")


def _case(data: Path, folder: Path, student: str, teacher: str, mechanisms: tuple, **training: Any) -> dict[str, Any]:
    stages = [{"teacher": teacher, "mechanisms": [{"type": m} for m in mechanisms]}]
    content = models.recipe(data, folder, stages=stages, student=student)
    content["teachers"] = {name: models.teacher(name, data) for name in ("retinanet-swin", "gfl-r18")}
    content["training"] = {"batch_size": 5, **training}  # five are shared out unevenly
    return content


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workers")
    contents = {
        # batch normalisation by the batch's statistics, which is in the fourth mechanism of its own too
        "retinanet": _case(data, folder, "retinanet-r18", "retinanet-swin", (*_MECHANISMS, "FBKDLoss")),
        "gfl": _case(data, folder, "gfl-r18", "gfl-r18", ("LDLoss", "DenseLogitLoss", "DetectionLoss", "CrossKDLoss")),
        "mask-rcnn": _case(data, folder, "mask-rcnn-r18", "retinanet-swin", ("MGDLoss",)),
        "micro-retinanet": _case(data, folder, "retinanet-r18", "retinanet-swin", _MECHANISMS, micro_batch=1),
        "micro-gfl": _case(
            data, folder, "gfl-r18", "gfl-r18", ("LDLoss", "DenseLogitLoss", "DetectionLoss"), micro_batch=2
        ),
        "micro-fcos": _case(data, folder, "fcos-r18", "retinanet-swin", ("PKDLoss",), micro_batch=2),
        "micro-mask-rcnn": _case(data, folder, "mask-rcnn-r18", "retinanet-swin", ("MGDLoss",), micro_batch=2),
        "bfloat16": _case(data, folder, "retinanet-r18", "retinanet-swin", (*_MECHANISMS, "FBKDLoss"), amp="bfloat16"),
        "reppoints": _case(data, folder, "reppoints-r18", "retinanet-swin", ("PKDLoss",)),
    }
    for name, content in contents.items():
        if name.startswith("micro"):
            content["student"]["cfg_options"] |= _FROZEN
    for name, case in {"retinanet-swin": "retinanet", "gfl-r18": "gfl"}.items():
        # each case's recipe needs something else of the teacher: the largest first
        assert precompute.fill(parse_recipe(contents[case], "test"), name) == []
    # R-CNNs take the best proposals: rounding may change which, and does so in the second step
    cases = {
        name: {"recipe": content, "steps": 1 if "mask" in name else STEPS, "worlds": WORLDS}
        for name, content in contents.items()
    }
    # what micro-batches are compared with: the same without
    for name in [name for name in cases if name.startswith("micro")]:
        cases[name]["worlds"] = (2, 1)
        whole = {**json.loads(json.dumps(cases[name])), "worlds": (1,)}
        del whole["recipe"]["training"]["micro_batch"]
        cases[name.replace("micro", "whole")] = whole
    (folder / "cases.json").write_text(json.dumps(cases))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.trainer.workers", str(folder)]
    workers = [
        subprocess.Popen([*command, str(rank)], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        for rank in range(WORLDS[0])
    ]
    for worker in workers:
        _, errors = worker.communicate(timeout=300)
        assert worker.returncode == 0, errors.decode()[-3000:]
    return folder


@pytest.mark.parametrize(
    ("case", "reference"),
    [
        *((name, name) for name in ("retinanet", "gfl", "mask-rcnn", "reppoints")),
        *((f"micro-{name}", f"whole-{name}") for name in ("retinanet", "gfl", "fcos", "mask-rcnn")),
    ],
)
def test_the_number_of_parts_does_not_matter(trained: Path, case: str, reference: str) -> None:
    expected = torch.load(trained / f"{reference}-1.pth")
    for world in (2, 1) if case != reference else (3, 2):
        found = torch.load(trained / f"{case}-{world}.pth")
        name, apart = _difference(found["changes"], expected["changes"])
        print(f"{case}, {world} workers: {apart:.1e} ({name})")
        assert apart < TOLERANCE, (world, name)


def test_bfloat16_is_near_float32_and_shared_out_too(trained: Path) -> None:
    exact, alone, shared = (torch.load(trained / f"{name}.pth") for name in ("retinanet-1", "bfloat16-1", "bfloat16-2"))
    name, apart = _difference(alone["changes"], exact["changes"])
    assert TOLERANCE < apart < ROUGH, name
    name, apart = _difference(shared["changes"], exact["changes"])
    assert TOLERANCE < apart < ROUGH, name
    for name, value in exact["losses"][0].items():
        assert alone["losses"][0][name] == pytest.approx(value, rel=0.05), name


def _difference(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> tuple[str, float]:
    """The part of the model whose change differs most, and by how much of it.

    Of a part, backbone, neck, head or mechanism: some weights of each have no gradient but rounding (a bias before PKD).
    """
    apart = {}
    for part in {".".join(name.split(".")[:2]) for name in expected}:
        a, b = (
            torch.cat([of[name].flatten() for name in of if name.startswith(f"{part}.")]) for of in (found, expected)
        )
        apart[part] = float((a - b).norm() / b.norm().clamp(min=1e-12))
    return max(apart.items(), key=lambda item: item[1])
