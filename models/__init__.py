"""Whole networks in Flax NNX: `from models import OPT, OPTConfig, load_opt`."""

from models.hub import save_hf
from models.mixtral import Mixtral, MixtralConfig
from models.mixtral_checkpoint import load_mixtral, save_mixtral
from models.opt import OPT, with_predictors
from models.opt_checkpoint import load_opt, save_opt
from models.opt_config import PRESETS, OPTConfig
from models.swin_moe import SwinMoE, SwinMoEConfig
from models.swin_moe_checkpoint import load_swin_moe, save_swin_moe
from models.switch_checkpoint import load_switch, save_switch
from models.switch_config import SwitchConfig
from models.switch_transformer import SwitchTransformer

__all__ = [
    "OPT",
    "PRESETS",
    "Mixtral",
    "MixtralConfig",
    "OPTConfig",
    "SwinMoE",
    "SwinMoEConfig",
    "SwitchConfig",
    "SwitchTransformer",
    "load_mixtral",
    "load_opt",
    "load_swin_moe",
    "load_switch",
    "save_hf",
    "save_mixtral",
    "save_opt",
    "save_swin_moe",
    "save_switch",
    "with_predictors",
]
