"""Distillation losses, one a file, each registered in `MECHANISMS` and named so in a recipe's ``mechanisms``."""

from trainer.mechanisms.base import MECHANISMS, Batch, LevelMechanism, Mechanism, Need, check_mechanism
from trainer.mechanisms.cwd import CWDLoss
from trainer.mechanisms.fbkd import FBKDLoss
from trainer.mechanisms.feature_matching import FeatureMatchingLoss
from trainer.mechanisms.fgd import FGDLoss
from trainer.mechanisms.mgd import MGDLoss
from trainer.mechanisms.pkd import PKDLoss

__all__ = [
    "MECHANISMS",
    "Batch",
    "CWDLoss",
    "FBKDLoss",
    "FGDLoss",
    "FeatureMatchingLoss",
    "LevelMechanism",
    "MGDLoss",
    "Mechanism",
    "Need",
    "PKDLoss",
    "check_mechanism",
]
