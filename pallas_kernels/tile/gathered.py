"""Barriers on which a thread's 16-byte copies (cp.async) arrive by themselves when they are complete.

Pallas has barriers for TMA only. Without these a producer would have to wait for its own gathers before it could hand
a stage over, some stages late; 128 threads would meet at each. The interpreter, which knows no cp.async, is shown a
Pallas barrier instead.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, nvvm

WARPGROUP = 128


def words(stages: int) -> int:
    """int32 words of shared memory that the barriers take, from a multiple of two on."""
    return 2 * stages


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gathered:
    """One barrier a stage: 128 threads of the producer arrive, consumers wait.

    Consumers must have waited for something that the producer did after `begin` before they touch it.

    Attributes:
        memory: `words` int32 of shared memory.
        interpreted: a `plgpu.Barrier` with as many barriers, for the interpreter; None elsewhere.
        stages: how many stages there are.
    """

    memory: Any
    interpreted: Any
    stages: int

    def begin(self) -> None:
        """Makes the barriers ready; called once by the producer."""
        if self.interpreted is not None:
            return

        def init(barrier):
            for stage in range(self.stages):
                nvvm.mbarrier_init(barrier(stage).get_ptr(), utils.c(WARPGROUP, _i32()), predicate=_first_thread())
            utils.inline_ptx("fence.mbarrier_init.release.cluster;", has_side_effects=True)

        self._inline(init)
        plgpu.commit_smem()

    def arrive(self, slot: jax.Array) -> None:
        """Arrives at once: nothing is gathered into this stage."""
        if self.interpreted is not None:
            return plgpu.barrier_arrive(self.interpreted.at[slot])
        self._inline(lambda barrier, slot: barrier(slot).arrive(), slot)

    def arrive_when_complete(self, slot: jax.Array) -> None:
        """Each thread arrives when all copies that it has begun so far are complete."""
        if self.interpreted is not None:
            plgpu.commit_smem()
            return plgpu.barrier_arrive(self.interpreted.at[slot])
        self._inline(lambda barrier, slot: nvvm.cp_async_mbarrier_arrive(barrier(slot).get_ptr(), noinc=True), slot)

    def wait(self, g: jax.Array) -> None:
        """Waits for stage number g of the kernel's, and makes it visible to wgmma."""
        slot = lax.rem(g, self.stages)
        if self.interpreted is not None:
            return plgpu.barrier_wait(self.interpreted.at[slot])

        def wait(barrier, slot, round_):
            odd = arith.trunci(ir.IntegerType.get_signless(1), round_)
            barrier(slot).wait_parity(odd)
            # cp.async writes as threads do, wgmma reads as TMA does: the fence is what joins the two.
            nvvm.fence_proxy(nvvm.ProxyKind.async_shared, space=nvvm.SharedSpace.shared_cta)

        self._inline(wait, slot, lax.div(g, self.stages))

    def _inline(self, body: Callable[..., Any], *scalars: jax.Array) -> None:
        """`body(barrier, *scalars)` as inline MLIR, where `barrier(slot)` is that of a slot."""

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), (plgpu.Layout.WG_SPLAT,) * len(scalars)))
        def emit(ctx, memory, scalars):
            del ctx
            base = utils.memref_ptr(memory)

            def barrier(slot):
                offset = utils.c(slot, _i32()) if isinstance(slot, int) else slot
                return utils.BarrierRef(base, offset, phases=base, num_barriers=1)  # no phases are kept: see `wait`

            body(barrier, *(x.registers.item() for x in scalars))

        emit(self.memory, tuple(scalars))  # pyright: ignore[reportCallIssue]


def _i32() -> ir.Type:
    return ir.IntegerType.get_signless(32)


def _first_thread() -> ir.Value:
    return utils.single_thread_predicate(utils.ThreadSubset.WARPGROUP)
