"""Distillation losses, one a file, each registered in `MECHANISMS` and named so in a recipe's ``mechanisms``."""

from trainer.mechanisms.base import MECHANISMS, Batch, LevelMechanism, Mechanism, Need, check_mechanism
from trainer.mechanisms.crosskd import CrossKDLoss
from trainer.mechanisms.cwd import CWDLoss
from trainer.mechanisms.dense_logit import DenseLogitLoss
from trainer.mechanisms.detection import DetectionLoss
from trainer.mechanisms.fbkd import FBKDLoss
from trainer.mechanisms.feature_matching import FeatureMatchingLoss
from trainer.mechanisms.fgd import FGDLoss
from trainer.mechanisms.ld import LDLoss
from trainer.mechanisms.mgd import MGDLoss
from trainer.mechanisms.pkd import PKDLoss

__all__ = [
    "MECHANISMS",
    "Batch",
    "CWDLoss",
    "CrossKDLoss",
    "DenseLogitLoss",
    "DetectionLoss",
    "FBKDLoss",
    "FGDLoss",
    "FeatureMatchingLoss",
    "LDLoss",
    "LevelMechanism",
    "MGDLoss",
    "Mechanism",
    "Need",
    "PKDLoss",
    "check_mechanism",
]
