"""Weights in and out: loading without running pickled code, strict loading, inheriting, student-only checkpoints."""

import hashlib
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from cache import RecipeError, TeacherLoadError

# the only names that a checkpoint may bring to life; every other object in it becomes an `_Inert`
_ALLOWED = frozenset(
    {
        ("collections", "OrderedDict"),
        ("torch", "Size"),
        ("torch._utils", "_rebuild_parameter"),
        ("torch._utils", "_rebuild_tensor_v2"),
    }
)


class _Inert:
    """Stands for an object of a checkpoint that is no weight: takes everything and does nothing."""

    def __new__(cls, *_args: Any, **_kwargs: Any) -> "_Inert":
        return object.__new__(cls)

    def __init__(self, *_args: Any, **_kwargs: Any) -> None: ...
    def __setstate__(self, _state: Any) -> None: ...
    def __setitem__(self, _key: Any, _value: Any) -> None: ...
    def append(self, _value: Any) -> None: ...
    def extend(self, _values: Any) -> None: ...

    def __call__(self, *_args: Any, **_kwargs: Any) -> "_Inert":
        return self

    def __hash__(self) -> int:
        return 0

    def __eq__(self, other: object) -> bool:
        return self is other


class _WeightsUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED or (module == "torch" and _is_data(getattr(torch, name, None))):
            return super().find_class(module, name)
        return _Inert


def _is_data(value: Any) -> bool:
    return isinstance(value, torch.dtype) or (isinstance(value, type) and value.__name__.endswith("Storage"))


# what torch.load takes for the pickle module
_WEIGHTS_PICKLE = SimpleNamespace(
    Unpickler=_WeightsUnpickler,
    load=lambda file, **options: _WeightsUnpickler(file, **options).load(),
    __name__="weights",
)


def read_weights(path: str | Path, key: str) -> "OrderedDict[str, Tensor]":
    """The state dict of a checkpoint, on the CPU. No code from the file is run, whatever else it holds.

    torch's own ``weights_only`` refuses the checkpoints of mmengine's Runner for the training history in them; here
    such objects are passed over instead.

    Args:
        path: what mmengine's Runner, ``torch.save(model.state_dict())`` or this project wrote.
        key: the recipe's key, for errors.

    Raises:
        TeacherLoadError: not a checkpoint, or one without weights.
    """
    content = _read(path, key)
    weights = content.get("state_dict", content) if isinstance(content, Mapping) else None
    if not isinstance(weights, Mapping) or not weights or not all(isinstance(v, Tensor) for v in weights.values()):
        raise TeacherLoadError(f"{key}: {path}: holds no weights: expected a state dict, alone or under 'state_dict'.")
    stripped = OrderedDict((name.removeprefix("module."), value) for name, value in weights.items())
    # mmdet's modules read the version of what they load from here (deformable convolutions, for one)
    stripped._metadata = getattr(weights, "_metadata", OrderedDict())  # type: ignore[attr-defined]
    return stripped


def read_classes(path: str | Path, key: str) -> tuple[str, ...] | None:
    """The names of the classes that a checkpoint says its detector has, in order; None where it says nothing.

    mmengine's Runner writes them as ``meta.dataset_meta.classes`` (or ``CLASSES``), mmdet 2 wrote ``meta.CLASSES``.

    Raises:
        TeacherLoadError: not a checkpoint.
    """
    # only the pages that are looked at are read: of weights none
    content = _read(path, key, mmap=zipfile.is_zipfile(path))
    meta = content.get("meta") if isinstance(content, Mapping) else None
    for of in (meta.get("dataset_meta"), meta) if isinstance(meta, Mapping) else ():
        for name in ("classes", "CLASSES") if isinstance(of, Mapping) else ():
            found = of.get(name)
            if isinstance(found, list | tuple) and found and all(isinstance(one, str) for one in found):
                return tuple(found)
    return None


def _read(path: str | Path, key: str, **options: Any) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=False, pickle_module=_WEIGHTS_PICKLE, **options)
    except (
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        OSError,
        KeyError,
        ValueError,
        TypeError,
        AttributeError,
    ) as error:
        raise TeacherLoadError(f"{key}: {path}: not a readable checkpoint ({error}).") from error


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
        advice = "Use the config the checkpoint was trained with (cfg_options changes single keys, as mmdet's --cfg-options)."
        if key == "student.checkpoint":  # whose number of classes is the data set's, whatever its config says
            advice += (
                " If it was trained for other classes than the data set's, leave student.checkpoint out to begin with what fits: "
                f"student.cfg_options: {{model.init_cfg: {{type: Pretrained, checkpoint: {path}}}}}"
            )
        raise TeacherLoadError(f"{key}: {path} does not fit its config:\n  {shown}\n{advice}") from error


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


def not_finite(weights: Mapping[str, Tensor]) -> list[str]:
    """Names of the weights that hold a NaN or Inf; from a GPU in one transfer."""
    floating = {name: value for name, value in weights.items() if value.is_floating_point()}
    finite = torch.stack([value.isfinite().all() for value in floating.values()]).tolist()
    return [name for name, good in zip(floating, finite, strict=True) if not good]


def save_student(student: nn.Module, path: Path, classes: tuple[str, ...]) -> None:
    """Write a checkpoint of the student alone, as stock mmdet's ``init_detector`` expects it. Atomic.

    Raises:
        RecipeError: weights that are not finite.
    """
    weights = OrderedDict((name, value.detach().cpu()) for name, value in student.state_dict().items())
    if lost := not_finite(weights):
        raise RecipeError(
            f"{path}: not written: {len(lost)} of the student's weights are not finite ({', '.join(lost[:2])}, ...), though "
            "as they were trained they are. Look at what its config averages them by (custom_hooks: EMAHook)."
        )
    temporary = path.with_suffix(".tmp")
    torch.save({"state_dict": weights, "meta": {"dataset_meta": {"classes": classes}}}, temporary)
    temporary.replace(path)
