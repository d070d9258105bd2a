"""What the command line of the study asks for; what it cannot have ends in one line and exit code 2."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import NoReturn

from benchmarks.study_arms import Arm
from benchmarks.study_settings import SETTINGS, Setting, on_gpu
from cache import MtpdError
from services.present import complain


def wrong(text: str) -> NoReturn:
    """End the program: it was called wrongly.

    Raises:
        SystemExit: with code 2.
    """
    complain(f"error: {text}")
    raise SystemExit(2)


@contextmanager
def in_one_line() -> Iterator[None]:
    """What the user can mend ends the program with its message, without a traceback.

    Raises:
        SystemExit: with code 1, for an `MtpdError`.
    """
    try:
        yield
    except MtpdError as error:
        raise SystemExit(f"error: {error}") from None


def chosen_setting(name: str, gpu: bool, images: int, epochs: int) -> Setting:
    """A setting by its name, with other lengths where they are not 0."""
    if name not in SETTINGS:
        wrong(f"--setting: there is no {name!r}; there are {', '.join(SETTINGS)}")
    setting = on_gpu(SETTINGS[name]) if gpu else SETTINGS[name]
    if images > setting.teacher_images:
        wrong(
            f"--images: {images} are more than the {setting.teacher_images} of {name} that its teachers are trained on, of "
            "which the student's are a part"
        )
    return replace(setting, images=images or setting.images, epochs=epochs or setting.epochs)


def chosen_seeds(text: str) -> list[int]:
    """Seeds from a list with commas, each once."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts):
        wrong(f"--seeds: {text!r} is no list of whole numbers with commas, such as 0,1,2")
    return list(dict.fromkeys(map(int, parts)))


def chosen_arms(text: str, every: Mapping[str, Arm], default: list[str]) -> list[str]:
    """Names of arms from a list with semicolons, each once, what starts from another arm's student last."""
    names = list(dict.fromkeys(part.strip() for part in text.split(";") if part.strip())) or default
    if unknown := [name for name in names if name not in every]:
        wrong(f"--only: no arm {', '.join(unknown)}; there are {'; '.join(every)}")
    for name in names:
        stages = every[name].stages
        if any(epochs < 1 for _, epochs in stages):
            total = sum(epochs for _, epochs in stages)
            wrong(f"--epochs: {total} are too few for the {len(stages)} stages of {name}; give {len(stages)} at least")
    return sorted(names, key=lambda name: every[name].start == "trained")
