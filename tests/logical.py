"""Tables on devices, in the form that does not depend on them."""

import numpy as np

from stem_jax.tables.spec import TableState, logical


def logical_table(table: TableState) -> dict[str, np.ndarray]:
    """The fields of a table, rows and moments [R, S, F]."""
    return {name: logical(np.asarray(field)) for name, field in vars(table).items()}
