"""The Mosaic GPU kernel of `grouped_matmul` for Hopper: a group of rows for each expert.

Float32 runs as bfloat16 terms, which each call makes anew: of all weights, used or not, they are 3/2 of their bytes.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from pallas_kernels.routing import Routing
from pallas_kernels.tile import device, row_groups, row_tiling
from pallas_kernels.tile.launch import lowered_once
from pallas_kernels.tile.row_tiling import Config, Geometry


@lowered_once("gather", "scatter", "activation", "gated", "transposed")
def mosaic(
    x: Float[Array, "rows K"],
    w: Float[Array, "experts _ _"],
    routing: Routing,
    bias: Float[Array, "experts N"] | None,
    scale: Float32[Array, " slots"] | None,
    *,
    gather: bool,
    scatter: bool,
    activation: str | None,
    gated: bool,
    transposed: bool,
    config: Config,
    interpret: bool,
) -> Float[Array, "slots N_out"]:
    """Launches the kernel; `interpret` runs it on CPU under the race detector."""
    slots, (experts, k, n) = routing.slots, w.shape
    k, n = (n, k) if transposed else (k, n)
    taken = jnp.cumsum(routing.counts, dtype=jnp.int32)
    if scale is not None:  # a dropped slot's may be NaN
        scale = jnp.where(jnp.arange(slots, dtype=jnp.int32) < taken[-1], scale, 0.0)
    groups = row_groups.Groups(  # the last one is what nobody takes
        starts=jnp.pad(taken, (1, 0)),
        counts=jnp.append(routing.counts, slots - taken[-1]),
        reads=routing.order // routing.top_k if gather else None,
        writes=routing.order if scatter else None,
    )
    geometry = Geometry(
        config=config,
        matrices=experts,
        depth=k,
        width=n,
        transposed=transposed,
        gated=gated,
        activation=activation,
        dtype=x.dtype,
    )
    return row_groups.row_groups_matmul(
        "grouped_matmul", x, w, groups, geometry, out=(slots, geometry.columns), most_slots=slots, bias=bias,
        scale=scale, interpret=interpret,
    )  # fmt: skip


def candidates(x, w, routing, bias, scale, gather, scatter, activation, gated, transposed) -> list[Config]:
    """Configs worth timing for these arguments (shapes are enough); the heuristic's choice comes first."""
    del bias, scale, gather, scatter, activation
    experts, k, n = w.shape
    k, n = (n, k) if transposed else (k, n)
    return row_tiling.tilings(routing.order.shape[0], experts, k, n, gated=gated, dtype=x.dtype)


def check_support(
    x, w, routing, bias, scale, gather, scatter, activation, gated, transposed, *, devices: tuple[str, ...] | None
) -> None:
    """Raises NotImplementedError where the kernel cannot take these arguments, or the device is none of `devices`."""
    del routing, bias, scale, gather, scatter, activation
    if x.dtype == jnp.float8_e4m3fn and not transposed:
        raise NotImplementedError("the Mosaic kernel takes float8_e4m3fn weights as [experts, N, K], transposed=True")
    if gated and w.shape[1 if transposed else 2] % 128:
        n = w.shape[1 if transposed else 2]
        raise NotImplementedError(f"the Mosaic kernel needs N in multiples of 128 where w is gated; got N={n}")
    if devices is not None:
        device.require_device("grouped_matmul", devices)


def check_config(config: Config, x, w, routing, bias, scale, gather, scatter, activation, gated, transposed) -> None:
    """Raises ValueError where a config does not fit the kernel or these arguments."""
    del w, routing, bias, scale, gather, scatter, activation, transposed
    row_tiling.check_config(config, gated=gated, dtype=x.dtype)
