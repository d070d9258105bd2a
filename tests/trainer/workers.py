"""One of several processes that train the same steps as a group of three, of two, and alone; see test_workers.py.

``python -m tests.trainer.workers FOLDER RANK``: reads ``FOLDER/cases.json``, writes ``FOLDER/CASE-WORLD.pth``, or for a stage
that ends in an error ``FOLDER/CASE-WORLD-RANK.txt``.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from mmdet.registry import MODELS
from mmengine.registry import MODEL_WRAPPERS
from mmengine.runner import Runner
from torch import distributed as dist

from cache import RecipeError
from trainer import parse_recipe, stage_config, train_stage
from trainer.mechanisms import draws

WORLDS = (3, 2, 1)


def train(recipe: dict[str, Any], steps: int, world: int) -> dict[str, Any]:
    """How some steps changed the weights, and the losses that they logged."""
    cfg = stage_config(parse_recipe(recipe, "test"), 1)
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    model.init_weights()
    if world > 1:
        model = MODEL_WRAPPERS.build(dict(cfg.model_wrapper_cfg, module=model))
    model.train()
    optimiser = Runner.build_optim_wrapper(_Runnerless(model), cfg.optim_wrapper)
    loader = Runner.build_dataloader(cfg.train_dataloader, seed=0)
    inner = model.module if world > 1 else model
    begin = {name: value.detach().clone() for name, value in inner.state_dict().items() if value.is_floating_point()}
    losses = []
    for step, batch in enumerate(loader):
        if step == steps:
            break
        draws.begin(0, step)
        logs = model.train_step(batch, optimiser)
        losses.append({name: float(value.detach()) for name, value in logs.items()})
    changes = {name: value.detach() - begin[name] for name, value in inner.state_dict().items() if name in begin}
    return {"changes": changes, "losses": losses}


class _Runnerless:
    """As much of a Runner as the building of an optimiser asks for."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model


def main(folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    cases = json.loads((folder / "cases.json").read_text())
    for world in WORLDS:
        if rank >= world:
            return
        if world > 1:
            store = dist.FileStore(str(folder / f"store-{world}"), world)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
        for name, case in cases.items():
            if world not in case["worlds"]:
                continue
            if case["steps"] == "all":
                try:
                    train_stage(parse_recipe(case["recipe"], "test"), 1, launcher="pytorch")
                except RecipeError as error:
                    (folder / f"{name}-{world}-{rank}.txt").write_text(str(error))
                continue
            result = train(case["recipe"], case["steps"], world)
            if rank == 0:
                torch.save(result, folder / f"{name}-{world}.pth")
        if world > 1:
            dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
