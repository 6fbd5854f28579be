"""The Mosaic GPU kernels of `route` for Hopper: `choose` finds the experts of each token, `place` sorts the positions.

Two launches, since what a block places depends on what all others chose; one, where one block has all tokens. Bytes:
the scores once, ids written and read, a word for each expert and 8 tokens (`Config.tokens`) written and read, and the
counts of all blocks read by each from L2.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.route import device, interpreted
from pallas_kernels.routing import Routing
from pallas_kernels.tile import lane
from pallas_kernels.tile.device import require_device
from pallas_kernels.tile.launch import lowered_once

WARPS = 4  # of a warpgroup
MAX_EXPERTS, MAX_TOP_K = 512, 16  # what a warp holds of a token; choices are unrolled
MAX_BLOCK_TOKENS = 512
MANY_BLOCKS = 256  # each adds up the counts of all


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Tiling of the Mosaic kernels.

    Attributes:
        tokens: of a warp: 8, 16 or 32.
        warpgroups: of a block: 1, 2 or 4.
    """

    tokens: int = 8
    warpgroups: int = 4

    @property
    def block_tokens(self) -> int:
        """Tokens of a block."""
        return self.tokens * WARPS * self.warpgroups


def _launch(kernel: str, work: device.Work, inputs, outputs, interpret: bool):
    """Launches a function of `device`, with a block for each run of tokens, or interprets its namesake.

    Args:
        kernel: its name.
        work: how tokens are divided.
        inputs: arrays.
        outputs: shapes, int32.
        interpret: on CPU, under the race detector.
    """
    smem = device.shared_memory(work)
    written = slice(len(inputs), len(inputs) + len(outputs))
    dtypes = [x.dtype for x in inputs] + [jnp.int32] * len(outputs)

    def body(*refs):
        block = lax.axis_index("block")
        if interpret:
            interpreted_kernel = getattr(interpreted, kernel)
            interpreted_kernel(work, block, lax.axis_index("warpgroup"), refs[: written.start], refs[written])
            return

        @plgpu.inline_mgpu(arg_types=(tuple(plgpu.RefType() for _ in refs), plgpu.Layout.WG_SPLAT))
        def run(ctx, refs, block):
            del ctx
            gmem = [
                lane.Array.of(ref, dtype, lane.GMEM) for ref, dtype in zip(refs[: written.stop], dtypes, strict=True)
            ]
            scratch = [lane.Array.of(ref, jnp.int32, lane.SMEM) for ref in refs[written.stop :]]
            in_smem = dict(zip(smem, scratch, strict=True))
            block = lane.Int(block.registers.item())
            getattr(device, kernel)(work, block, gmem[: written.start], gmem[written], in_smem)

        run(refs, block)  # pyright: ignore[reportCallIssue]

    launch = plgpu.kernel(
        body,
        out_type=tuple(jax.ShapeDtypeStruct(shape, jnp.int32) for shape in outputs),
        scratch_types=() if interpret else [plgpu.SMEM((size,), jnp.int32) for size in smem.values()],
        grid=(work.blocks,),
        grid_names=("block",),
        num_threads=work.warps // WARPS,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
        kernel_name=f"route_{kernel}",
    )
    return launch(*inputs)


@lowered_once("top_k", "capacity", "groups")
def mosaic(
    scores: Float[Array, "tokens experts"],
    top_k: int,
    capacity: int | None,
    mask: Bool[Array, " tokens"] | None,
    groups: int,
    config: Config,
    interpret: bool,
) -> tuple[Int32[Array, "tokens {top_k}"], Routing]:
    """Launches the kernels for at least one token; `interpret` runs them on CPU under the race detector."""
    tokens, experts = scores.shape
    work = device.Work(
        tokens=tokens,
        experts=experts,
        top_k=top_k,
        groups=groups,
        capacity=capacity,
        is_masked=mask is not None,
        warp_tokens=config.tokens,
        warps=WARPS * config.warpgroups,
    )
    inputs = [scores] if mask is None else [scores, mask.astype(jnp.int8)]
    chosen = [(tokens, top_k), (work.blocks * work.warps, experts), (work.blocks, experts)]
    placed = [(tokens * top_k,), (experts,)]
    if work.blocks == 1:
        ids, _, _, order, counts = _launch("choose_and_place", work, inputs, chosen + placed, interpret)
    else:
        ids, words, block_counts = _launch("choose", work, inputs, chosen, interpret)
        order, counts = _launch("place", work, [ids, words, block_counts], placed, interpret)
    return ids, Routing(counts=counts, order=order, top_k=top_k)


def configs(tokens: int) -> list[Config]:
    """Configs worth timing. The heuristic's choice comes first: the smallest block of which there are not too many."""
    growing = [Config(tokens=x, warpgroups=4) for x in (8, 16, 32)]
    enough = [config for config in growing if tokens <= MANY_BLOCKS * config.block_tokens]
    others = [Config(tokens=x, warpgroups=y) for x, y in ((8, 2), (16, 2), (32, 1))]
    return list(dict.fromkeys([*(enough or growing[-1:])[:1], *growing, *others]))


def check_support(
    scores, top_k: int, capacity: int | None, priority, groups: int, devices: tuple[str, ...] | None
) -> None:
    """Raises NotImplementedError where the kernels cannot take these arguments, or the device is none of `devices`."""
    tokens, experts = scores.shape
    if experts > MAX_EXPERTS or top_k > MAX_TOP_K:
        limits = f"{MAX_EXPERTS} experts and top_k={MAX_TOP_K} at most"
        raise NotImplementedError(f"the Mosaic kernel takes {limits}; got experts={experts}, top_k={top_k}")
    if (tokens + MAX_BLOCK_TOKENS * groups) * experts >= 2**30:  # offsets are 32 bits, of whole blocks
        rule = f"the Mosaic kernel takes (tokens + {MAX_BLOCK_TOKENS} * groups) * experts < 2**30"
        raise NotImplementedError(f"{rule}; got tokens={tokens}, groups={groups}, experts={experts}")
    if priority is not None or (capacity is not None and top_k > 1):
        got = f"top_k={top_k} and {'no ' if priority is None else 'a '}priority"
        raise NotImplementedError(f"with a capacity the Mosaic kernel takes top_k=1 without priority; got {got}")
    if devices is not None:
        require_device("route", devices)


def check_config(config: Config) -> None:
    """Raises ValueError where the kernels do not take this config."""
    if config.tokens not in (8, 16, 32) or config.warpgroups not in (1, 2, 4):
        raise ValueError(f"tokens must be 8, 16 or 32, and warpgroups 1, 2 or 4; got {config}")
