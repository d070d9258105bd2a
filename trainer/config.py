"""mmdet configs by path or by mmengine's ``mmdet::`` notation, with errors that name the key of the recipe."""

import copy
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.registry import init_default_scope
from mmengine.utils import get_installed_path
from torch import nn

from cache import RecipeError

# of threads that compile sources at once Python 3.11 now and then fails one: "AST constructor recursion depth mismatch"
_one_at_a_time = threading.Lock()


def load_config(name: str, options: Mapping[str, Any] | None, key: str) -> Config:
    """Read an mmdet config.

    Args:
        name: path of a config file, or ``mmdet::retinanet/...py`` for one that ships inside mmdet.
        options: overrides by dotted key, as mmdet's ``--cfg-options``.
        key: the recipe's key, for errors.

    Raises:
        RecipeError: no such file, or it does not evaluate to a detector's config.
    """
    try:
        config = _read(name)
        # merging takes `_delete_` out of the options that it is given
        config.merge_from_dict(copy.deepcopy(dict(options or {})))
    except FileNotFoundError as error:
        raise RecipeError(
            f"{key}: {name!r}: no such config ({error}). Give a path, or mmdet::FOLDER/FILE.py."
        ) from error
    except Exception as error:
        raise RecipeError(f"{key}: {name!r} cannot be read: {type(error).__name__}: {error}") from error
    if "model" not in config:
        raise RecipeError(f"{key}: {name!r} has no `model`; it is not the config of a detector.")
    init_default_scope("mmdet")
    return config


def _read(name: str) -> Config:
    package, _, path = name.partition("::")
    with _one_at_a_time:
        if not path:
            return Config.fromfile(name)
        # get_config finds the same file, but parses every metafile of the package first, a third of a second each time
        shipped = Path(get_installed_path(package)) / ".mim" / "configs" / path
        return Config.fromfile(shipped) if shipped.is_file() else get_config(name)


def build_detector(model: Any, key: str) -> nn.Module:
    """The detector of a config, with random weights.

    Args:
        model: the config's ``model``.
        key: the recipe's key, for errors.

    Raises:
        RecipeError: mmdet cannot build it: a type that it does not know, arguments that do not go together.
    """
    try:
        return MODELS.build(model)
    except Exception as error:  # constructors raise what they like
        raise RecipeError(
            f"{key}: mmdet cannot build its detector: {type(error).__name__}: {error}. Mend it, or the cfg_options over it."
        ) from error


def nested(value: Any) -> Iterator[dict[str, Any]]:
    """Every dict inside a config, the outermost first."""
    if isinstance(value, dict):
        yield value
        for inner in value.values():
            yield from nested(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from nested(inner)


def set_classes(model: dict[str, Any], classes: int) -> list[int]:
    """Set every ``num_classes`` of a detector's config. Returns the numbers that were replaced."""
    replaced = []
    for part in nested(model):
        if part.get("num_classes", classes) != classes:
            replaced.append(part["num_classes"])
            part["num_classes"] = classes
    return replaced


def class_options(model: Any, classes: int, key: str = "model") -> dict[str, int]:
    """What `set_classes` would set in a detector's config, as overrides by dotted key."""
    options = {}
    for name, part in model.items() if isinstance(model, dict) else enumerate(model):
        if name == "num_classes":
            options[f"{key}.{name}"] = classes
        elif isinstance(part, dict | list):
            options |= class_options(part, classes, f"{key}.{name}")
    return options


def plain(value: Any, drop: frozenset[str] = frozenset()) -> Any:
    """A config as plain JSON: tuples become lists, classes their names; keys in ``drop`` are left out at any depth."""
    if isinstance(value, Mapping):
        return {str(k): plain(v, drop) for k, v in value.items() if k not in drop}
    if isinstance(value, list | tuple):
        return [plain(v, drop) for v in value]
    if isinstance(value, str | int | float | bool) or value is None:
        return value
    return f"{value.__module__}.{value.__qualname__}" if isinstance(value, type) else str(value)


def resolve(name: str) -> str:
    """Make a config's path absolute; ``mmdet::`` names stay as they are."""
    return name if "::" in name else str(Path(name).expanduser().absolute())


def plain_dict(config: Any) -> Any:
    """A config as plain dicts, a copy; tuples stay, for some of mmdet's transforms take no list."""
    return copy.deepcopy(config.to_dict())


def kind(given: Any) -> str:
    """The name of a registered class, which a config gives bare, behind its scope (``mmdet.``), or as the class itself."""
    return str(getattr(given, "__name__", given)).rpartition(".")[2]
