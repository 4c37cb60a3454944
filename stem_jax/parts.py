"""Parts of a step, as the compiled program names them.

Every instruction of an optimised program carries the scopes that it was traced in. One that is
marked here says which part of the step it belongs to, through gradients, rematerialisation, loops
and shardings; the innermost mark counts. `stem_jax.planning.account` adds the parts up, whatever
their names: a new part is a new name at the place that does the work.
"""

import re

import jax

# In the order in which they are read; others follow.
STEP = (
    *("block_matmuls", "attention", "rotary", "block_rest"),
    *("row_lookup", "row_gradient", "row_copies", "exchange"),
    *("head_loss", "embedding", "embedding_backward", "row_optimizer", "optimizer", "rest"),
)
REST = "rest"
# Parts that are the calls of their kernels alone; what stands around a call belongs to the mark
# outside.
KERNELS = frozenset({"attention"})
# What the compiler or a scan moves between these parts and others is a part of its own.
MOVED_FOR = {
    "attention": "rotary",
    "row_lookup": "row_copies",
    "row_gradient": "row_copies",
    "exchange": "row_copies",
}
_MARK = "part."
_MARKED = re.compile(r"\bpart\.(\w+)")


def part(name: str):
    """A context, or a decorator, in which all that is traced belongs to this part."""
    return jax.named_scope(f"{_MARK}{name}")


def parts_of(op_name: str) -> tuple[str, ...]:
    """The parts that an instruction's `op_name` lies in, from the outermost to the innermost."""
    return tuple(_MARKED.findall(op_name))
