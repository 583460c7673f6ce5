"""Evaluation of models: clean and worst-case robust accuracy, and gradient-masking checks.

The entry point is `evaluate(EvalSpec(...))`, which returns an `Evaluation`.
"""

from advtrain.evaluation.evaluate import Evaluation, draw_figures, evaluate, load_report
from advtrain.evaluation.figures import CURVE_FACTORS
from advtrain.evaluation.ray_workers import Workers
from advtrain.evaluation.regression import AnyReport, Estimate, RegressionReport, validation_errors
from advtrain.evaluation.report import Report
from advtrain.evaluation.spec import EvalSpec
from advtrain.evaluation.statistics import Paired, Share, gain_test, sign_test, wilson
from advtrain.evaluation.validation import validate
from advtrain.evaluation.worst_case import Progress, SampleResults, attack_samples, validation_accuracy

__all__ = [
    "CURVE_FACTORS",
    "AnyReport",
    "Estimate",
    "EvalSpec",
    "Evaluation",
    "Paired",
    "Progress",
    "RegressionReport",
    "Report",
    "SampleResults",
    "Share",
    "Workers",
    "attack_samples",
    "draw_figures",
    "evaluate",
    "gain_test",
    "load_report",
    "sign_test",
    "validate",
    "validation_accuracy",
    "validation_errors",
    "wilson",
]
