"""Whole networks in Flax NNX: `from models import OPT, OPTConfig, load_opt`."""

from models.opt import OPT, PRESETS, OPTConfig
from models.opt_checkpoint import load_opt, save_hf, save_opt

__all__ = ["OPT", "PRESETS", "OPTConfig", "load_opt", "save_hf", "save_opt"]
