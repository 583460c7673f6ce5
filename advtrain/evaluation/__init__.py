"""evaluate(model, dataset) -> Evaluation: clean and worst-case robust accuracy, and whether to trust them."""

from advtrain.evaluation.errors import AnyReport, Estimate, RegressionReport, validation_errors
from advtrain.evaluation.judgement import Evaluation, draw_pictures, evaluate, load_report
from advtrain.evaluation.pictures import CURVE_FACTORS
from advtrain.evaluation.report import Report
from advtrain.evaluation.shards import Workers
from advtrain.evaluation.statistics import Paired, Share, gain_test, sign_test, wilson
from advtrain.evaluation.suite import Progress, SampleResults, attack_samples, validation_accuracy

__all__ = [
    "CURVE_FACTORS",
    "AnyReport",
    "Estimate",
    "Evaluation",
    "Paired",
    "Progress",
    "RegressionReport",
    "Report",
    "SampleResults",
    "Share",
    "Workers",
    "attack_samples",
    "draw_pictures",
    "evaluate",
    "gain_test",
    "load_report",
    "sign_test",
    "validation_accuracy",
    "validation_errors",
    "wilson",
]
