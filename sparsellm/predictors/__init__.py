"""Predictors of which neurons and heads a token will activate: made, trained, calibrated, measured, kept.

activations = collect(model, windows, "activations/train")
predictors = train_predictors(activations)
calibrate(predictors, collect(model, others, "activations/calibration"), recall=0.95)
save_predictors(predictors, "predictors", model)
"""

from sparsellm.predictors.files import load_predictors, save_predictors
from sparsellm.predictors.predictor import EightBitPredictor, GatePredictor, LowRankPredictor, Predictor, PredictorParam
from sparsellm.predictors.quality import measure_predictors
from sparsellm.predictors.targets import Heads, Neurons, Target
from sparsellm.predictors.teal import ThresholdedLinear, with_input_thresholds
from sparsellm.predictors.thresholds import (
    calibrate,
    calibrate_for_quality,
    threshold_for_neurons,
    thresholds_for_recalls,
)
from sparsellm.predictors.training import PredictorConfig, train_predictors

__all__ = [
    "EightBitPredictor",
    "GatePredictor",
    "Heads",
    "LowRankPredictor",
    "Neurons",
    "Predictor",
    "PredictorConfig",
    "PredictorParam",
    "Target",
    "ThresholdedLinear",
    "calibrate",
    "calibrate_for_quality",
    "load_predictors",
    "measure_predictors",
    "save_predictors",
    "threshold_for_neurons",
    "thresholds_for_recalls",
    "train_predictors",
    "with_input_thresholds",
]
