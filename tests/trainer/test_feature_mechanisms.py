"""CWD, FGD and FBKD against computations that loop over images, boxes and positions and know no masks; what holds of all."""

import math
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from mmcv.cnn import ContextBlock
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from torch import Tensor, nn

from cache import Level
from trainer.mechanisms import Batch, CWDLoss, FBKDLoss, FeatureMatchingLoss, FGDLoss, MGDLoss, PKDLoss
from trainer.mechanisms.fgd import GlobalContext

C, STRIDE = 6, 8
LEVELS = (Level("P3", C, STRIDE),)
MECHANISMS = [CWDLoss, FBKDLoss, FeatureMatchingLoss, FGDLoss, MGDLoss, PKDLoss]
WEIGHTS = dict(alpha_fgd=0.7, beta_fgd=0.3, gamma_fgd=0.11, lambda_fgd=0.05)
EVERYTHING = [0.0, 0.0, 9999.0, 9999.0]
BOXES = [[[3.0, 9.0, 30.0, 25.0], [18.0, 2.0, 41.0, 39.0]], [[5.0, 5.0, 7.0, 7.0]]]


def own_maps(sizes: Sequence[tuple[int, int]], channels: int = C, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Per image the student's and the teacher's map (channels, h, w), (C, h, w)."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(channels, h, w, generator=generator), torch.randn(C, h, w, generator=generator) * 2 + 0.5)
        for h, w in sizes
    ]


def collate(
    images: Sequence[tuple[Tensor, Tensor]], boxes: Sequence[list[list[float]]], more: tuple[int, int] = (0, 0)
) -> Batch:
    """One batch, padded to the largest map and ``more``, with noise where the student has no target."""
    height, width = (max(t.shape[axis] for _, t in images) + more[axis - 1] for axis in (1, 2))
    student = torch.randn(len(images), images[0][0].shape[0], height, width) * 50
    teacher = torch.zeros(len(images), C, height, width)
    valid = torch.zeros(len(images), 1, height, width, dtype=torch.bool)
    for n, (s, t) in enumerate(images):
        h, w = t.shape[1:]
        student[n, :, :h, :w], teacher[n, :, :h, :w], valid[n, :, :h, :w] = s, t, True
    samples = [DetDataSample(gt_instances=InstanceData(bboxes=torch.tensor(b).reshape(-1, 4))) for b in boxes]
    return Batch({"P3": student.requires_grad_()}, {"P3": teacher}, {"P3": valid}, samples)


def build(kind: type, student: Sequence[Level] = LEVELS, **options) -> nn.Module:
    """A mechanism of weight 1 that draws nothing at random in a step and none of whose parameters is zero."""
    torch.manual_seed(0)
    mechanism = kind(student, LEVELS, loss_weight=1.0, **options, **({"mask_ratio": 0.0} if kind is MGDLoss else {}))
    for parameter in mechanism.parameters():
        nn.init.normal_(parameter, std=0.5)
    return mechanism


SIZES = [(5, 7), (4, 8)]
IMAGES = own_maps(SIZES)


def test_cwd_is_the_divergence_of_each_channels_distribution_over_its_own_map() -> None:
    expected = 0.0
    for student, teacher in IMAGES:
        for s, t in zip(student.flatten(1), teacher.flatten(1), strict=True):
            p, q = (torch.distributions.Categorical(logits=x / 2.5) for x in (t, s))
            expected += 2.5**2 * torch.distributions.kl_divergence(p, q) / (C * len(IMAGES))
    torch.testing.assert_close(CWDLoss(LEVELS, LEVELS, loss_weight=3.0, tau=2.5)(collate(IMAGES, BOXES)), 3 * expected)


def fgd_of_image(mechanism: FGDLoss, student: Tensor, teacher: Tensor, boxes: list[list[float]]) -> Tensor:
    height, width = teacher.shape[1:]
    foreground = [[0.0] * width for _ in range(height)]
    for x1, y1, x2, y2 in boxes:
        rows = range(math.floor(y1 / STRIDE), min(math.ceil(y2 / STRIDE) + 1, height))
        columns = range(math.floor(x1 / STRIDE), min(math.ceil(x2 / STRIDE) + 1, width))
        for y in rows:
            for x in columns:
                foreground[y][x] = max(foreground[y][x], 1 / (len(rows) * len(columns)))
    outside = sum(value == 0 for row in foreground for value in row)
    where, which = [], []
    for maps in (student, teacher):
        where.append(height * width * (maps.abs().mean(0).flatten() / 0.5).softmax(0).reshape(height, width))
        which.append(C * (maps.abs().mean((1, 2)) / 0.5).softmax(0))
    total = torch.tensor(0.0)
    for y in range(height):
        for x in range(width):
            weight = WEIGHTS["alpha_fgd"] * foreground[y][x]
            if foreground[y][x] == 0:
                weight = WEIGHTS["beta_fgd"] / outside
            total = total + weight * where[1][y, x] * (which[1] * (student - teacher)[:, y, x].square()).sum()
    total = total + WEIGHTS["gamma_fgd"] * ((where[0] - where[1]).abs().sum() + (which[0] - which[1]).abs().sum())
    contexts = [
        reference(block["P3"])(maps[None])[0]
        for block, maps in ((mechanism.context_of_student, student), (mechanism.context_of_teacher, teacher))
    ]
    return total + WEIGHTS["lambda_fgd"] * (contexts[0] - contexts[1]).square().sum()


def reference(block: GlobalContext) -> ContextBlock:
    """mmcv's block of the same weights."""
    theirs = ContextBlock(C, ratio=0.5, pooling_type="att", fusion_types=("channel_add",))
    theirs.conv_mask.load_state_dict(block.score.state_dict())
    for ours, layer in zip(block.transform, theirs.channel_add_conv, strict=True):
        layer.load_state_dict({key: value.view_as(layer.state_dict()[key]) for key, value in ours.state_dict().items()})
    return theirs


def test_fgd_is_the_mean_of_each_images_sum_over_boxes_and_positions() -> None:
    mechanism = build(FGDLoss, **WEIGHTS)
    expected = sum(fgd_of_image(mechanism, *maps, boxes) for maps, boxes in zip(IMAGES, BOXES, strict=True)) / 2
    torch.testing.assert_close(mechanism(collate(IMAGES, BOXES, more=(2, 3))), expected, rtol=1e-5, atol=1e-5)


def test_fgd_places_boxes_of_a_reduced_input_on_the_teachers_larger_map() -> None:
    only_foreground = dict(alpha_fgd=1.0, beta_fgd=0.0, gamma_fgd=0.0, lambda_fgd=0.0, temp=1e9)
    student, teacher = torch.zeros(C, 6, 8), torch.zeros(C, 12, 16)
    teacher[:, 4:9, 2:6] = 1  # the cells of 16..64 x 32..62 view pixels, floor and ceil, at stride 8
    # the same box in pixels of a student that sees half of them; and one below, of whose four rows on the map one is marked
    for box, share in ([8.0, 16.0, 20.0, 31.0], 1.0), ([8.0, 32.0, 20.0, 47.0], 0.25):
        samples = [DetDataSample(gt_instances=InstanceData(bboxes=torch.tensor([box])))]
        valid = torch.ones(1, 1, 12, 16, dtype=torch.bool)
        batch = Batch({"P3": student[None]}, {"P3": teacher[None]}, {"P3": valid}, samples, input_scale=0.5)
        assert FGDLoss(LEVELS, LEVELS, **only_foreground)(batch).item() == pytest.approx(share * C)


def non_local(block: nn.Module, images: list[Tensor]) -> list[Tensor]:
    """Every position against every window, one image at a time; the normalisation over all of them."""
    answers = []
    for maps in images:
        phi, g, theta = (conv(maps[None])[0].flatten(1) for conv in (block.phi, block.g, block.theta))
        _, height, width = maps.shape
        cells = torch.arange(height * width).reshape(height, width)
        windows = [w.flatten() for rows in cells.split(block.window) for w in rows.split(block.window, dim=1)]
        phi, g = (torch.stack([x[:, w].amax(1) for w in windows], dim=1) for x in (phi, g))
        y = torch.stack(
            [sum((theta[:, i] @ phi[:, j]) * g[:, j] for j in range(len(windows))) for i in range(theta.shape[1])],
            dim=1,
        )
        answers.append(block.out((y / len(windows)).reshape(1, -1, height, width))[0])
    positions = torch.cat([a.flatten(1) for a in answers], dim=1).T
    normed = F.batch_norm(positions, None, None, block.scale.flatten(), block.shift.flatten(), training=True)
    parts = normed.T.split([a[0].numel() for a in answers], dim=1)
    return [maps + part.reshape(maps.shape) for maps, part in zip(images, parts, strict=True)]


@pytest.mark.parametrize("window", [2, 8])
def test_fbkd_is_the_norm_over_all_images_of_what_loops_give(window: int) -> None:
    weights = dict(mask_l2_weight=0.7, channel_weight=0.3, spatial_weight=0.2, nonlocal_weight=0.5)
    images = own_maps(SIZES, channels=4)
    mechanism = build(FBKDLoss, (Level("P3", 4, STRIDE),), **weights)
    parts = mechanism.parts["P3"]
    parts.relation_of_student.window = parts.relation_of_teacher.window = window
    squares = dict.fromkeys(weights, 0.0)
    relations = [
        non_local(block, [pair[side] for pair in images])
        for side, block in enumerate((parts.relation_of_student, parts.relation_of_teacher))
    ]
    for n, (s, t) in enumerate(images):
        masks = [m[0].numel() * (m.abs().mean(0) / 0.5).flatten().softmax(0).reshape(m[0].shape) for m in (s, t)]
        squares["mask_l2_weight"] += ((masks[0] + masks[1]) / 2 * (t - parts.align(s[None])[0]).square()).sum()
        squares["channel_weight"] += (t.mean((1, 2)) - parts.channel(s.mean((1, 2)))).square().sum()
        squares["spatial_weight"] += (t.mean(0) - parts.spatial(s.mean(0)[None, None])[0, 0]).square().sum()
        squares["nonlocal_weight"] += (relations[1][n] - parts.relation(relations[0][n][None])[0]).square().sum()
    expected = sum(weight * squares[name].sqrt() for name, weight in weights.items())
    torch.testing.assert_close(mechanism(collate(images, BOXES, more=(1, 2))), expected, rtol=1e-5, atol=1e-5)


SIDE = st.integers(1, 9)
BOX = st.tuples(*[st.floats(0, 80, width=32)] * 4).map(lambda b: [*sorted(b[::2]), *sorted(b[1::2])])
BOX = BOX.map(lambda b: [b[0], b[2], b[1], b[3]])  # x1, y1, x2, y2


@pytest.mark.parametrize("kind", MECHANISMS)
@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.tuples(SIDE, SIDE), min_size=1, max_size=3),
    more=st.tuples(st.integers(0, 5), st.integers(0, 5)),
    boxes=st.lists(st.lists(BOX, max_size=3), min_size=3, max_size=3),
)
def test_an_images_loss_depends_on_nothing_but_its_own_map(
    kind: type, sizes: list[tuple[int, int]], more: tuple[int, int], boxes: list[list[list[float]]]
) -> None:
    mechanism, images = build(kind), own_maps(sizes)
    boxes = boxes[: len(images)]
    batch = collate(images, boxes, more)
    loss = mechanism(batch)
    loss.backward()
    gradient = batch.maps["P3"].grad
    assert torch.isfinite(gradient).all()
    assert not (gradient * ~batch.valid["P3"]).any()
    torch.testing.assert_close(loss, mechanism(collate(images, boxes)), rtol=1e-4, atol=1e-5)
    if kind in (CWDLoss, FGDLoss, MGDLoss):  # the others are defined over a batch
        alone = [mechanism(collate([image], [own])) for image, own in zip(images, boxes, strict=True)]
        torch.testing.assert_close(loss, torch.stack(alone).mean(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", MECHANISMS)
@pytest.mark.parametrize("boxes", [[], [EVERYTHING], [[8.1, 8.1, 8.2, 8.2]]], ids=["none", "all covered", "tiny"])
def test_degenerate_images_have_finite_gradients(kind: type, boxes: list[list[float]]) -> None:
    (student, teacher), *_ = own_maps([(4, 5)])
    student[0], teacher[0] = 0, 0
    teacher[1:3] *= 1e3  # a softmax that is one at one position and underflows at the others
    same = teacher.clone()
    for maps in (student, same, torch.zeros_like(student)):
        mechanism, batch = build(kind), collate([(maps, teacher)], [boxes])
        mechanism(batch).backward()
        gradients = [batch.maps["P3"].grad, *(parameter.grad for parameter in mechanism.parameters())]
        assert all(torch.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("kind", MECHANISMS)
def test_other_channels_get_an_adapter_that_learns(kind: type) -> None:
    torch.manual_seed(0)
    mechanism = kind((Level("P3", 4, STRIDE),), LEVELS, **({"mask_ratio": 0.0} if kind is MGDLoss else {}))
    batch = collate(own_maps(SIZES, channels=4), BOXES)
    optimizer = torch.optim.Adam(mechanism.parameters(), 1e-3)
    first = mechanism(batch)
    for _ in range(5):
        optimizer.zero_grad()
        mechanism(batch).backward()
        optimizer.step()
    assert mechanism(batch) < first


def test_only_feature_matching_adapts_a_reduced_student_of_equal_channels() -> None:
    reduced = (Level("P3", C, 2 * STRIDE),)
    assert isinstance(FeatureMatchingLoss(reduced, LEVELS).align["P3"], nn.Conv2d)
    assert isinstance(FeatureMatchingLoss(LEVELS, LEVELS).align["P3"], nn.Identity)
    assert isinstance(PKDLoss(reduced, LEVELS).align["P3"], nn.Identity)


@pytest.mark.parametrize("kind", MECHANISMS)
def test_a_student_at_half_resolution_is_enlarged_image_by_image(kind: type) -> None:
    """The padded student's map beside what it is alone: the same, though the padding's content lies next to the edge."""
    mechanism = build(kind)
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(1, C, 3, 4, generator=generator), torch.randn(1, C, 5, 8, generator=generator)
    padded = [F.pad(teacher, (0, 4, 0, 5)), F.pad(torch.ones(1, 1, 5, 8, dtype=torch.bool), (0, 4, 0, 5))]
    losses = []
    for noise in (0.0, 100.0):
        maps = torch.full((1, C, 5, 6), noise)
        maps[:, :, :3, :4] = student
        samples = [DetDataSample(gt_instances=InstanceData(bboxes=torch.tensor([[4.0, 4.0, 20.0, 18.0]])))]
        losses.append(mechanism(Batch({"P3": maps}, {"P3": padded[0]}, {"P3": padded[1]}, samples, input_scale=0.5)))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)
    enlarged = F.interpolate(student, (6, 8), mode="bilinear")[:, :, :5]
    exact = Batch({"P3": enlarged}, {"P3": teacher}, {"P3": torch.ones(1, 1, 5, 8, dtype=torch.bool)}, samples)
    samples[0].gt_instances.bboxes *= 2
    torch.testing.assert_close(losses[0], mechanism(exact), rtol=1e-4, atol=1e-5)
