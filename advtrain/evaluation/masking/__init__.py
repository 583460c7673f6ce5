"""Checks for gradient masking, which makes attacks fail although the model is not robust.

The checks follow Carlini et al. (2019, arXiv 1902.06705), Athalye et al. (2018, arXiv 1802.00420) and the flags of
AutoAttack. Each check runs on correctly classified samples and returns a verdict, evidence and advice.
"""

from advtrain.evaluation.masking import outputs, stronger, unseen
from advtrain.evaluation.masking.context import CHECKS, NUM_SAMPLES, MaskingCheck

__all__ = ["CHECKS", "MaskingCheck", "NUM_SAMPLES", "outputs", "stronger", "unseen"]
