"""The device that Ray gave a process."""

from typing import Literal

import ray
import torch

from cache import MtpdError, RecipeError


def given_device(keys: str, who: str, part: str = "", error: type[MtpdError] = RecipeError) -> Literal["cuda", "cpu"]:
    """What this actor, worker or task computes on: ``cuda`` where Ray gave it a GPU.

    Args:
        keys: of the recipe, that ask for the GPU.
        who: this process, for the error.
        part: of the recipe, that it works for.
        error: what is raised.

    Raises:
        MtpdError: of type ``error``: it has a GPU and torch cannot use it. On its CPUs it would take many times as long, and
            keep the GPU from others.
    """
    if not ray.get_gpu_ids():
        return "cpu"
    if not torch.cuda.is_available():
        raise error(
            f"{part and f'{part} / '}{keys}: {who} was given a GPU that torch cannot use (driver, image); mend it or set "
            f"{keys}: 0"
        )
    return "cuda"
