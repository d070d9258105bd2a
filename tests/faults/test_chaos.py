"""A precompute that loses an actor, nodes with and without notice, its driver and the head ends as an undisturbed one.

``MTPD_CHAOS_SEEDS`` runs so many campaigns instead of one; `tests.faults.chaos` runs longer ones.
"""

import os
import random
from pathlib import Path
from typing import Any

import pytest

from tests.faults import chaos
from trainer import parse_recipe

IMAGES = 60


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return chaos.job(tmp_path_factory.mktemp("chaos"), IMAGES)


@pytest.mark.parametrize("seed", range(int(os.environ.get("MTPD_CHAOS_SEEDS", "1"))))
def test_the_cache_is_the_same_whatever_is_lost(undisturbed: dict[str, Any], tmp_path: Path, seed: int) -> None:
    campaign = chaos.Campaign(undisturbed, tmp_path / "campaign", seed)
    kinds = random.Random(seed).sample(chaos.KINDS, k=len(chaos.KINDS))
    report = campaign.run(kinds)
    assert report.strikes.total() >= 3, "the precompute ended before it was struck"
    assert report.rows == 2 * IMAGES
    # every file to the byte: no row is missing, in a second place, or another
    assert chaos.digests(campaign.recipe) == chaos.digests(parse_recipe(undisturbed, "test"))
    assert set(report.committed) <= set(report.begun)
    assert report.again <= report.allowed, report
    assert not report.repeated, report
