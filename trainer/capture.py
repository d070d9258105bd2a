"""Feature maps of named modules of a detector, and the pyramid levels that they are."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from mmdet.structures import DetDataSample
from torch import Tensor, nn

from cache import Level, TeacherLoadError, level_name
from trainer.precision import as_float

# both sides are no multiple of the larger strides, so that a module that rounds its map's size down is noticed
_PROBE_HEIGHT, _PROBE_WIDTH = 288, 416
_STRIDES = tuple(2**power for power in range(9))


@contextmanager
def captured(model: nn.Module, modules: Sequence[str], key: str) -> Iterator[dict[str, list[Tensor]]]:
    """Collect what the named modules put out while the context is open; of several calls the last.

    Args:
        modules: names as in ``model.named_modules()``, such as ``neck`` or ``neck.fpn_convs.0.conv``.
        key: the recipe's key, for errors.

    Yields:
        Per module its maps (N, C, h, w).

    Raises:
        TeacherLoadError: no such module.
    """
    outputs: dict[str, list[Tensor]] = {}
    known = dict(model.named_modules())
    handles = []
    for name in modules:
        if name not in known:
            raise TeacherLoadError(f"{key}: the detector has no module {name!r}; its parts are {_children(known)}.")

        def keep(_module: nn.Module, _inputs: Any, output: Any, name: str = name) -> None:
            outputs[name] = [output] if isinstance(output, Tensor) else list(output)

        handles.append(known[name].register_forward_hook(keep))
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def recorded(detector: nn.Module, precision: torch.dtype | None = None) -> Iterator[dict[str, Any]]:
    """Record what a detector's ``extract_feat`` and its dense ``bbox_head`` give while the context is open.

    Args:
        precision: of ``extract_feat``, by autocast; what it gives is float32 then. By default what is set outside.

    Yields:
        ``features``: the maps of ``extract_feat``; ``head``: the head's outputs, absent for detectors without one.
    """
    made: dict[str, Any] = {}
    extract, own = detector.extract_feat, "extract_feat" in vars(detector)

    def extract_and_keep(*arguments: Any, **options: Any) -> Any:
        if precision is None:
            made["features"] = extract(*arguments, **options)
        else:
            with torch.autocast(next(detector.parameters()).device.type, precision):
                made["features"] = as_float(extract(*arguments, **options))
        return made["features"]

    def keep_head(_module: nn.Module, _inputs: Any, output: Any) -> None:
        made["head"] = output

    detector.extract_feat = extract_and_keep
    head = getattr(detector, "bbox_head", None)
    handle = None if head is None else head.register_forward_hook(keep_head)
    try:
        yield made
    finally:
        if own:
            detector.extract_feat = extract
        else:
            del detector.extract_feat
        if handle is not None:
            handle.remove()


def flatten(outputs: dict[str, list[Tensor]], modules: Sequence[str], key: str) -> list[Tensor]:
    """The captured maps in the order of the modules.

    Raises:
        TeacherLoadError: a module did not run, or put out something else than maps.
    """
    for name in modules:
        maps = outputs.get(name)
        if not maps or not all(isinstance(m, Tensor) and m.dim() == 4 for m in maps):
            what = "did not run in the forward pass" if maps is None else "does not put out feature maps (N, C, h, w)"
            raise TeacherLoadError(f"{key}: module {name!r} {what}.")
    return [feature_map for name in modules for feature_map in outputs[name]]


def measure_levels(model: nn.Module, modules: Sequence[str], key: str) -> tuple[Level, ...]:
    """Name the captured maps by their stride, measured in one forward pass of a small blank image.

    Returns:
        One level per map, in the order in which the modules give them.

    Raises:
        TeacherLoadError: a map whose size is not ceil(image / power of two), or two maps of one stride.
    """
    maps, _, size = _probe(model, modules, key)
    return _levels(maps, size, key)


def levels_of_the_head(model: nn.Module, modules: Sequence[str], key: str) -> set[str]:
    """The captured levels whose maps are those that the detector hands to its head, number by number.

    Of a module before a norm or another layer they are not, whatever their shape.

    Raises:
        TeacherLoadError: see `measure_levels`.
    """
    maps, features, size = _probe(model, modules, key)
    levels = _levels(maps, size, key)
    return {
        level.name for level, one in zip(levels, maps, strict=True) if any(torch.equal(one, read) for read in features)
    }


@torch.no_grad()
def _probe(
    model: nn.Module, modules: Sequence[str], key: str
) -> tuple[list[Tensor], tuple[Tensor, ...], tuple[int, int]]:
    """The captured maps of a small blank image, what the head reads of it, and rows and columns of the padded image."""
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    blank = torch.zeros(3, _PROBE_HEIGHT, _PROBE_WIDTH, dtype=torch.uint8, device=device)
    meta = dict(
        img_shape=(_PROBE_HEIGHT, _PROBE_WIDTH), ori_shape=(_PROBE_HEIGHT, _PROBE_WIDTH), scale_factor=(1.0, 1.0)
    )
    batch = model.data_preprocessor(dict(inputs=[blank], data_samples=[DetDataSample(metainfo=meta)]), False)
    height, width = batch["inputs"].shape[-2:]
    with captured(model, modules, key) as outputs:
        features = model.extract_feat(batch["inputs"])
    model.train(training)
    return flatten(outputs, modules, key), tuple(features), (height, width)


def _levels(maps: Sequence[Tensor], image: tuple[int, int], key: str) -> tuple[Level, ...]:
    levels: dict[str, Level] = {}
    for feature_map in maps:
        channels, *size = feature_map.shape[1:]
        strides = [s for s in _STRIDES if (-(-image[0] // s), -(-image[1] // s)) == tuple(size)]
        if not strides:
            raise TeacherLoadError(
                f"{key}: a captured map is {tuple(size)} for an image of {image}: no power of two is its stride."
            )
        level = Level(level_name(strides[0]), channels, strides[0])
        if level.name in levels:
            raise TeacherLoadError(
                f"{key}: two captured maps have stride {level.stride} ({level.name}); name fewer modules."
            )
        levels[level.name] = level
    return tuple(levels.values())


def _children(known: dict[str, nn.Module]) -> str:
    return ", ".join(name for name in known if name and "." not in name)
