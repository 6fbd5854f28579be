"""GPU kernels as plain JAX functions. `python -m pallas_kernels list` says which."""

from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.gather_matmul import gather_matmul
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.grouped_outer import grouped_outer
from pallas_kernels.layer_norm import layer_norm
from pallas_kernels.listed_matmul import listed_matmul
from pallas_kernels.micro_tile_index import MicroTileIndex, micro_tile_index
from pallas_kernels.neuron_ffn import neuron_ffn
from pallas_kernels.relu_matmul import relu_matmul
from pallas_kernels.route import route
from pallas_kernels.routing import Routing
from pallas_kernels.sampled_matmul import sampled_matmul
from pallas_kernels.scatter_matmul import scatter_matmul
from pallas_kernels.unstructured_matmul import UnstructuredWeights, unstructured_matmul

KERNELS = (
    "gather_matmul",
    "scatter_matmul",
    "sampled_matmul",
    "relu_matmul",
    "grouped_matmul",
    "grouped_outer",
    "neuron_ffn",
    "decode_attention",
    "listed_matmul",
    "layer_norm",
    "micro_tile_index",
    "route",
    "unstructured_matmul",
)

__all__ = [
    "KERNELS",
    "MicroTileIndex",
    "Routing",
    "UnstructuredWeights",
    "decode_attention",
    "gather_matmul",
    "grouped_matmul",
    "grouped_outer",
    "layer_norm",
    "listed_matmul",
    "micro_tile_index",
    "neuron_ffn",
    "relu_matmul",
    "route",
    "sampled_matmul",
    "scatter_matmul",
    "unstructured_matmul",
]
