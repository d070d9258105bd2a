"""The arms of the study: stages, start, mechanism, source of targets and views."""

import json
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from typing import Any

from benchmarks.study_settings import Setting
from trainer import TargetSource

Teachers = str | tuple[str, ...] | None


@dataclass(frozen=True)
class Arm:
    """Stages as (teacher, several at once, or none; epochs), and what else differs between arms."""

    stages: tuple[tuple[Teachers, int], ...]
    start: str = "inherited"
    mechanism: str = "PKD"
    weight: float | None = None
    source: TargetSource = "cache"
    views: dict[str, Any] = field(default_factory=lambda: {"flip": "both"})

    @property
    def teachers(self) -> list[str]:
        """The names of its teachers, in the order of the stages."""
        at_once = (((one,) if isinstance(one, str) else one or ()) for one, _ in self.stages)
        return list(dict.fromkeys(chain.from_iterable(at_once)))


# weights by the grid's one seed, see docs/study.md
MECHANISMS: dict[str, dict[str, Any]] = {
    "PKD": {"type": "PKDLoss", "loss_weight": 2.0},
    "feature matching": {"type": "FeatureMatchingLoss", "normalize": True, "loss_weight": 3.0},
    "MGD": {"type": "MGDLoss", "loss_weight": 1e-4},
    "CWD": {"type": "CWDLoss", "loss_weight": 5.0},
    "FGD": {"type": "FGDLoss", "loss_weight": 1.0},
    "class logits": {"type": "DenseLogitLoss", "loss_weight": 5.0},
    "CrossKD": {"type": "CrossKDLoss", "loss_weight": 1.0},
    "pseudo-boxes": {"type": "DetectionLoss", "loss_weight": 1.0},
}
GRID = {
    "PKD": (0.5, 2.0, 6.0),
    "feature matching": (0.03, 0.1, 0.3, 1.0, 3.0, 10.0),
    "MGD": (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2),
    "CWD": (1.0, 5.0, 20.0, 80.0),
    "FGD": (0.01, 0.1, 1.0, 10.0, 100.0),
    "class logits": (1.0, 5.0, 20.0),
    "CrossKD": (1.0, 5.0, 20.0),
}
SAMPLED = (1, 2, 4, 8, 16)
CORE = ("alone", "inherited", "direct", "progressive")


def arms(setting: Setting) -> dict[str, Arm]:
    """All arms of a study, in the order of their worth, each of ``setting.epochs`` epochs."""
    epochs, names = setting.epochs, list(setting.teachers)
    weakest, strongest, half = names[0], names[-1], epochs // 2

    def sequence(order: list[Teachers]) -> tuple[tuple[Teachers, int], ...]:
        bounds = [epochs * number // len(order) for number in range(len(order) + 1)]
        return tuple((name, end - begin) for name, begin, end in zip(order, bounds, bounds[1:], strict=False))

    direct, alone = Arm(sequence([strongest])), Arm(sequence([None]))
    progressive = Arm(sequence([*names]))
    return {
        "alone": replace(alone, start="random"),
        "inherited": alone,
        "direct": direct,
        "progressive": progressive,
        "twice": Arm(sequence([strongest, strongest])),
        **{f"{name} first": Arm(sequence([name, strongest])) for name in setting.others},
        "reversed": Arm(sequence(names[::-1])),
        "weakest": Arm(sequence([weakest])),
        "ensemble": Arm(sequence([tuple(names)])),
        "inherited twice": Arm(sequence([None, None])),
        "alone, then direct": Arm(((None, half), (strongest, epochs - half))),
        "direct, then alone": Arm(((strongest, half), (None, epochs - half))),
        "progressive, inherits from weakest": replace(progressive, start="inherited from weakest"),
        "direct, random start": replace(direct, start="random"),
        "progressive, random start": replace(progressive, start="random"),
        "trained, alone": replace(alone, start="trained"),
        "trained, direct": replace(direct, start="trained"),
        "trained, progressive": replace(progressive, start="trained"),
        "online": replace(direct, source="online"),
        **{f"direct, {name}": replace(direct, mechanism=name) for name in MECHANISMS if name != "PKD"},
        "views 1": replace(direct, views={"flip": "none"}),  # `direct` has two
        **{f"sampled {count}": replace(direct, views=_sampled(setting, count)) for count in SAMPLED},
    }


def _sampled(setting: Setting, count: int) -> dict[str, Any]:
    """So many cached views of an image: a random size of three quarters and more, and a random flip."""
    resize = {"type": "RandomResize", "scale": list(setting.scale), "ratio_range": [0.75, 1.0], "keep_ratio": True}
    return {"sampled": {"pipeline": [resize, {"type": "RandomFlip", "prob": 0.5}], "count": count}}


def grid(setting: Setting) -> dict[str, Arm]:
    """The arms of ``--tune``: every mechanism with every weight of its grid, the strongest teacher directly; and without."""
    every = arms(setting)
    direct = every["direct"]
    return {"tune no distillation": every["inherited"]} | {
        f"tune {name} {weight:g}": replace(direct, mechanism=name, weight=weight)
        for name, weights in GRID.items()
        for weight in weights
    }


def mechanism(arm: Arm) -> dict[str, Any]:
    """The mechanism of an arm as a recipe says it."""
    return MECHANISMS[arm.mechanism] | ({} if arm.weight is None else {"loss_weight": arm.weight})


def described(arm: Arm) -> dict[str, Any]:
    """What is kept of an arm beside its result: an arm that was trained otherwise must not pass for this one."""
    return json.loads(
        json.dumps({**asdict(arm), "mechanism": mechanism(arm) if arm.teachers else None, "weight": None})
    )
