"""Parts of a step, as the compiled program names them.

Every instruction of an optimised program carries the scopes that it was traced in. One that is
marked here says which part of the step it belongs to, through gradients, rematerialisation, loops
and shardings; the innermost mark counts. `stem_jax.planning.account` adds the parts up, whatever
their names: a new part is a new name at the place that does the work.
"""

import re

import jax

# Kernels are parts by their calls alone; what stands around a call belongs to the mark outside.
KERNELS = frozenset({"attention"})
_MARK = "part."
_MARKED = re.compile(r"\bpart\.(\w+)")


def part(name: str):
    """A context, or a decorator, in which all that is traced belongs to this part."""
    return jax.named_scope(f"{_MARK}{name}")


def parts_of(op_name: str) -> tuple[str, ...]:
    """The parts that an instruction's `op_name` lies in, from the outermost to the innermost."""
    return tuple(_MARKED.findall(op_name))
