"""Sizes and choices of Switch Transformers, the published ones among them."""

import dataclasses
import math
from typing import Any, ClassVar

from models.config import check_sizes, normalise

DTYPES = ("bfloat16", "float32")  # T5's residual stream overflows float16
CAPACITIES = ("none", "per_sequence")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SwitchConfig:
    """Sizes and choices of one Switch Transformer.

    Attributes:
        vocab_size: rows of the token embedding (32,100 tokens, padded).
        encoder_layers: blocks of the encoder.
        decoder_layers: blocks of the decoder.
        d_model: width of the residual stream.
        heads: attention heads.
        head_dim: width of a head; heads * head_dim may differ from d_model.
        d_ff: neurons of a feed-forward block, and of an expert.
        experts: experts of a sparse block.
        encoder_sparse_step: block i is sparse where i % step == 1 (all are where it is 1, none where 0).
        decoder_sparse_step: the same for the decoder.
        capacity: "none": experts take every token that chooses them, as transformers 5 computes. "per_sequence": at
            most `expert_capacity` tokens of each sequence, first come first served, as transformers 4 computes and as
            these models were trained; other tokens pass an expert by unchanged, times their router probability. The
            count begins anew with each call of `decode`, so decoding token by token drops none.
        expert_capacity: as above; of no effect where `capacity` is "none".
        position_buckets: learned position biases of a head: half for one direction, half for the other, or all for the
            decoder's one.
        max_distance: tokens farther apart than this share a bucket.
        tied: the token embedding is also the output projection.
        start_id: the token that the decoder begins with.
        dtype: what is computed in: "bfloat16" or "float32". Logits are float32 always, and so are routers.
        param_dtype: what parameters are kept in.
        init_scale: variance of the initial weights times their inputs; 0.1 is the paper's (section 2.4).
        max_length: no position is learned, so there is no end to them.
    """

    vocab_size: int = 32128
    encoder_layers: int
    decoder_layers: int
    d_model: int
    heads: int
    head_dim: int = 64
    d_ff: int
    experts: int
    encoder_sparse_step: int = 2
    decoder_sparse_step: int = 2
    capacity: str = "none"
    expert_capacity: int = 64
    position_buckets: int = 32
    max_distance: int = 128
    tied: bool = True
    norm_epsilon: float = 1e-6
    start_id: int = 0
    dtype: str = "float32"
    param_dtype: str = "float32"
    init_scale: float = 0.1
    max_length: ClassVar[float] = math.inf

    def __post_init__(self):
        normalise(self)
        widths = ("vocab_size", "d_model", "heads", "head_dim", "d_ff", "max_distance")
        check_sizes(self, "encoder_layers", "decoder_layers", "experts", "expert_capacity", *widths)
        for name, least in {
            "encoder_sparse_step": 0,
            "decoder_sparse_step": 0,
            "start_id": 0,
            "position_buckets": 4,
        }.items():
            number = getattr(self, name)
            if not (isinstance(number, int) and number >= least):
                raise ValueError(f"{name} must be an integer of at least {least}; got {name}={number!r}")
        if self.max_distance <= self.position_buckets // 2:
            buckets = f"position_buckets={self.position_buckets}"
            raise ValueError(f"max_distance must be above half of {buckets}; got max_distance={self.max_distance}")
        if self.start_id >= self.vocab_size:
            raise ValueError(f"start_id must be in [0, {self.vocab_size}); got start_id={self.start_id}")
        if self.capacity not in CAPACITIES:
            raise ValueError(f"capacity must be one of {', '.join(CAPACITIES)}; got {self.capacity!r}")
        for name in ("dtype", "param_dtype"):
            if getattr(self, name) not in DTYPES:
                raise ValueError(f"{name} must be one of {', '.join(DTYPES)}; got {getattr(self, name)!r}")

    @classmethod
    def preset(cls, size: str, **overrides: Any) -> "SwitchConfig":
        """The published configuration of a size ("base-8", ..., "base-256"; "tiny" for trying out), fields replaced.

        Raises:
            ValueError: there is no such size.
        """
        if size not in PRESETS:
            raise ValueError(f"size must be one of {', '.join(PRESETS)}; got {size!r}")
        return cls(**(PRESETS[size] | overrides))


_BASE = {"encoder_layers": 12, "decoder_layers": 12, "d_model": 768, "heads": 12, "d_ff": 3072}
_TINY = {"encoder_layers": 2, "decoder_layers": 2, "d_model": 64, "heads": 4, "head_dim": 16, "d_ff": 128}
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {**_TINY, "experts": 4, "vocab_size": 512},
    **{f"base-{experts}": {**_BASE, "experts": experts} for experts in (8, 16, 32, 64, 128, 256)},
}
