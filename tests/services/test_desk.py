"""The desk beside a precompute that holds the lease: what that commits is waited for, what it leaves is computed."""

import asyncio
from pathlib import Path

from cache import Lease, RowTargets, Unit, compact, fence, load_index, make_plan, open_storage, prepare, write_unit
from services.desk import GroupDesk
from services.outcome import UnitRecord
from tests import models
from trainer import (
    Teacher,
    UnitComputer,
    first_epoch,
    parse_recipe,
    read_annotations,
    teacher_info,
)


def test_while_a_precompute_runs_its_rows_are_waited_for_and_afterwards_the_rest_is_computed(
    data: Path, tmp_path: Path
) -> None:
    content = models.recipe(data, tmp_path)
    content["cache"]["on_missing"] = "compute"
    recipe = parse_recipe(content, "test")
    info, storage, spec = teacher_info(recipe, "small"), open_storage(recipe.cache.uri), recipe.teachers["small"]
    computer = UnitComputer(Teacher.of_group(spec, info), info, recipe.policy, recipe.dataset.train, spec.batch_size)
    computed: list[str] = []

    def commit(unit: Unit, run: str) -> int:
        targets: list[RowTargets] = computer.run(unit)[0]
        write_unit(storage, info, unit, targets, lambda: fence(storage, info.name, run))
        return len(targets)

    async def compute(unit: Unit, run: str) -> UnitRecord:
        computed.append(unit.name)
        await asyncio.sleep(0.2)
        return UnitRecord(unit.name, commit(unit, run), (), 0, 0.0)

    async def play() -> None:
        desk = GroupDesk(recipe, info, compute)
        images = read_annotations(recipe.dataset.train.ann_file, "test").images
        with Lease(storage, info.name) as lease:  # a precompute, which commits two units and then ends
            plan = make_plan(images, recipe.policy, info, unit_rows=4, first=first_epoch(recipe))
            prepare(storage, plan)
            first, second, third, *_ = plan.units()
            commit(first, lease.run)
            keys = [(unit.rows[0].image_id, unit.rows[0].view) for unit in (first, second, third)]
            assert (await desk.ask(*keys[0])).state == "committed"
            waiting = [asyncio.create_task(desk.ask(*key)) for key in keys[1:] for _ in range(5)]
            await asyncio.sleep(1.0)
            assert not any(task.done() for task in waiting)
            commit(second, lease.run)
            await asyncio.gather(*waiting[:5])
            assert not any(task.done() for task in waiting[5:])
            assert computed == []
            compact(storage, info)
        answers = await asyncio.gather(*waiting)
        assert {answer.state for answer in answers} == {"committed"}
        assert [answer.computed for answer in answers] == 5 * [False] + 5 * [True]
        assert computed == [third.name]
        assert storage.exists(f"{info.name}/lease.json")
        await desk.close()
        assert not storage.exists(f"{info.name}/lease.json")
        assert len(load_index(storage, info)) == sum(len(unit.rows) for unit in (first, second, third))

    asyncio.run(play())
