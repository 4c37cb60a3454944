"""Parameters that are drawn by their names, `train.init=name`, once a module has given them names.

`nnx.Rngs` counts its draws, so that what is drawn after a parameter differs where that is missing:
two variants of a model share few numbers. Drawn by (seed, name), parameters of the same name and
shape begin with the same bits whatever else there is.
"""

import dataclasses
import hashlib

import jax


@dataclasses.dataclass(frozen=True)
class Draw:
    """Stands for the numbers of a parameter until it has a name; see `layers.truncated_normal`."""

    shape: tuple[int, ...]
    std: float
    cut: float
    logical_axes: tuple[str, ...]


class Unnamed:
    """Given to modules in place of `nnx.Rngs`, gives no keys, so that they hold `Draw`s."""

    def params(self) -> None:
        """The key of a parameter, which has none yet."""
        return None


def parameter_key(seed: int, name: str) -> jax.Array:
    """The random key of the parameter of a dotted name by layer, `blocks.0.ffn.up_proj.kernel`."""
    digest = hashlib.sha256(name.encode()).digest()
    key = jax.random.key(seed)
    # 64 bits: the chance that two of a thousand names share a key is 3e-14.
    for start in (0, 4):
        key = jax.random.fold_in(key, int.from_bytes(digest[start : start + 4], "little"))
    return key
