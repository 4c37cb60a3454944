"""Into which groups of terms a row's coasting is cut, by the betas alone.

A row coasts on mu / (a_j sqrt(v) + eps) with the weights b1^j, a_j = b2^(j/2) (`row_coast`). A
group of terms has one a, which is exact for eps -> 0 and wrong where a_j sqrt(v) falls below eps
inside the group: the closer b1 comes to sqrt(b2), the more of the coasting lies in late terms.
"""

import functools
import math

import numpy as np

# First terms of the groups; the last one is open. Enough for 0.9 and 0.95 to 0.999.
GROUP_EDGES = (1, 2, 4, 8, 16)
# Of the coasting, at any v and at a constant rate; the usual betas have 0.0053.
LARGEST_ERROR = 0.01
# Terms that a row can look back on: a number for each of them is in memory for each row of a batch.
MOST_TERMS = 5000
# Terms fall off as (b1 / sqrt(b2))^j; those below this share of the first are left out.
_SMALLEST_TERM = 1e-9
# How much longer each group may be than the one before, where the usual edges do not do.
_GROWTHS = (2.0, 1.5, 1.25, 1.1, 1.0)
# sqrt(v) / eps, from where eps decides alone to where it never does.
_ROOTS = np.exp(np.linspace(-3.0, 40.0, 200))


def num_terms(beta1: float, beta2: float) -> int:
    """How many of the missed updates move a row by more than rounding; `beta1 < sqrt(beta2)`."""
    if beta1 == 0:
        return GROUP_EDGES[-1] + 1
    ratio = beta1 / math.sqrt(beta2)
    return max(GROUP_EDGES[-1] + 1, math.ceil(math.log(_SMALLEST_TERM) / math.log(ratio)))


@functools.cache
def group_edges(beta1: float, beta2: float) -> tuple[int, ...]:
    """First terms of the groups: the fewest that stay within `LARGEST_ERROR` of the coasting."""
    terms = num_terms(beta1, beta2)
    if beta1 < _SMALLEST_TERM:
        return GROUP_EDGES
    finer = (_geometric(growth, terms) for growth in _GROWTHS)
    return next(e for e in (GROUP_EDGES, *finer) if coast_error(beta1, beta2, e) <= LARGEST_ERROR)


def coast_error(beta1: float, beta2: float, edges: tuple[int, ...]) -> float:
    """The largest error of the groups, as a share of the coasting."""
    terms = num_terms(beta1, beta2)
    j = np.arange(1, terms + 1)
    weight_J, a_J = beta1 ** j.astype(np.float64), np.exp(0.5 * j * math.log(beta2))
    ratio_J = (beta1 / math.sqrt(beta2)) ** j.astype(np.float64)
    first = np.array(edges) - 1
    weight_G, over_a_G = np.add.reduceat(weight_J, first), np.add.reduceat(ratio_J, first)
    # Where both are below what a number can be, the group moves nothing.
    a_G = weight_G / np.where(over_a_G > 0, over_a_G, 1.0)
    worst = 0.0
    for root in _ROOTS:
        exact = np.sum(weight_J / (a_J * root + 1))
        worst = max(worst, abs(np.sum(weight_G / (a_G * root + 1)) / exact - 1))
    return worst


def _geometric(growth: float, terms: int) -> tuple[int, ...]:
    edges = [1]
    while (following := max(edges[-1] + 1, int(edges[-1] * growth))) < terms:
        edges.append(following)
    return tuple(edges)
