"""Feature matching, MGD and PKD against computations that loop over images and know no masks; pairing and checking."""

import re

import pytest
import torch
from torch import Tensor

from cache import Level, RecipeError
from trainer.mechanisms import Batch, FeatureMatchingLoss, MGDLoss, PKDLoss, check_mechanism

C = 6
SIZES = [(5, 7), (4, 8)]  # two images of different shapes in one batch of 5 x 8
LEVELS = (Level("P3", C, 8),)


def batch(channels: int = C) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(2, channels, 5, 8, generator=generator)
    teacher = torch.zeros(2, C, 5, 8)
    valid = torch.zeros(2, 1, 5, 8, dtype=torch.bool)
    for n, (h, w) in enumerate(SIZES):
        teacher[n, :, :h, :w] = torch.randn(C, h, w, generator=generator) * 3 + 1
        valid[n, :, :h, :w] = True
    return {"P3": student}, {"P3": teacher}, {"P3": valid}


def own(maps: Tensor) -> list[Tensor]:
    return [maps[n, :, :h, :w] for n, (h, w) in enumerate(SIZES)]


def columns(maps: Tensor) -> Tensor:
    """(C, positions) of all images' own maps."""
    return torch.cat([m.flatten(1) for m in own(maps)], dim=1)


def test_feature_matching_is_the_mean_squared_error_of_the_own_maps() -> None:
    student, teacher, valid = batch()
    loss = FeatureMatchingLoss(LEVELS, LEVELS, loss_weight=2.0)(Batch(student, teacher, valid))
    expected = 2.0 * torch.nn.functional.mse_loss(columns(student["P3"]), columns(teacher["P3"]))
    torch.testing.assert_close(loss, expected)


def test_normalised_feature_matching_does_not_depend_on_the_teachers_magnitude() -> None:
    student, teacher, valid = batch()
    mechanism = FeatureMatchingLoss(LEVELS, LEVELS, normalize=True)
    s, t = columns(student["P3"]), columns(teacher["P3"])
    expected = ((s - t).square() / t.var(dim=1, correction=0, keepdim=True)).mean()
    torch.testing.assert_close(mechanism(Batch(student, teacher, valid)), expected)
    scaled = mechanism(Batch({"P3": student["P3"] * 50}, {"P3": teacher["P3"] * 50}, valid))
    torch.testing.assert_close(scaled, expected, rtol=1e-4, atol=1e-5)


def test_pkd_is_one_minus_pearsons_r_of_the_own_maps() -> None:
    student, teacher, valid = batch()
    loss = PKDLoss(LEVELS, LEVELS, loss_weight=6.0)(Batch(student, teacher, valid))
    r = [
        torch.corrcoef(torch.stack([s, t]))[0, 1]
        for s, t in zip(columns(student["P3"]), columns(teacher["P3"]), strict=True)
    ]
    positions = columns(student["P3"]).shape[1]
    expected = (
        6.0 * (1 - torch.stack(r).mean()) * (positions - 1) / positions
    )  # unbiased deviations, mean over positions
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)


def test_mgd_of_a_mixed_batch_is_that_of_each_image_alone() -> None:
    student, teacher, valid = batch()
    mechanism = MGDLoss(LEVELS, LEVELS, loss_weight=0.5, mask_ratio=0.0)
    first, second = mechanism.generation["P3"]
    expected = sum(
        (second(first(s[None]).relu()) - t[None]).square().sum()
        for s, t in zip(own(student["P3"]), own(teacher["P3"]), strict=True)
    )
    torch.testing.assert_close(mechanism(Batch(student, teacher, valid)), 0.5 * expected / 2)


def test_mgd_hides_the_asked_share_of_positions_in_all_channels_at_once() -> None:
    mechanism = MGDLoss(LEVELS, LEVELS, mask_ratio=0.65)
    seen = []
    mechanism.generation["P3"][0].register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[0]))
    ones = {"P3": torch.ones(4, C, 50, 50)}
    mechanism(Batch(ones, ones, {"P3": torch.ones(4, 1, 50, 50, dtype=torch.bool)}))
    hidden = seen[0] == 0
    assert (hidden.all(dim=1) == hidden.any(dim=1)).all()
    assert abs(hidden.float().mean().item() - 0.65) < 0.03


def test_levels_are_paired_by_stride_not_by_place() -> None:
    student = tuple(Level(f"P{k}", C, 2**k) for k in (3, 4, 5, 6, 7))
    teacher = tuple(Level(f"P{k}", C, 2**k) for k in (2, 3, 4, 5))
    assert list(PKDLoss(student, teacher).pairs) == ["P3", "P4", "P5"]
    assert list(PKDLoss(student, teacher, levels=["P4"]).pairs) == ["P4"]
    with pytest.raises(RecipeError, match="teacher has no level 'P7', only P2, P3, P4, P5"):
        PKDLoss(student, teacher, levels=["P7"])
    with pytest.raises(RecipeError, match="no level of equal stride"):
        PKDLoss(student[-1:], teacher)


def test_a_mechanism_is_checked_by_name_and_arguments() -> None:
    assert check_mechanism({"type": "PKDLoss", "loss_weight": "2e-5"}) == {"type": "PKDLoss", "loss_weight": 2e-5}
    with pytest.raises(ValueError, match=r"levels: .*'P3'"):
        check_mechanism({"type": "PKDLoss", "levels": "P3"})
    with pytest.raises(ValueError, match=r"mode: .*'qfl' or 'kl'"):
        check_mechanism({"type": "DenseLogitLoss", "mode": "mse"})
    bounds = {
        ("MGDLoss", "mask_ratio", 65): "less than 1",
        ("MGDLoss", "loss_weight", -6): "greater than or equal to 0",
        ("PKDLoss", "loss_weight", float("nan")): "finite number",
        ("PKDLoss", "levels", ()): "at least 1 item",
        ("CWDLoss", "tau", 0): "greater than 0",
        ("CWDLoss", "tau", "inf"): "finite number",
        ("FGDLoss", "temp", 0): "greater than 0",
        ("FGDLoss", "gamma_fgd", -1e-3): "greater than or equal to 0",
        ("FBKDLoss", "nonlocal_weight", float("inf")): "finite number",
        ("DenseLogitLoss", "temperature", 0): "greater than 0",
        ("DetectionLoss", "score_threshold", 50): "less than or equal to 1",
        ("DetectionLoss", "score_threshold", float("nan")): "",
        ("LDLoss", "kd_temperature", -1): "greater than 0",
        ("CrossKDLoss", "ctr_weight", -1): "greater than or equal to 0",
        ("CrossKDLoss", "reused_teacher_head_idx", -1): "greater than or equal to 0",
    }
    for (kind, name, value), what in bounds.items():
        with pytest.raises(ValueError, match=rf"^{kind}\.{name}: .*{what}.* \(got {re.escape(repr(value))}\)$"):
            check_mechanism({"type": kind, name: value})
    ends = {"loss_weight": 0.0, "score_threshold": 1.0}
    assert check_mechanism({"type": "DetectionLoss", **ends}) == {"type": "DetectionLoss", **ends}
    with pytest.raises(ValueError, match=r"'PKD' is not a mechanism; there are CWDLoss, .*PKDLoss"):
        check_mechanism({"type": "PKD"})
    with pytest.raises(ValueError, match="no argument 'weight'; it has loss_weight, levels"):
        check_mechanism({"type": "PKDLoss", "weight": 6.0})
