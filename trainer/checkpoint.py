"""Weights in and out: loading without running pickled code, strict loading, inheriting, student-only checkpoints."""

import hashlib
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from torch import Tensor, nn

from cache import TeacherLoadError

# what mmengine's Runner writes beside the weights; anything else in a checkpoint is refused
_HARMLESS: list[Any] = [
    HistoryBuffer,
    np.ndarray,
    np.dtype,
    (np._core.multiarray._reconstruct, "numpy.core.multiarray._reconstruct"),
    (np._core.multiarray.scalar, "numpy.core.multiarray.scalar"),
    np._core.multiarray._reconstruct,
    np._core.multiarray.scalar,
    *(type(np.dtype(name)) for name in ("float64", "float32", "int64", "int32", "bool")),
]


def read_weights(path: str | Path, key: str) -> "OrderedDict[str, Tensor]":
    """The state dict of a checkpoint, on the CPU. No pickled code is run.

    Args:
        path: what mmengine's Runner, ``torch.save(model.state_dict())`` or this project wrote.
        key: the recipe's key, for errors.

    Raises:
        TeacherLoadError: not a checkpoint, or one that holds more than tensors and plain values.
    """
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        reason = str(error).splitlines()[-1] if str(error) else repr(error)
        raise TeacherLoadError(
            f"{key}: {path}: holds more than weights, and loading it would run code from the file. If you trust it, "
            "load it once with torch.load(..., weights_only=False) and save its 'state_dict' alone. "
            f"torch says: {reason}"
        ) from error
    except (RuntimeError, EOFError, OSError, KeyError, ValueError) as error:
        raise TeacherLoadError(f"{key}: {path}: not a readable checkpoint ({error}).") from error
    weights = content.get("state_dict", content) if isinstance(content, Mapping) else None
    if not isinstance(weights, Mapping) or not weights or not all(isinstance(v, Tensor) for v in weights.values()):
        raise TeacherLoadError(f"{key}: {path}: holds no weights: expected a state dict, alone or under 'state_dict'.")
    stripped = OrderedDict((name.removeprefix("module."), value) for name, value in weights.items())
    # mmdet's modules read the version of what they load from here (deformable convolutions, for one)
    stripped._metadata = getattr(weights, "_metadata", OrderedDict())  # type: ignore[attr-defined]
    return stripped


def load_strict(model: nn.Module, path: str | Path, key: str) -> None:
    """Load a checkpoint that must fit the model exactly.

    Raises:
        TeacherLoadError: missing, unexpected or misshapen weights: a partly loaded detector gives plausible, meaningless
            numbers.
    """
    try:
        model.load_state_dict(read_weights(path, key), strict=True)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:]]
        shown = "\n  ".join(line if len(line) < 300 else line[:300] + " ..." for line in lines[:8])
        raise TeacherLoadError(
            f"{key}: {path} does not fit its config:\n  {shown}\nUse the config the checkpoint was trained with (cfg_options "
            "changes single keys, as mmdet's --cfg-options)."
        ) from error


def sha256(path: str | Path) -> str:
    """Digest of a file's bytes."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class Inherited:
    """What `inherit` did: names of student weights that were copied, and of those that could not be."""

    copied: tuple[str, ...]
    left: tuple[str, ...]


def inherit(student: nn.Module, teacher: Mapping[str, Tensor]) -> Inherited:
    """Copy a teacher's neck and heads into a student: every weight outside the backbone whose name and shape fit.

    The official MTPD's "inheriting strategy": of a cascade teacher the first stage's heads are taken, and a box regressor
    shared by all classes is repeated once per class. Weights of other shapes stay as initialised.
    """
    source = {_without_cascade(name): value for name, value in teacher.items() if _is_first_stage(name)}
    state = student.state_dict()
    copied, left = [], []
    for name, target in state.items():
        if name.startswith(("backbone.", "data_preprocessor.")):
            continue
        value = source.get(name)
        if value is not None and "fc_reg" in name and value.shape[0] == 4 and target.shape[0] % 4 == 0:
            value = value.repeat(target.shape[0] // 4, *[1] * (value.dim() - 1))
        if value is None or value.shape != target.shape:
            left.append(name)
            continue
        with torch.no_grad():
            target.copy_(value)
        copied.append(name)
    return Inherited(tuple(copied), tuple(left))


def _is_first_stage(name: str) -> bool:
    head, stage = _cascade_stage(name)
    return head is None or stage == 0


def _without_cascade(name: str) -> str:
    head, stage = _cascade_stage(name)
    return name if head is None else name.replace(f"{head}.{stage}.", f"{head}.", 1)


def _cascade_stage(name: str) -> tuple[str | None, int]:
    for head in ("roi_head.bbox_head", "roi_head.mask_head"):
        rest = name.removeprefix(f"{head}.")
        if rest != name and rest.split(".")[0].isdigit():
            return head, int(rest.split(".")[0])
    return None, 0


def save_student(student: nn.Module, path: Path, classes: tuple[str, ...]) -> None:
    """Write a checkpoint of the student alone, as stock mmdet's ``init_detector`` expects it. Atomic."""
    weights = OrderedDict((name, value.detach().cpu()) for name, value in student.state_dict().items())
    temporary = path.with_suffix(".tmp")
    torch.save({"state_dict": weights, "meta": {"dataset_meta": {"classes": classes}}}, temporary)
    temporary.replace(path)
