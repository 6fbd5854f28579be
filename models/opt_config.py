"""Sizes and choices of OPT, the published ones among them.

Source: Zhang et al., "OPT: Open Pre-trained Transformer Language Models" (2022), table 1.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from models.activations import check_activation
from models.config import check_dtypes, check_sizes, normalise
from pallas_kernels.micro_tile_index import ROWS


@dataclasses.dataclass(frozen=True, kw_only=True)
class OPTConfig:
    """Sizes and choices of one OPT.

    Attributes:
        vocab_size: rows of the token embedding (50,265 tokens, padded).
        layers: decoder layers.
        d_model: width of the residual stream.
        heads: attention heads; must divide d_model.
        d_ff: neurons of a feed-forward block.
        embed_dim: width of the token embedding; None for d_model. Where it differs, two projections join them (350M).
        max_length: positions that were learned.
        pre_norm: layer norm before each block and a last one at the end; False (350M): after each block.
        activation: "relu", "shifted_relu" or "drelu"; or "gelu" or "silu" for models that are to be ReLUfied (see
            `models.activations`).
        gated: multiply the activation with a second projection of its input.
        thresholds: of each layer, with "relu": what is not above it becomes zero (FATReLU); None for 0.
        norm_relu: ReLU after the norms that precede the blocks too (ReLUfication's stage 2).
        dtype: what is computed in: "bfloat16", "float16" or "float32". Logits are float32 always.
        param_dtype: what parameters are kept in.
        sparse_rows: tokens in a micro-tile of the feed-forward activation (1, 8, 16, 32, 64 or 128), to skip the
            neurons that no token of such a block activates; None multiplies densely. Of all layers, or of each (see
            `models.prefill.choose_sparse_rows`).
        neuron_major: keep fc1 as [d_ff, d_model], a row for each neuron, as decoding over predicted neurons reads it.
        init_std: standard deviation of the initial weights; 0.006 is the paper's (section 2.2).
        dropout: share of each block's output, before it is added to the residual stream, that a call with `rngs` drops;
            the paper's is 0.1, and none of the embeddings (section 2.2).
        layer_sizes: (heads, neurons) of each layer where some were pruned (`sparsellm.pruning`); None for `heads` and
            `d_ff` everywhere. The width of a head is d_model / heads in any case.
    """

    vocab_size: int = 50272
    layers: int
    d_model: int
    heads: int
    d_ff: int
    embed_dim: int | None = None
    max_length: int = 2048
    pre_norm: bool = True
    activation: str = "relu"
    gated: bool = False
    thresholds: Sequence[float] | None = None
    norm_relu: bool = False
    dtype: str = "float32"
    param_dtype: str = "float32"
    sparse_rows: int | None | Sequence[int | None] = None
    neuron_major: bool = False
    init_std: float = 0.006
    dropout: float = 0.0
    layer_sizes: Sequence[Sequence[int]] | None = None

    def __post_init__(self):
        normalise(self)
        sizes = ("vocab_size", "layers", "d_model", "heads", "d_ff", "max_length")
        check_sizes(self, *sizes, *(() if self.embed_dim is None else ("embed_dim",)))
        if self.d_model % self.heads:
            raise ValueError(f"heads must divide d_model; got heads={self.heads}, d_model={self.d_model}")
        check_dtypes(self)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and less than 1; got dropout={self.dropout}")
        if isinstance(self.sparse_rows, Sequence):
            object.__setattr__(self, "sparse_rows", tuple(self.sparse_rows))  # JSON knows lists only
            if len(self.sparse_rows) != self.layers:
                raise ValueError(f"sparse_rows must be one, or {self.layers}; got sparse_rows={self.sparse_rows}")
        if not {self.rows(layer) for layer in range(self.layers)} <= {None, *ROWS}:
            raise ValueError(f"sparse_rows must be None or one of {ROWS}; got sparse_rows={self.sparse_rows}")
        if self.thresholds is not None:
            object.__setattr__(self, "thresholds", tuple(map(float, self.thresholds)))
        check_activation(self)
        if self.layer_sizes is not None:
            sizes = tuple((int(heads), int(d_ff)) for heads, d_ff in self.layer_sizes)  # JSON knows lists only
            object.__setattr__(self, "layer_sizes", sizes)
            if len(sizes) != self.layers or not all(1 <= h <= self.heads and 1 <= f <= self.d_ff for h, f in sizes):
                rule = f"layer_sizes must be {self.layers} pairs of at most heads={self.heads}, d_ff={self.d_ff}"
                raise ValueError(f"{rule}; got layer_sizes={sizes}")

    def sizes(self, layer: int) -> tuple[int, int]:
        """Heads and neurons of a layer."""
        heads, d_ff = (self.heads, self.d_ff) if self.layer_sizes is None else self.layer_sizes[layer]
        return heads, d_ff

    def rows(self, layer: int) -> int | None:
        """Tokens in a micro-tile of a layer, or None."""
        return self.sparse_rows[layer] if isinstance(self.sparse_rows, Sequence) else self.sparse_rows

    @classmethod
    def preset(cls, size: str, **overrides: Any) -> "OPTConfig":
        """The published configuration of a size ("125m", ..., "175b"), with fields replaced.

        Raises:
            ValueError: there is no such size.
        """
        if size not in PRESETS:
            raise ValueError(f"size must be one of {', '.join(PRESETS)}; got {size!r}")
        return cls(**(PRESETS[size] | overrides))


PRESETS: dict[str, dict[str, Any]] = {
    "125m": {"layers": 12, "d_model": 768, "heads": 12, "d_ff": 3072},
    "350m": {"layers": 24, "d_model": 1024, "heads": 16, "d_ff": 4096, "embed_dim": 512, "pre_norm": False},
    "1.3b": {"layers": 24, "d_model": 2048, "heads": 32, "d_ff": 8192},
    "2.7b": {"layers": 32, "d_model": 2560, "heads": 32, "d_ff": 10240},
    "6.7b": {"layers": 32, "d_model": 4096, "heads": 32, "d_ff": 16384},
    "13b": {"layers": 40, "d_model": 5120, "heads": 40, "d_ff": 20480},
    "30b": {"layers": 48, "d_model": 7168, "heads": 56, "d_ff": 28672},
    "66b": {"layers": 64, "d_model": 9216, "heads": 72, "d_ff": 36864},
    "175b": {"layers": 96, "d_model": 12288, "heads": 96, "d_ff": 49152},
}
