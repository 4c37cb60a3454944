"""The mesh of a run on fewer devices than it has when all hosts answer."""

from stem_jax.config import MEMORY_SECTIONS, Config
from stem_jax.errors import InputError


def data_size(config: Config, devices: int) -> int | None:
    """What `mesh.data` is on so many devices; None if the run does not divide over them.

    The other axes stay as they are: parameters may well be too large for fewer devices.

    Raises:
        InputError: another axis than `mesh.data` takes what is left.
    """
    mesh = config.mesh
    fixed = {axis: getattr(mesh, axis) for axis in ("fsdp", "context", "tensor")}
    for axis, size in fixed.items():
        if size == -1:
            raise InputError(
                f"mesh.{axis}=-1 takes the devices that there are, and an elastic run changes "
                f"mesh.data alone; set mesh.{axis} to its number of devices"
            )
    together = mesh.fsdp * mesh.context * mesh.tensor
    if devices < together or devices % together:
        return None
    data = devices // together
    sizes = fixed | {"data": data}
    if config.micro_batch_size % (data * mesh.fsdp):
        return None
    shards = 1
    for axis in config.tables.vocab_axes:
        shards *= sizes[axis]
    rows = [config.tables.pad_multiple]
    for section in ("tables", *MEMORY_SECTIONS):
        rows += [config.value_of(f"{section}.{key}") for key in ("resident_rows", "host_rows")]
    return None if any(number is not None and number % shards for number in rows) else data


def largest(config: Config, hosts: int, devices: int) -> tuple[int, int]:
    """Of so many hosts, with so many devices each, how many a run can use, and its `mesh.data`.

    (0, 0): the run does not divide over any number of them.
    """
    for number in range(hosts, 0, -1):
        data = data_size(config, number * devices)
        if data is not None:
            return number, data
    return 0, 0
