"""The arithmetic of cost against jobs whose answer is known, and the timing of a recipe's parts."""

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import models
from trainer import (
    Job,
    Place,
    StageCost,
    Step,
    TeacherCost,
    break_even_epochs,
    break_even_students,
    cheapest,
    measure,
    parse_recipe,
    shortest_trial,
    spend,
    total,
    train_stage,
)

CPU = Place("cpu", cores=1, threads=1)
# multiples of 1/1024, so that sums are exact and "costs the same" is too
EXACT = st.integers(1, 4096).map(lambda n: n / 1024)


def job(
    *, epochs: int, images: int = 100, views: int = 2, look: float, write: float, read: float, start: float = 0.0
) -> Job:
    """A student's step takes a second, a teacher's look at a view the same online as in a precompute."""
    stage = StageCost(("t",), epochs, 0, Step(0, 1), Step(read, 1), Step(0, 1 + look), read)
    teacher = TeacherCost(images * views, images * views, 10.0, start, 0.0, look, write)
    nothing = Step(0, 0)
    return Job(images, 0, CPU, CPU, nothing, 0.0, 0.0, {"t": teacher}, (stage,))


@given(
    look=EXACT, write=EXACT, read=EXACT, epochs=st.integers(1, 40), views=st.integers(1, 4), students=st.integers(1, 6)
)
def test_cached_wins_exactly_where_the_forwards_that_it_saves_outweigh_writing_and_reading(
    look: float, write: float, read: float, epochs: int, views: int, students: int
) -> None:
    one = job(epochs=epochs, views=views, look=look, write=write, read=read)
    online, cached = (total(spend(one, way, students)) for way in ("online", "cached"))
    saved = online.teacher_forwards - cached.teacher_forwards
    assert saved == students * epochs * 100 - views * 100
    wins = saved * look > 100 * views * write + students * epochs * 100 * read
    assert (cached.seconds < online.seconds) == wins
    assert (cached.written_bytes, online.written_bytes) == (100 * views * 10, 0)


@given(look=EXACT, write=EXACT, read=EXACT, start=EXACT, epochs=st.integers(1, 40), views=st.integers(1, 4))
def test_break_even_is_the_first_number_from_which_cached_wins(
    look: float, write: float, read: float, start: float, epochs: int, views: int
) -> None:
    one = job(epochs=epochs, views=views, look=look, write=write, read=read, start=start)

    def wins(epochs: int, students: int) -> bool:
        other = replace(one, stages=(replace(one.stages[0], epochs=epochs),))
        online, cached = (total(spend(other, way, students)).seconds for way in ("online", "cached"))
        return cached < online

    found = break_even_epochs(one, one.stages[0])
    assert (found is None) == (look <= read)
    if found is not None:
        assert wins(found, 1)
        assert wins(10 * found, 1)
        assert found == 1 or not wins(found - 1, 1)
    found = break_even_students(one)
    if found is not None:
        assert wins(epochs, found)
        assert wins(epochs, 10 * found)
        assert found == 1 or not wins(epochs, found - 1)


def test_rows_that_are_there_and_teachers_that_come_again_are_paid_for_once() -> None:
    one = job(epochs=2, look=4.0, write=0.5, read=0.25)
    twice = replace(one, stages=one.stages * 2)
    first, second = spend(twice, "cached")
    assert first.teacher_forwards == 200
    assert second.teacher_forwards == second.precompute == second.written_bytes == 0
    there = replace(one, teachers={"t": replace(one.teachers["t"], todo=0)})
    assert total(spend(there, "cached")).precompute == 0
    assert break_even_students(there) == break_even_epochs(there, there.stages[0]) == 1
    assert cheapest(job(epochs=2, look=4.0, write=0.5, read=0.25)) == "online"
    assert cheapest(job(epochs=3, look=4.0, write=0.5, read=0.25)) == "cached"


def test_the_last_step_of_an_epoch_is_filled() -> None:
    one = replace(job(epochs=3, images=100, look=0.25, write=0.125, read=0.0625), batch=8)
    assert total(spend(one, "online")).teacher_forwards == 3 * 104
    assert total(spend(one, "cached")).training == 3 * 104 * 1.0625
    assert total(spend(one, "cached")).teacher_forwards == 200


def test_hybrid_waits_for_every_row_once_but_for_what_loaders_ask_ahead() -> None:
    cached = job(epochs=3, look=0.25, write=0.125, read=0.0625, start=2)
    assert cached.ways == ("online", "cached")
    with pytest.raises(ValueError, match="hybrid"):
        spend(cached, "hybrid")
    one = replace(cached, service=7.0)
    assert one.ways == ("online", "cached", "hybrid")
    trained = 3 * 100 * 1.0625
    first, both = (total(spend(one, "hybrid", students)) for students in (1, 2))
    assert first.seconds == 7 + (2 + 200 * 0.375) + trained
    assert both.seconds - first.seconds == trained  # the second misses nothing
    assert (first.teacher_forwards, both.teacher_forwards, both.written_bytes) == (200, 200, 2000)
    short = replace(one, stages=(replace(one.stages[0], epochs=1),))
    assert [total(spend(short, "hybrid", students)).teacher_forwards for students in (1, 2)] == [100, 200]
    # a process that asks ahead hides them behind two epochs, which take longer
    ahead = total(spend(replace(one, loaders=1), "hybrid"))
    assert ahead.seconds == 7 + 2 + total(spend(replace(one, loaders=1), "cached")).training
    there = replace(one, teachers={"t": replace(one.teachers["t"], todo=0)})
    assert total(spend(there, "hybrid")) == total(spend(there, "cached"))


def test_what_overlaps_takes_as_long_as_its_slowest_part() -> None:
    gpu, few = Place("cuda", cores=4, threads=4), Place("cpu", cores=2, threads=2)
    assert gpu.overlapped(device=8, host=4, lanes=0) == 12  # one after the other
    assert gpu.overlapped(device=8, host=4, lanes=1) == 8  # hidden
    assert gpu.overlapped(device=1, host=12, lanes=3) == 4  # the lanes are too slow
    assert gpu.overlapped(device=1, host=12, lanes=100) == 13 / 4  # so are the processors
    assert few.overlapped(device=8, host=4, lanes=2) == 10  # the teacher's threads are the decoder's processors


def test_the_parts_of_a_recipe_are_timed_beside_it_and_nothing_is_written(data: Path, tmp_path: Path) -> None:
    content = models.recipe(data, tmp_path)
    content["teachers"]["other"] = models.teacher("gfl-r18", data, batch_size=3)
    content["stages"] = [
        {"epochs": 3},
        {"teacher": ["small", "swin"], "mechanisms": [{"type": "PKDLoss"}], "epochs": 1},
        {"teacher": "small", "mechanisms": [{"type": "DenseLogitLoss"}, {"type": "CrossKDLoss"}], "epochs": 1},
        {"teacher": "other", "mechanisms": [{"type": "PKDLoss", "levels": ["P4"]}], "epochs": 2},
    ]
    content["student"]["inherit"] = "small"
    content["cache"]["precision"] = "int8"
    before = set(tmp_path.iterdir())
    found = measure(parse_recipe(content, "test"), CPU, CPU, rounds=1)
    assert set(tmp_path.iterdir()) == before
    assert found.kept == 0.95  # one of the twenty scenes is empty
    assert (found.batch_size, found.loaders) == (4, 0)
    assert list(found.teachers) == ["small", "swin", "other"]
    alone, both, _, last = found.stages
    assert alone.plain == alone.cached == alone.online
    assert [stage.evaluations for stage in found.stages] == [3, 1, 1, 2]
    # 16 channels of 6 x 8 (6 x 6, 8 x 6) at P4, a byte each, and 4 bytes of scale
    assert 16 * 36 + 64 <= last.read_bytes <= 16 * 48 + 64
    assert both.read_bytes > 2 * last.read_bytes
    assert both.online.compute > both.plain.compute + both.cached.load


def test_the_shortest_stage_is_one_step_that_downloads_nothing(data: Path, tmp_path: Path) -> None:
    content = models.recipe(data, tmp_path)
    options = content["student"]["cfg_options"]
    options["model.backbone.init_cfg"] = {"type": "Pretrained", "checkpoint": "torchvision://resnet18"}
    content["training"] = {"batch_size": 3}
    recipe, before = parse_recipe(content, "test"), set(tmp_path.iterdir())
    with TemporaryDirectory() as folder:
        short, evaluated = shortest_trial(recipe, Path(folder))
        result = train_stage(short, 1)
        assert evaluated == 6
        assert (result.images, result.teacher_forwards) == (3, 0)
        assert result.student.startswith(folder)
    assert set(tmp_path.iterdir()) == before
