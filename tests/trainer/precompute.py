"""A precompute in this process, without ray: the same units, the same computation, the same writer."""

import torch

from cache import Lease, compact, load_index, make_plan, open_storage, prepare, write_head, write_unit
from trainer import Failure, OrderRows, Recipe, Teacher, UnitComputer, head_file, read_annotations, teacher_info


def fill(recipe: Recipe, name: str, rows: OrderRows | None = None, device: torch.device | str = "cpu") -> list[Failure]:
    """Compute what is missing, of all rows or of some, on a device. Returns the failures."""
    info, storage, spec = teacher_info(recipe, name), open_storage(recipe.cache.uri), recipe.teachers[name]
    images = read_annotations(recipe.dataset.train.ann_file, "test").images
    failures: list[Failure] = []
    with Lease(storage, info.name):
        plan = make_plan(
            images,
            recipe.policy,
            info,
            committed=load_index(storage, info),
            unit_rows=recipe.cache.unit_rows,
            wanted=None if rows is None else rows.wanted(images.ids, len(recipe.policy)),
        )
        prepare(storage, plan)
        if info.head is not None:
            write_head(storage, info, head_file(spec, name))
        teacher = Teacher.of_group(spec, info, device)
        computer = UnitComputer(teacher, info, recipe.policy, recipe.dataset.train, spec.batch_size)
        for unit in plan.units():
            targets, failed = computer.run(unit)
            failures += failed
            if targets:
                write_unit(storage, info, unit, targets)
        compact(storage, info)
    return failures
