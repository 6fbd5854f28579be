"""The Mosaic GPU kernel of `micro_tile_index`: a mask -> the positions of its true entries, one list a row.

What its threads do is in `device`. Bytes: the mask (again for each team of warps of a list, from L2), 4 an entry.
Operations: about 12 an entry.

Microseconds on an H200 for lists x entries, by warps of a team and entries of a warp:

               alone: 128   256  1024     4: 128   8: 64   16: 32   16: 64   32: 32
     1 x 28672       7.50                   3.30    1.31     1.34     1.34     1.38
     8 x  7168       2.50                           1.15     1.22     1.18     1.38
    64 x  2048       1.34  1.31                     1.28     1.38     1.31     1.44
    32 x  4096       2.05  2.24                     1.25     1.38     1.28     1.41
   128 x  4096       2.59        1.86               2.14     3.01     2.18     3.10
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Int8, Int32

from pallas_kernels.micro_tile_index import device
from pallas_kernels.micro_tile_index.device import WARPS, Work
from pallas_kernels.tile import lane
from pallas_kernels.tile.lane import WARP
from pallas_kernels.tile.launch import lowered_once

TEAMS = (1, 2, 4, 8, 16, 32)
MANY_WARPS = 512  # about one for each scheduler of an H200
FEW_ENTRIES = 2**17  # in all lists
LONG = 8192  # entries of a list, most of which a warp alone would have to count


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Tiling of the Mosaic kernel.

    Attributes:
        entries: of a list that a warp places, a multiple of 32.
        team: warps that share the counting of the entries before theirs, one of TEAMS; a block is one such team, or
            as many small ones as there are in four warps.
    """

    entries: int = 256
    team: int = 1


def _place(work: Work, block: jax.Array, warpgroup: jax.Array, refs) -> None:
    """Runs `device.place`: `refs` are the mask, the indices, the counts and then shared memory."""
    del warpgroup  # its threads know their numbers
    smem = device.shared_memory(work)

    @plgpu.inline_mgpu(arg_types=(tuple(plgpu.RefType() for _ in refs), plgpu.Layout.WG_SPLAT))
    def run(ctx, refs, block):
        del ctx
        dtypes = (jnp.int8, jnp.int32, jnp.int32)
        gmem = [lane.Array.of(ref, dtype, lane.GMEM) for ref, dtype in zip(refs[:3], dtypes, strict=True)]
        scratch = [lane.Array.of(ref, jnp.int32, lane.SMEM) for ref in refs[3:]]
        in_smem = dict(zip(smem, scratch, strict=True))
        device.place(work, lane.Int(block.registers.item()), gmem[:1], gmem[1:], in_smem)

    run(tuple(refs), block)  # pyright: ignore[reportCallIssue]


def _place_interpreted(work: Work, block: jax.Array, warpgroup: jax.Array, refs) -> None:
    """What a warpgroup writes, with plain reads and writes: that each is written once is for the race detector."""
    mask_gmem, indices_gmem, counts_gmem = refs

    def place_part(number, part):
        is_listed = mask_gmem[number][: work.length] != 0
        entries = jnp.arange(work.length, dtype=jnp.int32)
        ranks = jnp.cumsum(is_listed, dtype=jnp.int32) - is_listed.astype(jnp.int32)
        positions = jnp.where(is_listed, ranks, work.length - 1 - (entries - ranks))
        values = jnp.where(is_listed, entries, 0)
        start = part * work.entries

        @functools.partial(lax.fori_loop, start, jnp.minimum(start + work.entries, work.length), init_val=None)
        def _write(entry, _):
            indices_gmem[number, positions[entry]] = values[entry]

        @pl.when(part == work.warps_a_list - 1)
        def _write_count():
            counts_gmem[number] = jnp.sum(is_listed, dtype=jnp.int32)

    for warp in range(WARPS):
        of_all = block * work.warps + warpgroup * WARPS + warp
        number, part = (op(of_all, work.teams_a_list * work.team) for op in (lax.div, lax.rem))
        has_entries = (number < work.lists) & (part < work.warps_a_list)
        pl.when(has_entries)(functools.partial(place_part, number, part))


@lowered_once("length")
def mosaic(
    mask: Bool[Array, "lists padded"] | Int8[Array, "lists padded"], length: int, config: Config, interpret: bool
) -> tuple[Int32[Array, "lists {length}"], Int32[Array, " lists"]]:
    """Launches the kernel; `interpret` runs it on CPU under the race detector.

    Args:
        mask: its rows a multiple of ALIGNMENT; bytes are 0 or 1; what is past `length` does not matter.
        length: entries of a list, at least 1.
        config: tiling.
        interpret: on CPU.
    """
    lists, padded = mask.shape
    entries = min(config.entries, pl.cdiv(length, WARP) * WARP)
    work = Work(lists=lists, length=length, padded=padded, entries=entries, team=config.team)
    place = _place_interpreted if interpret else _place

    def body(*refs):
        place(work, lax.axis_index("block"), lax.axis_index("warpgroup"), refs)

    smem = () if interpret else [plgpu.SMEM((size,), jnp.int32) for size in device.shared_memory(work).values()]
    kernel = plgpu.kernel(
        body,
        out_type=(jax.ShapeDtypeStruct((lists, length), jnp.int32), jax.ShapeDtypeStruct((lists,), jnp.int32)),
        scratch_types=smem,
        grid=(work.blocks,),
        grid_names=("block",),
        num_threads=work.warps // WARPS,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
        kernel_name="micro_tile_index",
    )
    indices, counts = kernel(mask.astype(jnp.int8))
    return indices, counts


def configs(lists: int, length: int) -> list[Config]:
    """Configs worth timing. The heuristic's choice comes first.

    Where there are few entries or lists are long, the entries before a warp's are what takes time, not its own: teams
    count them. Else warps that count by themselves place the most entries that still give every SM its warps.
    """
    alone = [Config(entries=x) for x in (1024, 512, 256, 128)]
    together = [Config(entries=x, team=y) for x, y in ((64, 16), (64, 8), (32, 16), (32, 32), (128, 8), (128, 4))]
    enough = (config for config in alone if lists * pl.cdiv(length, config.entries) >= MANY_WARPS)
    best = together[0] if lists * length <= FEW_ENTRIES or length > LONG else next(enough, alone[-1])
    return list(dict.fromkeys([best, *alone, *together]))


def check_config(config: Config) -> None:
    """Raises ValueError where the kernel does not take this config."""
    if config.entries < WARP or config.entries % WARP:
        raise ValueError(f"entries must be a multiple of {WARP}, at least that; got entries={config.entries}")
    if config.team not in TEAMS:
        raise ValueError(f"team must be one of {TEAMS}; got team={config.team}")
