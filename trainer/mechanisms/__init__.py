"""Distillation losses, one a file, each registered in `MECHANISMS` and named so in a recipe's ``mechanisms``."""

from trainer.mechanisms.base import MECHANISMS, Batch, LevelMechanism, Mechanism, Need, check_mechanism
from trainer.mechanisms.crosskd import CrossKDLoss
from trainer.mechanisms.dense_logit import DenseLogitLoss
from trainer.mechanisms.detection import DetectionLoss
from trainer.mechanisms.feature_matching import FeatureMatchingLoss
from trainer.mechanisms.ld import LDLoss
from trainer.mechanisms.mgd import MGDLoss
from trainer.mechanisms.pkd import PKDLoss

__all__ = [
    "MECHANISMS",
    "Batch",
    "CrossKDLoss",
    "DenseLogitLoss",
    "DetectionLoss",
    "FeatureMatchingLoss",
    "LDLoss",
    "LevelMechanism",
    "MGDLoss",
    "Mechanism",
    "Need",
    "PKDLoss",
    "check_mechanism",
]
