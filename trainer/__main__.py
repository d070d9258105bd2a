"""Train stages without Ray: ``torchrun --nproc-per-node 2 -m trainer RECIPE``, or with plain ``python`` by one worker."""

import argparse
import os
import sys

import torch
from torch import distributed as dist

from cache import MtpdError, RecipeError
from trainer import load_recipe, train_stage


def main() -> int:
    """Exit codes as `mtpd`'s: 0 done, 1 a fault that the message explains, 2 wrong usage."""
    parser = argparse.ArgumentParser(
        prog="trainer", description="Train the stages of a recipe from filled caches, without Ray."
    )
    parser.add_argument("recipe")
    parser.add_argument("--stage", type=int, help="only this one, counted from 1")
    parser.add_argument("--targets", choices=("cache", "online"), default="cache")
    given = parser.parse_args()
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    try:
        recipe = load_recipe(given.recipe)
        if recipe.auto:
            raise RecipeError("stages: auto is for `mtpd train` and `mtpd run`, which find the order; name the stages.")
        if given.stage is not None and not 1 <= given.stage <= len(recipe.stages):
            raise RecipeError(f"--stage {given.stage}: the recipe has {len(recipe.stages)} stages.")
        if several:
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        for stage in range(1, len(recipe.stages) + 1) if given.stage is None else [given.stage]:
            train_stage(recipe, stage, given.targets, launcher="pytorch" if several else "none")
    except MtpdError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if several:
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
