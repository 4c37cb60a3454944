"""How vectors lie: angles between them, how many directions they use, how long they are.

Large angular spread is what STEM claims for its rows (arXiv 2601.10639, abstract): cosines of
pairs near zero. All figures are of a sample of vectors; no matrix is larger than that sample
squared.
"""

import dataclasses
import math
from typing import Any

import numpy as np

# Equal bins of the cosine over [-1, 1].
HISTOGRAM_BINS = 80
# Tokens seen so often: rows that training moved, means that are more than a few places.
FREQUENT = 16


@dataclasses.dataclass(frozen=True)
class Spread:
    """Angles of n vectors of width F, all n (n - 1) / 2 pairs.

    mean_abs_cosine: mean |cos|; 0 is right angles throughout. standard_error: of it, over draws of
    the sample. mean_cosine: signed. effective_rank: see `effective_rank`. histogram: share of the
    pairs in each of HISTOGRAM_BINS. vectors: n; those of length 0 have no direction and are left
    out.
    """

    vectors: int
    mean_abs_cosine: float
    standard_error: float
    mean_cosine: float
    effective_rank: float
    histogram: list[float]

    @classmethod
    def of(cls, vectors_nxF: np.ndarray) -> "Spread | None":
        """None for fewer than two vectors with a direction."""
        norms_n = np.linalg.norm(vectors_nxF, axis=1)
        vectors_nxF = vectors_nxF[norms_n > 0].astype(np.float32)
        n = len(vectors_nxF)
        if n < 2:
            return None
        units_nxF = vectors_nxF / norms_n[norms_n > 0, None].astype(np.float32)
        cosines_nxn = np.clip(units_nxF @ units_nxF.T, -1, 1)
        upper = cosines_nxn[np.triu_indices(n, 1)]
        counts, _ = np.histogram(upper, HISTOGRAM_BINS, (-1, 1))
        # A mean over pairs varies with the sample as twice the mean over the pairs of one vector
        # does (Hoeffding 1948, a U-statistic of order two).
        of_one_n = (np.abs(cosines_nxn).sum(axis=1, dtype=np.float64) - 1) / (n - 1)
        return cls(
            vectors=n,
            mean_abs_cosine=float(np.abs(upper).mean(dtype=np.float64)),
            standard_error=float(2 * of_one_n.std() / math.sqrt(n)),
            mean_cosine=float(upper.mean(dtype=np.float64)),
            effective_rank=effective_rank(vectors_nxF),
            histogram=(counts / len(upper)).tolist(),
        )


def effective_rank(vectors_nxF: np.ndarray) -> float:
    """exp of the entropy of the normalised singular values; between 1 and min(n, F).

    Roy and Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007.
    """
    wide_nxF = vectors_nxF.astype(np.float64)
    n, F = wide_nxF.shape
    gram = wide_nxF @ wide_nxF.T if n <= F else wide_nxF.T @ wide_nxF
    singular = np.sqrt(np.maximum(np.linalg.eigvalsh(gram), 0))
    if not singular.any():
        return 0.0
    shares = singular / singular.sum()
    shares = shares[shares > 0]
    return float(np.exp(-np.sum(shares * np.log(shares))))


def random_mean_abs_cosine(width: int) -> float:
    """Mean |cos| of directions drawn at random: Gamma(F/2) / (sqrt(pi) Gamma((F+1)/2))."""
    return math.exp(math.lgamma(width / 2) - math.lgamma((width + 1) / 2)) / math.sqrt(math.pi)


@dataclasses.dataclass(frozen=True)
class LayerGeometry:
    """The vectors of one layer.

    layer: of the model. width: F. plain: as they are. centred: their mean subtracted, without which
    a part that all share would decide the angles. frequent: plain, tokens seen FREQUENT times or
    more. norms: by token frequency, see `norms_by_frequency`. common: length of the mean vector
    over the mean length.
    """

    layer: int
    width: int
    plain: Spread | None
    centred: Spread | None
    frequent: Spread | None
    norms: list[dict[str, float]]
    common: float

    @classmethod
    def of(cls, layer: int, vectors_nxF: np.ndarray, counts_n: np.ndarray) -> "LayerGeometry":
        """Measures vectors of one layer.

        Args:
            counts_n: how often the token of each was seen; vectors of unseen tokens count for the
                norms alone.
        """
        seen_n = counts_n > 0
        seen_nxF = vectors_nxF[seen_n]
        mean_F = seen_nxF.mean(axis=0, dtype=np.float64) if len(seen_nxF) else np.zeros(1)
        norms_n = np.linalg.norm(vectors_nxF, axis=1)
        length = norms_n[seen_n].mean() if seen_n.any() else 0.0
        return cls(
            layer=layer,
            width=vectors_nxF.shape[1],
            plain=Spread.of(seen_nxF),
            centred=Spread.of(seen_nxF - mean_F.astype(np.float32)),
            frequent=Spread.of(vectors_nxF[counts_n >= FREQUENT]),
            norms=norms_by_frequency(norms_n, counts_n),
            common=float(np.linalg.norm(mean_F) / length) if length else 0.0,
        )

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return dataclasses.asdict(self)


def norms_by_frequency(norms_n: np.ndarray, counts_n: np.ndarray) -> list[dict[str, float]]:
    """Lengths of vectors by how often their token was seen.

    Returns:
        A record for each bin that has tokens: `first` to `last` times seen (0, then powers of two
        and what lies between), `tokens`, and the `mean`, `low` and `high` (10th and 90th
        percentile) of their norms.
    """
    # Bin 0 holds what was never seen, bin b counts from 2^(b-1) up to below 2^b.
    bins_n = np.where(counts_n > 0, np.frexp(counts_n)[1], 0)
    records = []
    for number in np.unique(bins_n).tolist():
        norms = norms_n[bins_n == number]
        low, high = np.percentile(norms, [10, 90])
        records.append(
            {
                "first": (1 << number) >> 1,
                "last": max((1 << number) - 1, 0),
                "tokens": len(norms),
                "mean": float(norms.mean()),
                "low": float(low),
                "high": float(high),
            }
        )
    return records


@dataclasses.dataclass(frozen=True)
class SpreadVerdict:
    """Whether rows spread wider than the dense up values they stand for, over compared layers.

    wider: layers whose mean |cos| is lower than the dense twin's by more than two standard errors.
    narrower: higher by as much. layers: compared. rows, dense: means of the mean |cos| over them.
    """

    layers: int
    wider: int
    narrower: int
    rows: float
    dense: float

    @property
    def word(self) -> str:
        """What the figures say."""
        if self.wider == self.layers:
            return "confirmed"
        if self.wider == 0:
            return "not confirmed"
        return f"confirmed in {self.wider} of {self.layers} layers"


def spread_verdict(
    rows: list[LayerGeometry], dense: list[LayerGeometry], kind: str
) -> SpreadVerdict | None:
    """Compares the layers that both have.

    Args:
        kind: `plain`, `centred` or `frequent`.

    Returns:
        None if there is nothing to compare.
    """
    twins = {geometry.layer: getattr(geometry, kind) for geometry in dense}
    pairs = [
        (own, twins[geometry.layer])
        for geometry in rows
        if (own := getattr(geometry, kind)) is not None and twins.get(geometry.layer) is not None
    ]
    if not pairs:
        return None
    differences = [
        (b.mean_abs_cosine - a.mean_abs_cosine, 2 * math.hypot(a.standard_error, b.standard_error))
        for a, b in pairs
    ]
    return SpreadVerdict(
        layers=len(pairs),
        wider=sum(difference > error for difference, error in differences),
        narrower=sum(-difference > error for difference, error in differences),
        rows=float(np.mean([a.mean_abs_cosine for a, _ in pairs])),
        dense=float(np.mean([b.mean_abs_cosine for _, b in pairs])),
    )
