"""Which GPU a kernel is traced for: the abstract device of the ambient mesh, else the default device."""

from typing import Any

import jax


def default_device() -> Any:
    """Where jax computes unless told otherwise."""
    default = jax.config.jax_default_device
    if isinstance(default, str):
        return jax.local_devices(backend=default)[0]
    return default or jax.local_devices()[0]


def device_kind() -> str:
    """Name of the device, such as "NVIDIA H200" or "cpu"."""
    if abstract := jax.sharding.get_abstract_mesh().abstract_device:
        return abstract.device_kind
    return default_device().device_kind


def sm_count() -> int:
    """Streaming multiprocessors of the device: the size of a persistent grid."""
    if abstract := jax.sharding.get_abstract_mesh().abstract_device:
        return abstract.num_cores
    return default_device().core_count


def require_device(kernel: str, supported: tuple[str, ...]) -> None:
    """Raises NotImplementedError where the device is none of `supported` (compared by prefix)."""
    if not (kind := device_kind()).startswith(supported):
        raise NotImplementedError(f"the Mosaic kernel of {kernel} runs on {', '.join(supported)}; got {kind}")
