"""Weights that a student's config begins with, its ``init_cfg``: ImageNet's by name, a file, an address."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mmengine.runner.checkpoint import CheckpointLoader, load_from_http, load_from_torchvision
from mmengine.utils import get_installed_path

from cache import MtpdError, RecipeError

_NAMED = ("torchvision://", "modelzoo://")


@cache
def _addresses() -> dict[str, str]:
    """Where torchvision's classification weights are, by model: the list that mmengine ships."""
    return json.loads((Path(get_installed_path("mmengine")) / "hub" / "torchvision_0.12.json").read_text())


@CheckpointLoader.register_scheme(prefixes=_NAMED, force=True)
def _load_named(name: str, map_location: Any = None) -> Any:
    # mmengine's own loader imports torchvision for this look-up alone, which nothing else here needs
    address = _addresses().get(name.split("://", 1)[1])
    if address is None:
        return load_from_torchvision(name, map_location)
    return load_from_http(address, map_location=map_location)


def refuse_missing(model: Any, where: str = "model") -> None:
    """Refuse a student's config whose ``init_cfg`` names weights that cannot be had.

    Addresses are believed: whether this machine reaches them shows when the training begins.

    Args:
        model: the detector's config, or a part of it.
        where: the part's dotted key.

    Raises:
        RecipeError: no such file, or no such model of torchvision.
    """
    if isinstance(model, list | tuple):
        for number, part in enumerate(model):
            refuse_missing(part, f"{where}.{number}")
    if not isinstance(model, Mapping):
        return
    source = model.get("checkpoint") if model.get("type") == "Pretrained" else None
    if isinstance(source, str):
        scheme, _, name = source.rpartition("://")
        if f"{scheme}://" in _NAMED and name not in _addresses() and find_spec("torchvision") is None:
            raise RecipeError(f"student.config: {where}.checkpoint: mmengine knows no {source!r}. {_way_out(where)}")
        if not scheme and not Path(source).is_file():
            raise RecipeError(f"student.config: {where}.checkpoint: no such file: {source}. {_way_out(where)}")
    for key, part in model.items():
        refuse_missing(part, f"{where}.{key}")


@contextmanager
def loading(model: Any) -> Iterator[None]:
    """While a student's ``init_cfg`` is followed: what fails then names the weights, and a way to go on.

    Args:
        model: the student, initialised within the block.

    Raises:
        RecipeError: the weights cannot be downloaded or read.
    """
    try:
        yield
    except MtpdError:
        raise
    # what urllib, torch.load and torchvision's absence raise
    except (OSError, RuntimeError, ValueError, KeyError, ImportError, EOFError) as error:
        sources = dict(_sources(model))
        if not sources:
            raise
        named = ", ".join(f"{key}.checkpoint: {source}" for key, source in sources.items())
        raise RecipeError(
            f"student.config: the weights that it begins with cannot be loaded ({named}): {type(error).__name__}: {error}. "
            f"{_way_out(next(iter(sources)))}"
        ) from error


def _sources(model: Any) -> Iterator[tuple[str, str]]:
    for name, module in model.named_modules():
        given = getattr(module, "init_cfg", None) or []
        for one in given if isinstance(given, list | tuple) else [given]:
            if one.get("type") == "Pretrained":
                yield ".".join(part for part in ("model", name, "init_cfg") if part), str(one.get("checkpoint"))


def _way_out(where: str) -> str:
    return (
        f"Download the weights and name the file, student.cfg_options: {{{where}.checkpoint: FILE}}; or begin with random ones, "
        f"{{{where}: null}}."
    )
