"""The desk beside a precompute that holds the lease: what that commits is waited for, what it leaves is computed."""

import asyncio
from pathlib import Path

import pytest
from ray.exceptions import OutOfMemoryError

from cache import (
    Lease,
    RowTargets,
    Storage,
    Unit,
    compact,
    fence,
    load_index,
    make_plan,
    open_storage,
    prepare,
    write_unit,
)
from services.desk import GroupDesk
from services.outcome import UnitRecord
from tests import models
from trainer import (
    Recipe,
    Teacher,
    UnitComputer,
    first_epoch,
    parse_recipe,
    read_annotations,
    teacher_info,
)


def recipe_of(data: Path, folder: Path) -> Recipe:
    content = models.recipe(data, folder)
    content["cache"]["on_missing"] = "compute"
    return parse_recipe(content, "test")


def test_while_a_precompute_runs_its_rows_are_waited_for_and_afterwards_the_rest_is_computed(
    data: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(data, tmp_path)
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


async def nothing(unit: Unit, run: str) -> UnitRecord:
    raise AssertionError("nobody asked for a row that there is")


async def is_free(desk: GroupDesk, storage: Storage) -> bool:
    """Whether the lease is given back within some seconds."""
    for _ in range(100):
        if not storage.exists(f"{desk.info.name}/lease.json"):
            return True
        await asyncio.sleep(0.1)
    return False


def test_the_lease_is_given_back_also_where_nothing_was_computed_and_where_who_asked_is_gone(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.desk._LINGER_SECONDS", 0.2)
    recipe = recipe_of(data, tmp_path)
    info, storage = teacher_info(recipe, "small"), open_storage(recipe.cache.uri)

    async def play() -> None:
        desk = GroupDesk(recipe, info, nothing)
        gone = asyncio.create_task(desk.ask(7, 0))
        while not storage.exists(f"{info.name}/lease.json"):
            await asyncio.sleep(0)
        gone.cancel()  # the plan is not there yet
        await asyncio.wait([gone])
        assert gone.cancelled()
        assert await is_free(desk, storage)
        assert (await desk.ask(999, 0)).state == "refused"
        assert storage.exists(f"{info.name}/lease.json")
        assert await is_free(desk, storage)
        assert (await desk.open()).state == "committed"
        assert await is_free(desk, storage)

    asyncio.run(play())


def test_a_replica_that_ray_killed_for_its_memory_has_its_unit_tried_again_and_then_given_up(
    data: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(data, tmp_path)
    tries = 0

    async def compute(unit: Unit, run: str) -> UnitRecord:
        nonlocal tries
        tries += 1
        raise OutOfMemoryError("the node's memory is full")

    async def play() -> None:
        desk = GroupDesk(recipe, teacher_info(recipe, "small"), compute)
        answer = await desk.ask(7, 0)
        assert (answer.state, tries) == ("failed", 3)
        assert "the replica that computed it died (3 tries)" in answer.reason
        await desk.close()

    asyncio.run(play())
