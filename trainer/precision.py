"""Lower precision: backbone and neck of a detector in autocast, its heads in float32.

Of a head in bfloat16 boxes come out rounded to whole pixels and more, and mmcv's operators (focal loss, NMS, RoIAlign, deformable
convolutions) know no bfloat16.
"""

from typing import Any

import torch
from mmcv.ops import DeformConv2d, ModulatedDeformConv2d
from torch import Tensor, nn

from cache import RecipeError

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def as_float(maps: Any) -> Any:
    """Maps, or tuples and lists of them, in float32."""
    return maps.float() if isinstance(maps, Tensor) else type(maps)(as_float(one) for one in maps)


def refuse_unknown(detector: nn.Module, precision: str | None, key: str) -> None:
    """Refuse a precision that a part of backbone or neck has no operator for.

    Args:
        key: the recipe's key, for errors.

    Raises:
        RecipeError: deformable convolutions in bfloat16.
    """
    if precision != "bfloat16":
        return
    for name, module in detector.named_modules():
        if name.startswith(("backbone.", "neck.")) and isinstance(module, DeformConv2d | ModulatedDeformConv2d):
            raise RecipeError(
                f"{key}: bfloat16: {name} is a deformable convolution, which mmcv has in float32 and, on GPUs, in float16 only. "
                "Take one of these."
            )
