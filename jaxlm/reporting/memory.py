"""What a compiled program needs of a device's memory, by the compiler."""

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # estimates need no JAX
    import jax


class Memory(NamedTuple):
    """Bytes of one device."""

    arguments: int  # state and batch
    temporaries: int  # activations, gradients, what is fetched from other devices
    host: int  # moved to the host's memory
    total: int  # the device's peak: arguments, temporaries and results that take the place of no argument


def memory_of(compiled: "jax.stages.Compiled") -> Memory:
    """What the compiled program needs."""
    sizes = compiled.memory_analysis()
    total = (sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes + sizes.temp_size_in_bytes)
    host = sizes.host_argument_size_in_bytes + sizes.host_temp_size_in_bytes
    return Memory(sizes.argument_size_in_bytes, sizes.temp_size_in_bytes, host, total)
