"""The pool on real Ray, with an actor that does as the unit's name says."""

import os
from collections import Counter

import pytest
import ray

from cache import MtpdError, TeacherLoadError, Unit
from services.pool import Pool, SetAside


@ray.remote(max_concurrency=3, num_cpus=0)
class Puppet:
    def __init__(self, fault: str = "") -> None:
        self.fault = fault

    def load(self) -> None:
        if self.fault == "load":
            raise TeacherLoadError("teachers.t: does not fit")
        if self.fault == "die":
            os._exit(1)

    def run(self, unit: Unit) -> str:
        if unit.bucket == "poison":
            os._exit(1)
        if unit.bucket == "bad":
            raise RuntimeError("cannot be computed")
        if unit.bucket == "user":
            raise MtpdError("the disk is full")
        return unit.name


@pytest.fixture(scope="module", autouse=True)
def cluster():
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


def units(*buckets: str) -> list[Unit]:
    return [Unit(bucket, number, 4, ()) for number, bucket in enumerate(buckets)]


def outcomes(wanted: list[Unit], actors: int = 2, fault: str = "", notices: list | None = None):
    pool = Pool(lambda: Puppet.remote(fault), actors, 1, (notices if notices is not None else []).append)
    try:
        return list(pool.run(wanted))
    finally:
        pool.close()


def test_every_unit_is_done_once() -> None:
    wanted = units(*["a"] * 40)
    assert Counter(outcomes(wanted)) == Counter(u.name for u in wanted)


def test_what_a_dead_actor_held_is_done_by_another_and_the_poison_is_set_aside() -> None:
    notices: list[str] = []
    wanted = units(*["a"] * 9, "poison", *["a"] * 10)
    done = outcomes(wanted, notices=notices)
    aside = [o for o in done if isinstance(o, SetAside)]
    assert [o.unit.bucket for o in aside] == ["poison"]
    assert "died (3 tries)" in aside[0].reason
    assert {o for o in done if isinstance(o, str)} == {u.name for u in wanted if u.bucket == "a"}
    assert any("a teacher actor died" in n for n in notices)


def test_a_unit_that_fails_is_tried_again_then_set_aside() -> None:
    done = outcomes(units("a", "bad", "a"))
    assert sorted(type(o).__name__ for o in done) == ["SetAside", "str", "str"]
    assert next(o for o in done if isinstance(o, SetAside)).reason.endswith("cannot be computed (3 tries)")


def test_when_every_unit_fails_the_run_ends_early_and_says_why() -> None:
    with pytest.raises(MtpdError, match=r"every unit fails.*cannot be computed"):
        outcomes(units(*["bad"] * 50))


def test_an_error_of_the_users_ends_the_run_with_its_message() -> None:
    with pytest.raises(MtpdError, match=r"^the disk is full$"):
        outcomes(units("a", "user", "a"))
    with pytest.raises(TeacherLoadError, match="does not fit"):
        outcomes(units("a"), fault="load")


def test_actors_that_die_before_any_unit_end_the_run() -> None:
    with pytest.raises(MtpdError, match="keep dying"):
        outcomes(units("a"), actors=1, fault="die")
