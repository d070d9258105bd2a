"""The driver of the order of teachers: features where they are missing, costs, accuracies, the sequence, and order.json."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayTaskError

from cache import MtpdError, RecipeError, TeacherCache, TeacherLoadError, differences, fingerprint, make_plan
from services import cluster
from services.device import given_device
from services.precompute import fill_all, show_failures
from services.present import Progress, say, table
from trainer import (
    STUDENT,
    OrderRows,
    Recipe,
    adaptation_costs,
    choose_rows,
    evaluate_teacher,
    evaluation_loader,
    read_annotations,
    refuse_other_classes,
    select_teachers,
    teacher_info,
    wanted_record,
    with_candidates,
)

_FILE = "order.json"


@dataclass(frozen=True)
class Order:
    """The order of a recipe's teachers, and all that it follows from; kept in WORK_DIR/order.json.

    Attributes:
        settings: all that decides it: the recipe's ``order``, fingerprints of the models, digests of the data sets.
        images: those that were compared; half of them the regressions were fitted on, the others gave the costs.
        costs: adaptation costs, ``costs[a][b]`` is C(a -> b); the student is among them as ``student``.
        level_costs: the same of each common level on its own.
        aps: box AP of each teacher in points, given in the recipe or measured.
        reasons: for each teacher one sentence on why it was taken or left.
    """

    settings: dict[str, Any]
    images: int
    costs: dict[str, dict[str, float]]
    level_costs: dict[str, dict[str, dict[str, float]]]
    aps: dict[str, float]
    sequence: list[str]
    reasons: dict[str, str]


def find_order(recipe: Recipe, *, force: bool = False) -> Order:
    """The order of a recipe's teachers: from order.json if it was found with the same settings, else found now.

    Features that are missing are computed first, of ``order.images`` images only; the precompute goes on from them.

    Args:
        force: begin even if they do not fit the disk.

    Raises:
        RecipeError: no trained student, or a teacher that cannot be evaluated and has no ``ap``.
        MtpdError: what `fill` raises.
    """
    candidates = with_candidates(recipe)
    if (order := _kept(recipe, _settings(candidates))) is not None:
        return order
    for name, spec in recipe.teachers.items():
        if spec.ap is None:
            refuse_other_classes(recipe, name)
    images = read_annotations(recipe.dataset.train.ann_file, "dataset.train.ann_file").images
    options = recipe.order
    rows = choose_rows(images.ids.tolist(), len(recipe.policy), options.images, options.seed)
    for result in fill_all(candidates, list(candidates.teachers), force=force, rows=rows):
        show_failures(result)
    aps = {name: _accuracy(recipe, candidates, name) for name in recipe.teachers}
    caches = {name: _open(candidates, name) for name in candidates.teachers}
    rows = _present(rows, caches)
    with Progress("comparing features", len(rows), 0) as progress:
        costs = adaptation_costs(
            caches,
            rows,
            ridge=options.ridge,
            positions=options.positions,
            seed=options.seed,
            progress=lambda _done, _total: progress.advance(1, 0),
        )
    pairs = {pair: cost.value for pair, cost in costs.items()}
    found = select_teachers({t: pairs[STUDENT, t] for t in aps}, pairs, aps, options.max_teachers)
    order = Order(
        settings=_settings(candidates),
        images=len(rows),
        costs={a: {b: pairs[a, b] for b in caches if b != a} for a in caches},
        level_costs={a: {b: costs[a, b].levels for b in caches if b != a} for a in caches},
        aps=aps,
        sequence=list(found.sequence),
        reasons=found.reasons,
    )
    _write(recipe, {**asdict(order), "evaluated": _read(recipe).get("evaluated", {})})
    return order


def decided(recipe: Recipe, *, compute: bool = False, force: bool = False) -> Recipe:
    """The recipe with its stages: where they are ``auto``, one for each teacher of the order.

    Args:
        compute: find the order if it is not known.

    Raises:
        RecipeError: the order is not known, or was found with other settings; the message lists what differs.
    """
    if not recipe.auto:
        return recipe
    if compute:
        return recipe.with_sequence(find_order(recipe, force=force).sequence)
    settings = _settings(with_candidates(recipe))
    order = _kept(recipe, settings)
    if order is None:
        before = _read(recipe).get("settings")
        why = "is not known yet"
        if before is not None:
            why = "was found with other settings:\n  " + "\n  ".join(list(differences(before, settings))[:8]) + "\n"
        raise RecipeError(
            f"stages: auto: the order of teachers {why}. Run `mtpd order RECIPE` (or `mtpd run`, which does)."
        )
    return recipe.with_sequence(order.sequence)


def decided_if_known(recipe: Recipe) -> Recipe:
    """The recipe with its stages, or as it is where the order of teachers is not known."""
    try:
        return decided(recipe)
    except RecipeError:
        return recipe


def show_order(order: Order) -> None:
    """Costs, accuracies, the sequence, and why."""
    names = list(order.costs)
    rows = [[a, *("-" if a == b else f"{order.costs[a][b]:.3f}" for b in names)] for a in names]
    table(f"adaptation costs, from the row to the column ({order.images:,} images)", ["", *names], rows)
    turn = {name: str(number) for number, name in enumerate(order.sequence, start=1)}
    teachers = sorted(order.aps, key=lambda name: order.aps[name])
    reasons = [[name, f"{order.aps[name]:.1f}", turn.get(name, "-")] for name in teachers]
    table("teachers", ["teacher", "box AP", "turn"], reasons)
    say(f"sequence: {' -> '.join(order.sequence)}")
    for name in [*order.sequence, *(name for name in teachers if name not in turn)]:
        say(f"  {name}: {order.reasons[name]}")


def _settings(candidates: Recipe) -> dict[str, Any]:
    """All that decides the order, as plain JSON."""
    options = candidates.order.model_dump(include={"images", "max_teachers", "ridge", "positions", "seed"})
    images = read_annotations(candidates.dataset.train.ann_file, "dataset.train.ann_file").images
    return {
        "order": options,
        "fingerprints": {name: _fingerprint(candidates, name) for name in candidates.teachers},
        "aps": {name: spec.ap for name, spec in candidates.teachers.items() if name != STUDENT},
        "train": make_plan(images, candidates.policy, teacher_info(candidates, STUDENT)).dataset_digest,
        "val": _val_digest(candidates),
    }


def _fingerprint(candidates: Recipe, name: str) -> str:
    """Of what decides a model's features, whichever group of the cache holds them: that may go, and the order stays.

    So does it whether or not detections are stored beside them.
    """
    record = wanted_record(candidates, name)
    return fingerprint({key: value for key, value in record.items() if key != "detections"})


def _kept(recipe: Recipe, settings: dict[str, Any]) -> Order | None:
    content = _read(recipe)
    if content.get("settings") != settings:
        return None
    return Order(**{key: value for key, value in content.items() if key != "evaluated"})


def _accuracy(recipe: Recipe, candidates: Recipe, name: str) -> float:
    """A teacher's box AP in points: given, measured before, or measured now on the cluster and kept."""
    given = recipe.teachers[name].ap
    if given is not None:
        return given
    key = f"{_fingerprint(candidates, name)}-{_val_digest(recipe)}"
    content = _read(recipe)
    evaluated = content.get("evaluated", {})
    if key not in evaluated:
        say(f"teacher {name}: evaluating on the val set")
        evaluated[key] = _evaluate(recipe, name)
        say(f"teacher {name}: box AP {evaluated[key]:.1f}")
        _write(recipe, {**content, "evaluated": evaluated})
    return float(evaluated[key])


def _evaluate(recipe: Recipe, name: str) -> float:
    cluster.connect()
    wanted = cluster.demand(recipe.actors.cpus, recipe.actors.gpus, 1)
    task = ray.remote(_evaluate_here).options(num_cpus=wanted.cpus, num_gpus=wanted.gpus)
    try:
        return float(ray.get(task.remote(recipe, name, Path(recipe.work_dir) / "evaluations" / name)))
    except RayTaskError as error:
        if isinstance(error.cause, MtpdError):
            raise error.cause from None
        raise


def _evaluate_here(recipe: Recipe, name: str, work_dir: Path) -> float:
    given_device("actors.gpus", "its evaluation", f"teachers.{name}", TeacherLoadError)
    return evaluate_teacher(recipe, name, work_dir)


def _open(candidates: Recipe, name: str) -> TeacherCache:
    cache = candidates.cache
    return TeacherCache.open(
        cache.uri,
        name,
        fingerprint=teacher_info(candidates, name).record,
        local_dir=cache.local_dir,
        local_bytes=cache.local_bytes,
    )


def _present(rows: OrderRows, caches: dict[str, TeacherCache]) -> OrderRows:
    """The rows that every model has: images that could not be read are left out."""
    fit, score = (
        tuple(key for key in keys if all(key in c for c in caches.values())) for keys in (rows.fit, rows.score)
    )
    if not (fit and score):
        raise RecipeError("order: fewer than two images have the features of every teacher and the student.")
    return OrderRows(fit, score)


def _val_digest(recipe: Recipe) -> str:
    """Of what decides a teacher's AP beside the teacher: annotations, and what is made of the images."""
    annotations = Path(recipe.dataset.val.ann_file).read_bytes()
    pipeline = str(evaluation_loader(recipe).dataset.pipeline)
    return hashlib.sha256(annotations + pipeline.encode()).hexdigest()[:16]


def _file(recipe: Recipe) -> Path:
    return Path(recipe.work_dir) / _FILE


def _read(recipe: Recipe) -> dict[str, Any]:
    try:
        return dict(json.loads(_file(recipe).read_text()))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise RecipeError(f"{_file(recipe)}: not what `mtpd order` wrote ({error}). Delete it.") from error


def _write(recipe: Recipe, content: dict[str, Any]) -> None:
    file = _file(recipe)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1))
    temporary.replace(file)
