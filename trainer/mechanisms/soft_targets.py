"""Losses of logits against a teacher's."""

import torch.nn.functional as F
from torch import Tensor


def quality_focal(student: Tensor, teacher: Tensor, beta: float = 1.0) -> Tensor:
    """Binary cross-entropy against soft labels, each element weighted by how far the two still are apart.

    ``BCE(sigmoid(s), sigmoid(t)) * |sigmoid(s) - sigmoid(t)| ^ beta``: CrossKD's ``KDQualityFocalLoss`` (Wang et al., CVPR
    2024, section 3.3), which takes the form of GFL's quality focal loss.

    Args:
        student, teacher: logits of equal shape; the teacher's carry no gradient.

    Returns:
        The loss of each element.
    """
    target = teacher.detach().sigmoid()
    apart = (student.sigmoid() - target).abs().pow(beta)
    return F.binary_cross_entropy_with_logits(student, target, reduction="none") * apart
