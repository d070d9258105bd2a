"""Adaptation costs on caches whose answer is known, and the selection of teachers."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mmengine.runner import Runner
from torch import Tensor

from cache import (
    Detections,
    GroupInfo,
    Level,
    LocalStorage,
    RecipeError,
    RowTargets,
    TeacherCache,
    encode,
    load_index,
    make_plan,
    pool,
    prepare,
    write_unit,
)
from tests import models
from tests.cache import make
from tests.trainer import precompute
from trainer import (
    STUDENT,
    adaptation_costs,
    choose_rows,
    evaluate_teacher,
    parse_recipe,
    select_teachers,
    stage_config,
    teacher_info,
    with_candidates,
)

IMAGES = make.images(60)
ROWS = choose_rows(IMAGES.ids.tolist(), 2, 60)
DEMO = Path(__file__).parents[2] / "recipes" / "demo"
Maps = Callable[[Level, int, int], Tensor]


def noise(key: str, channels: int) -> Maps:
    """Independent normal numbers, each image and level its own, which do not depend on the size of the map."""

    def maps(level: Level, image_id: int, view: int) -> Tensor:
        seed = int.from_bytes(key.encode(), "little") * 1000 + image_id * 20 + view * 10 + int(level.name[1:])
        return torch.randn(channels, 16, 16, generator=torch.Generator().manual_seed(seed % 2**63))

    return maps


def linear(source: Maps, weights: Tensor, offset: float = 3.0) -> Maps:
    """A linear map of others, with an offset."""
    return lambda *where: torch.einsum("oc,chw->ohw", weights, source(*where)) + offset


def write(
    folder: Path,
    name: str,
    maps: Maps,
    channels: int,
    *,
    levels: tuple[tuple[str, int, int], ...] = (("P3", 8, 1), ("P4", 16, 1)),
    precision: str = "float16",
    divisor: int = 32,
) -> TeacherCache:
    """A cache of ``ROWS`` with these features: levels by name, stride and pooling window."""
    storage = LocalStorage(folder)
    kept = tuple(Level(level, channels, stride, window) for level, stride, window in levels)
    info = GroupInfo(name, {"precision": precision, "name": name}, kept, precision, divisor)
    plan = make_plan(IMAGES, make.POLICY, info, unit_rows=8, wanted=ROWS.wanted(IMAGES.ids, 2))
    prepare(storage, plan)
    for unit in plan.units():
        height, width = (int(side) for side in unit.bucket.split("x"))
        targets = []
        for row in unit.rows:
            encoded = {}
            for level in kept:
                rows, columns = level.map_size(height, width)
                own = maps(level, row.image_id, row.view)[None, :, :rows, :columns]
                encoded[level.name] = encode(pool(own, level.pool), precision)
            values = {n: e.values[0].numpy() for n, e in encoded.items()}
            scales = {n: e.scales[0].numpy() for n, e in encoded.items() if e.scales is not None}
            nothing = Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int32))
            targets.append(RowTargets(row, values, scales, dict.fromkeys(values, 40.0), nothing, 0))
        write_unit(storage, info, unit, targets)
    return TeacherCache(storage, info, load_index(storage, info))


def test_the_cost_is_directed_and_has_its_known_values(tmp_path: Path) -> None:
    a = noise("a", 8)
    lost = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))[0][:6]  # 6 of 8 directions
    caches = {
        "a": write(tmp_path, "a", a, 8),
        "b": write(tmp_path, "b", linear(a, lost), 6),
        "c": write(tmp_path, "c", noise("c", 8), 8),
    }
    costs = {pair: cost.value for pair, cost in adaptation_costs(caches, ROWS, positions=None).items()}
    assert costs["a", "b"] < 1e-5
    assert costs["b", "a"] == pytest.approx(2 / 8, abs=0.02)
    for pair in (("a", "c"), ("c", "a"), ("b", "c"), ("c", "b")):
        assert costs[pair] == pytest.approx(1, abs=0.02)


def test_the_cost_is_that_of_a_plain_least_squares_fit(tmp_path: Path) -> None:
    a = noise("a", 5)

    def half(level: Level, *where: int) -> Tensor:
        # P4 is louder, and predicted worse: it must not weigh more for that
        maps = 0.7 * linear(a, torch.eye(5)[:3], 2.0)(level, *where) + noise("b", 3)(level, *where)
        return maps if level.name == "P3" else 10 * (maps + noise("c", 3)(level, *where))

    caches = {"a": write(tmp_path, "a", a, 5), "b": write(tmp_path, "b", half, 3)}
    left, values, spreads = [], [], []
    for level in ("P3", "P4"):
        x, y = (
            [
                np.concatenate([cache[key].dequantize()[level].double().numpy().reshape(c, -1).T for key in keys])
                for keys in (ROWS.fit, ROWS.score)
            ]
            for cache, c in ((caches["a"], 5), (caches["b"], 3))
        )
        x = [np.hstack([part, np.ones((len(part), 1))]) for part in x]
        weights = np.linalg.lstsq(x[0], y[0], rcond=None)[0]
        spreads.append(np.square(y[1] - y[1].mean(axis=0)).sum())
        left.append(np.square(y[1] - x[1] @ weights).sum() / spreads[-1])
        values.append(y[1].size)
    cost = adaptation_costs(caches, ROWS, positions=None, ridge=1e-9)["a", "b"]
    assert cost.levels == pytest.approx({"P3": left[0], "P4": left[1]}, rel=1e-6)
    assert left[1] > 1.1 * left[0]
    assert cost.value == pytest.approx(np.average(left, weights=values), rel=1e-6)
    assert cost.variance == pytest.approx({"P3": spreads[0] / sum(spreads), "P4": spreads[1] / sum(spreads)})
    # nothing depends on how the positions come together
    for block in (3, 10_000):
        again = adaptation_costs(caches, ROWS, positions=None, ridge=1e-9, block=block)["a", "b"]
        assert again.value == pytest.approx(cost.value, rel=1e-10)


def test_positions_that_are_drawn_stand_for_all_of_their_level(tmp_path: Path) -> None:
    a, b = noise("a", 4), noise("b", 4)
    caches = {
        "a": write(tmp_path, "a", a, 4),
        "b": write(tmp_path, "b", lambda level, *where: (a if level.name == "P3" else b)(level, *where), 4),
    }
    whole = adaptation_costs(caches, ROWS, positions=None)["a", "b"]
    drawn = adaptation_costs(caches, ROWS, positions=10)["a", "b"]
    # P3 is predicted and four times as large as P4, which is not: without weights a half would be left
    assert whole.value == pytest.approx(1 / 5, abs=0.01)
    assert drawn.value == pytest.approx(1 / 5, abs=0.02)
    assert drawn.value != whole.value


@pytest.mark.parametrize(("precision", "error"), [("float16", 1e-4), ("int8", 1e-3), ("int4", 0.1)])
def test_a_map_stored_pooled_is_compared_on_its_own_grid(tmp_path: Path, precision: str, error: float) -> None:
    a = noise("a", 4)
    caches = {
        "whole": write(tmp_path, "whole", a, 4, precision=precision),
        # padded to more than the other: what lies beyond the smaller map is left out
        "pooled": write(
            tmp_path, "pooled", a, 4, levels=(("P3", 8, 2), ("P5", 32, 1)), precision=precision, divisor=64
        ),
    }
    costs = adaptation_costs(caches, ROWS, positions=6)
    assert set(costs["whole", "pooled"].levels) == {"P3"}
    assert costs["whole", "pooled"].value < error
    assert costs["pooled", "whole"].value > 0.5  # three of four directions of a window are gone


# half of the distance of two neighbouring values is 0.0005, 0.004 and 0.08 of them
@pytest.mark.parametrize(
    ("precision", "weak", "cost"), [("float16", 2e-3, 0.01), ("int8", 0.01, 0.1), ("int4", 0.2, 0.2)]
)
def test_a_level_counts_as_constant_where_it_varies_less_than_its_precision_resolves(
    tmp_path: Path, precision: str, weak: float, cost: float
) -> None:
    a, offset = noise("a", 4), torch.tensor([0, 7, 0.1, 5])[:, None, None]

    def flat(level: Level, *where: int) -> Tensor:
        still = torch.zeros_like(a(level, *where)) + offset
        still[3] += 1e-4 * a(level, *where)[3]
        return a(level, *where) if level.name == "P3" else still

    def varying(level: Level, *where: int) -> Tensor:
        return offset * (1 + weak * a(level, *where))

    caches = {
        "a": write(tmp_path, "a", a, 4),
        "flat": write(tmp_path, "flat", flat, 4, precision=precision),
        "weak": write(tmp_path, "weak", varying, 4, precision=precision),
        "nothing": write(tmp_path, "nothing", flat, 4, levels=(("P4", 16, 1),), precision=precision),
    }
    compared = {name: caches[name] for name in ("a", "flat", "weak")}
    for positions in (None, 6):
        costs = adaptation_costs(compared, ROWS, positions=positions)
        assert set(costs["a", "flat"].levels) == {"P3"}
        assert costs["a", "flat"].variance == {"P3": 1.0}
        assert set(costs["a", "weak"].levels) == {"P3", "P4"}
        assert costs["a", "weak"].value < cost
        # what is constant says nothing of what is not
        assert costs["flat", "weak"].levels["P4"] == pytest.approx(1, abs=0.1)
        with pytest.raises(RecipeError, match="features of nothing are the same everywhere"):
            adaptation_costs({"a": caches["a"], "nothing": caches["nothing"]}, ROWS, positions=positions)


def test_models_that_cannot_be_compared_are_named(tmp_path: Path) -> None:
    caches = {
        "a": write(tmp_path, "a", noise("a", 2), 2, levels=(("P3", 8, 1),)),
        "b": write(tmp_path, "b", noise("b", 2), 2, levels=(("P4", 16, 1),)),
    }
    with pytest.raises(RecipeError, match="a and b have no level of equal stride"):
        adaptation_costs(caches, ROWS)


def test_channels_that_say_the_same_are_solved_with_the_least_ridge(data: Path, tmp_path: Path) -> None:
    a = noise("a", 2)
    twice = {"a": write(tmp_path, "a", linear(a, torch.eye(2)[[0, 0, 1]]), 3), "b": write(tmp_path, "b", a, 2)}
    assert adaptation_costs(twice, ROWS, ridge=1e-12)["a", "b"].value < 1e-5
    with pytest.raises(RecipeError, match=r"order\.ridge: .*greater than or equal to 0\.000000000001"):
        parse_recipe(models.recipe(data, tmp_path) | {"order": {"ridge": 1e-30}}, "test")


def test_rows_are_split_by_image_and_do_not_depend_on_the_order_of_images() -> None:
    ids = list(range(1, 1001))
    rows = choose_rows(ids, 2, 100)
    images = [{image for image, _ in keys} for keys in (rows.fit, rows.score)]
    assert [len(part) for part in images] == [50, 50]
    assert not images[0] & images[1]
    assert {view for _, view in rows.fit} == {0, 1}
    assert choose_rows(ids[::-1], 2, 100) == rows
    assert choose_rows(ids, 2, 100, seed=1) != rows
    # images that join push others out, and leave the views of those that stay
    more = choose_rows([*ids, *range(2000, 2300)], 2, 100)
    before, after = (dict((*r.fit, *r.score)) for r in (rows, more))
    assert 50 < len(before.keys() & after.keys()) < 100
    assert all(before[image] == after[image] for image in before.keys() & after.keys())
    assert len(choose_rows(ids[:5], 2, 100)) == 5
    wanted = rows.wanted(np.array(ids), 2)
    assert {(ids[i], v) for i, v in zip(*wanted.nonzero(), strict=True)} == {*rows.fit, *rows.score}


ACCURACIES = {"r101": 41.0, "x101": 41.6, "far": 40.0, "hard": 39.0}
STUDENT_COSTS = {"r101": 0.4, "x101": 0.6, "far": 0.5, "hard": 0.7}
PAIRS = {(a, b): 0.9 for a in ACCURACIES for b in ACCURACIES if a != b} | {("r101", "x101"): 0.3, ("hard", "x101"): 0.1}


def test_the_weaker_teacher_of_a_family_comes_first_and_every_reason_has_its_numbers() -> None:
    found = select_teachers(STUDENT_COSTS, PAIRS, ACCURACIES, 3)
    assert found.sequence == ("r101", "x101")
    assert found.reasons == {
        "r101": "taken before x101: C(r101 -> x101) 0.300 is less than C(student -> x101) 0.600, "
        "and C(student -> r101) 0.400 too",
        "x101": "taken as the last: the most accurate, 41.6 AP",
        "far": "left: not easier for the student than r101 is: C(student -> far) 0.500, C(student -> r101) 0.400",
        "hard": "left: not easier for the student than r101 is: C(student -> hard) 0.700, C(student -> r101) 0.400",
    }


def test_the_sequence_ends_where_no_teacher_helps_or_at_its_limit() -> None:
    alone = select_teachers(STUDENT_COSTS, PAIRS | {("r101", "x101"): 0.6}, ACCURACIES, 3)
    assert alone.sequence == ("x101",)
    assert "no nearer to x101 than the student is: C(r101 -> x101) 0.600" in alone.reasons["r101"]
    assert "not easier for the student than x101 is" in alone.reasons["hard"]
    limited = select_teachers(STUDENT_COSTS, PAIRS, ACCURACIES, 1)
    assert limited.sequence == ("x101",)
    assert limited.reasons["r101"] == "left: the sequence has its 1 teachers (max_teachers)"
    three = select_teachers(STUDENT_COSTS | {"far": 0.2}, PAIRS | {("far", "r101"): 0.1}, ACCURACIES, 3)
    assert three.sequence == ("far", "r101", "x101")


COSTS = st.floats(0, 2, allow_nan=False)


@given(st.data(), st.integers(1, 6), st.integers(1, 5))
def test_any_costs_give_a_sequence_that_rises_for_the_student(draw: st.DataObject, count: int, longest: int) -> None:
    names = [f"t{n}" for n in range(count)]
    student, accuracies = ({n: draw.draw(COSTS) for n in names} for _ in range(2))
    pairs = {(a, b): draw.draw(COSTS) for a in names for b in names if a != b}
    found = select_teachers(student, pairs, accuracies, longest)
    assert 1 <= len(found.sequence) <= longest
    assert len(set(found.sequence)) == len(found.sequence)
    assert accuracies[found.sequence[-1]] == max(accuracies.values())
    rising = [student[name] for name in found.sequence]
    assert all(a < b for a, b in pairwise(rising))
    assert {n for n, reason in found.reasons.items() if reason.startswith("taken")} == set(found.sequence)
    assert found.reasons.keys() == set(names)


def with_student(data: Path, folder: Path) -> dict:
    """A recipe whose student has weights other than its teacher of the same kind."""
    content = models.recipe(data, folder)
    content["student"]["checkpoint"] = str(models.checkpoint("retinanet-r18", data, seed=1))
    return content


def test_detectors_are_compared_from_few_rows_which_the_precompute_then_keeps(data: Path, tmp_path: Path) -> None:
    recipe = parse_recipe(with_student(data, tmp_path), "test")
    candidates = with_candidates(recipe)
    assert list(candidates.teachers) == ["small", "swin", STUDENT]
    rows = choose_rows(range(1, 21), 2, 8)
    for name in candidates.teachers:
        assert precompute.fill(candidates, name, rows) == []
    caches = {n: TeacherCache.open(recipe.cache.uri, n) for n in candidates.teachers}
    assert all(set(cache.keys()) == {*rows.fit, *rows.score} for cache in caches.values())
    assert not any(cache.info.detections for cache in caches.values()), "features alone are compared"
    before = {key: caches["small"][key].copy() for key in caches["small"]}
    costs = adaptation_costs(caches, rows)
    assert all(cost.value > 0 and set(cost.levels) == {"P3", "P4", "P5", "P6", "P7"} for cost in costs.values())
    # the full precompute has the same group, computes the other rows only, and the first ones stay what they were
    info = teacher_info(recipe, "small")
    assert info == caches["small"].info
    assert precompute.fill(recipe, "small") == []
    full = TeacherCache.open(recipe.cache.uri, "small", fingerprint=info.record)
    assert len(full) == 40
    for key, targets in before.items():
        assert full.index.find(*key) == caches["small"].index.find(*key)
        assert all(torch.equal(full[key].features[level], targets.features[level]) for level in full.levels)


def test_a_student_that_was_never_trained_has_no_features_to_compare(data: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"order\.checkpoint: .*train the student alone first"):
        with_candidates(parse_recipe(models.recipe(data, tmp_path), "test"))
    content = with_student(data, tmp_path)
    content["teachers"][STUDENT] = content["teachers"]["small"]
    with pytest.raises(RecipeError, match=r"teachers\.student: .*choose another"):
        with_candidates(parse_recipe(content, "test"))


def test_a_teacher_is_evaluated_as_a_student_is(data: Path, tmp_path: Path) -> None:
    detector = {"config": str(DEMO / "retinanet_r18_w20.py"), "checkpoint": str(DEMO / "r18_w20.pth")}
    content = models.recipe(data, tmp_path, views={"scale": [192, 144]}, stages=[{"epochs": 1}])
    content["student"] = detector
    content["teachers"]["demo"] = detector
    recipe = parse_recipe(content, "test")
    runner = Runner.from_cfg(stage_config(recipe, 1))
    runner.model.init_weights()
    expected = 100 * runner.val_loop.run()["coco/bbox_mAP"]
    assert expected > 1
    assert evaluate_teacher(recipe, "demo", tmp_path / "evaluation") == pytest.approx(expected, abs=1e-6)
    content["teachers"]["demo"] = {**detector, "cfg_options": {"model.bbox_head.num_classes": 80}}
    with pytest.raises(RecipeError, match=r"its heads have 80 classes, the val set has 6\. .*teachers\.demo\.ap"):
        evaluate_teacher(parse_recipe(content, "test"), "demo", tmp_path / "evaluation")
