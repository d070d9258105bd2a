"""One, two and three workers, with and without micro-batches, make the same steps."""

import json
import os
import re
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
STEPS = 2
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
    all_of_features = ("retinanet-r18", "retinanet-swin", (*_MECHANISMS, "FBKDLoss"))
    on_heads = ("LDLoss", "DenseLogitLoss", "DetectionLoss")
    # their students' batch normalisations use the batch's statistics
    contents = {
        "retinanet": _case(data, folder, *all_of_features),
        "gfl": _case(data, folder, "gfl-r18", "gfl-r18", (*on_heads, "CrossKDLoss")),
        "mask-rcnn": _case(data, folder, "mask-rcnn-r18", "retinanet-swin", ("MGDLoss",)),
        "fcos": _case(data, folder, "fcos-r18", "retinanet-swin", ("PKDLoss",)),
        "reppoints": _case(data, folder, "reppoints-r18", "retinanet-swin", ("CWDLoss",)),
        "bfloat16": _case(data, folder, *all_of_features, amp="bfloat16"),
        "micro-retinanet": _case(data, folder, "retinanet-r18", "retinanet-swin", _MECHANISMS, micro_batch=1),
        "micro-gfl": _case(data, folder, "gfl-r18", "gfl-r18", on_heads, micro_batch=2),
        "micro-mask-rcnn": _case(data, folder, "mask-rcnn-r18", "retinanet-swin", ("MGDLoss",), micro_batch=2),
    }
    for name, content in contents.items():
        if name.startswith("micro"):
            content["student"]["cfg_options"] |= {"model.backbone.norm_eval": True}
    # what is stored of a teacher is what a recipe needs: these need the most
    for name, case in {"retinanet-swin": "retinanet", "gfl-r18": "gfl"}.items():
        assert precompute.fill(parse_recipe(contents[case], "test"), name) == []
    cases = {name: {"recipe": content, "worlds": _worlds(name)} for name, content in contents.items()}
    for name in [name for name in cases if name.startswith("micro")]:
        whole = {"recipe": json.loads(json.dumps(contents[name])), "worlds": (1,)}
        del whole["recipe"]["training"]["micro_batch"]
        cases[name.replace("micro", "whole")] = whole
    for name, case in cases.items():
        # R-CNNs take the best proposals: rounding may change which, from the second step on
        case["steps"] = 1 if "mask" in name else STEPS
    lost = {**contents["micro-retinanet"], "stages": [{"epochs": 1}], "work_dir": str(folder / "lost")}
    options = {**lost["student"]["cfg_options"], "optim_wrapper.optimizer.lr": 1e38}
    lost["student"] = {**lost["student"], "cfg_options": options}
    cases["lost"] = {"recipe": lost, "worlds": (2,), "steps": "all"}
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


def _worlds(case: str) -> tuple[int, ...]:
    # two workers have two and three samples: in micro-batches of two that is one and two of them
    return (
        WORLDS
        if case == "retinanet"
        else (2,)
        if case.startswith("micro")
        else (2, 1)
        if case == "bfloat16"
        else (3, 1)
    )


@pytest.mark.parametrize(
    ("case", "reference"),
    [
        *((name, name) for name in ("retinanet", "gfl", "mask-rcnn", "fcos", "reppoints")),
        *((f"micro-{name}", f"whole-{name}") for name in ("retinanet", "gfl", "mask-rcnn")),
    ],
)
def test_the_number_of_parts_does_not_matter(trained: Path, case: str, reference: str) -> None:
    expected = torch.load(trained / f"{reference}-1.pth")
    for world in (world for world in _worlds(case) if world > 1):
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


def test_workers_that_lost_their_weights_end_together_and_write_nothing(trained: Path) -> None:
    first, second = ((trained / f"lost-2-{rank}.txt").read_text() for rank in range(2))
    assert first == second
    assert re.match(
        r"stage-1, epoch 1: after step 4 of 4 .*; the first losses .*: loss.* in step 2\. Nothing is written", first
    )
    assert not list((trained / "lost" / "stage-1").glob("*.pth"))


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
