"""What mmdet's dense heads put out, position by position: one form for teachers and students of all families."""

from typing import Any

import torch
from mmdet.models.dense_heads import ATSSHead, FCOSHead, GFLHead, RepPointsHead, RetinaHead
from torch import Tensor, nn

from cache import DenseLevel, RecipeError

_FAMILIES = (RetinaHead, ATSSHead, GFLHead, FCOSHead, RepPointsHead)


def check_dense(head: nn.Module | None, key: str) -> None:
    """Refuse what is no dense head of a known family.

    A subclass counts if it keeps its family's forward pass (PAA, LAD, LD, FreeAnchor, NAS-FCOS), for what the outputs mean
    depends on it (FSAF, VFNet, TOOD, RTMDet and AutoAssign have others).

    Args:
        key: what the message begins with: the mechanism, or the recipe's key.

    Raises:
        RecipeError: another head, or none.
    """
    if not any(isinstance(head, f) and _forward(type(head)) == _forward(f) for f in _FAMILIES):
        found = "no dense head" if head is None else f"a {type(head).__name__}"
        raise RecipeError(
            f"{key}: dense outputs are those of {', '.join(f.__name__ for f in _FAMILIES)}; this detector has {found}. "
            "Take a detector with one of these, or mechanisms on features or detections (docs/mechanisms.md)."
        )


def strides(head: nn.Module) -> tuple[int, ...]:
    """Pixels from one position to the next, per level."""
    return tuple(s if isinstance(s, int) else int(s[0]) for s in head.prior_generator.strides)


def dense_shape(head: nn.Module, key: str = "dense outputs") -> tuple[int, int, int]:
    """Anchors in a cell, class logits and box terms of a position.

    A softmax head has a logit more than classes, the last, for the background. Box terms: RetinaNet and ATSS the deltas of
    their coder (4), GFL a distribution's logits a side (4 x (reg_max + 1)), FCOS distances (4), RepPoints a box (4).

    Raises:
        RecipeError: no dense head of a known family.
    """
    check_dense(head, key)
    terms = 4
    if isinstance(head, GFLHead):
        terms = 4 * (head.reg_max + 1)
    elif isinstance(head, RetinaHead):
        terms = int(head.bbox_coder.encode_size)
    return int(head.num_base_priors), int(head.cls_out_channels), terms


def flat_outputs(head: nn.Module, outputs: tuple[Any, ...]) -> list[tuple[Tensor, Tensor]]:
    """A dense head's outputs with one row a position, in the order in which mmdet flattens maps.

    The terms mean the same whether the head trains or not, as in eval mode: FCOS heads that train with ``norm_on_bbox`` put out
    distances in strides, these are in pixels; RepPoints heads put out points while they train, these are the refined points'
    boxes, in strides from the position.

    Args:
        head: in the mode in which it gave the outputs.
        outputs: of its forward pass, lists of maps (N, A * B, H, W).

    Returns:
        Per level class logits (N, H * W * A, classes) and box terms (N, H * W * A, B), float32.
    """
    _, classes, _ = dense_shape(head)
    flat = []
    for level, stride in enumerate(strides(head)):
        logits, terms = outputs[0][level].float(), outputs[1][level].float()
        if isinstance(head, RepPointsHead) and len(outputs) == 3:
            terms = head.points2bbox(outputs[2][level].float())
        elif isinstance(head, FCOSHead) and head.norm_on_bbox and head.training:
            terms = terms * stride
        logits = logits.permute(0, 2, 3, 1).reshape(logits.shape[0], -1, classes)
        flat.append((logits, terms.permute(0, 2, 3, 1).reshape(*logits.shape[:2], -1)))
    return flat


def dense_outputs(head: nn.Module, outputs: tuple[Any, ...], top_k: int) -> list[dict[int, DenseLevel]]:
    """A dense head's outputs at each level's best positions.

    Best are those with the highest class logit; for softmax heads, whose logits have no common scale, with the highest
    log-probability of a class other than the background.

    Args:
        head, outputs: see `flat_outputs`.
        top_k: positions kept of each level; all where it has fewer.

    Returns:
        Per image, by stride.
    """
    anchors, classes, _ = dense_shape(head)
    found: list[dict[int, DenseLevel]] = [{} for _ in outputs[0][0]]
    for level, (stride, (logits, terms)) in enumerate(zip(strides(head), flat_outputs(head, outputs), strict=True)):
        scores = logits if classes == head.num_classes else logits.log_softmax(dim=2)[..., : head.num_classes]
        best = scores.amax(dim=2).topk(min(top_k, logits.shape[1]), dim=1).indices
        shape = (*outputs[0][level].shape[-2:], anchors)
        for n, indices in enumerate(best):
            found[n][stride] = DenseLevel(indices, logits[n, indices], terms[n, indices], shape)
    return found


def decode(head: nn.Module, level: int, indices: Tensor, shape: tuple[int, ...], terms: Tensor) -> Tensor:
    """Boxes that a head's terms stand for.

    Args:
        level: number of the level in the head.
        indices: (k,) int64, positions, flat.
        shape: rows, columns (and anchors) of the level's map.
        terms: (k, B) float32, as `flat_outputs` gives them.

    Returns:
        (k, 4) float32, ``x1, y1, x2, y2`` in pixels of the head's input.
    """
    priors = head.prior_generator.single_level_grid_priors(tuple(shape[:2]), level, terms.dtype, terms.device)[indices]
    stride = strides(head)[level]
    if isinstance(head, GFLHead):
        return head.bbox_coder.decode(head.anchor_center(priors), head.integral(terms) * stride)
    if isinstance(head, RepPointsHead):
        return priors.repeat(1, 2) + terms * stride
    return head.bbox_coder.decode(priors, terms)


def place(dense: DenseLevel, size: tuple[int, int]) -> tuple[Tensor, Tensor | slice]:
    """Where a teacher's stored positions lie in a student's map, which its batch may have padded wider.

    Args:
        size: rows and columns of the student's map.

    Returns:
        The positions that it has, flat, and which of the stored ones these are.
    """
    rows, columns, anchors = dense.shape
    cells, anchor = dense.indices // anchors, dense.indices % anchors
    y, x = cells // columns, cells % columns
    positions = (y * size[1] + x) * anchors + anchor
    if rows <= size[0] and columns <= size[1]:
        return positions, slice(None)
    inside = (y < size[0]) & (x < size[1])
    return positions[inside], inside


def same_priors(first: nn.Module, second: nn.Module, stride: int) -> bool:
    """Whether two heads predict at the same places of the level of a stride, which both have: equal anchors or points."""
    ours, theirs = (
        head.prior_generator.single_level_grid_priors((2, 3), strides(head).index(stride), device="cpu")
        for head in (first, second)
    )
    return ours.shape == theirs.shape and torch.allclose(ours, theirs)


def family(head: nn.Module) -> type[nn.Module] | None:
    """Which of the known families a dense head is of."""
    return next((family for family in _FAMILIES if isinstance(head, family)), None)


def _forward(head: type[nn.Module]) -> tuple[Any, Any]:
    return head.forward, head.forward_single
