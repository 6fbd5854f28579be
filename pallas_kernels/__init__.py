"""GPU kernels as plain JAX functions. `python -m pallas_kernels list` says which."""

from pallas_kernels.gather_matmul import gather_matmul
from pallas_kernels.micro_tile_index import MicroTileIndex, micro_tile_index
from pallas_kernels.sampled_matmul import sampled_matmul
from pallas_kernels.scatter_matmul import scatter_matmul

KERNELS = ("gather_matmul", "scatter_matmul", "sampled_matmul", "micro_tile_index")

__all__ = ["KERNELS", "MicroTileIndex", "gather_matmul", "micro_tile_index", "sampled_matmul", "scatter_matmul"]
