"""What a picture shows, read back from its pixels."""

from pathlib import Path

import matplotlib
import matplotlib.image
import numpy as np


def assert_is_heatmap(path: Path, tables: list[list[list[float]]]) -> None:
    """A panel and its colour bar for each table; cell [length][depth] of a table, from 0 to 1, has
    its colour, with lengths from left to right and depths from top to bottom."""
    assert path.read_bytes().startswith(b"\x89PNG")
    pixels_HxWx3 = matplotlib.image.imread(path)[..., :3]
    # All else is black, white or grey.
    coloured_HxW = np.ptp(pixels_HxWx3, axis=2) > 0.05
    areas = _runs(coloured_HxW.mean(axis=0) > 0.3)
    assert len(areas) == 2 * len(tables)
    for (left, right), (bar_left, bar_right), shares in zip(areas[::2], areas[1::2], tables):
        assert right - left > 5 * (bar_right - bar_left) > 25
        [(top, bottom)] = _runs(coloured_HxW[:, left:right].mean(axis=1) > 0.5)
        assert bottom - top > 200
        for column, by_depth in enumerate(shares):
            for row, share in enumerate(by_depth):
                # A number stands in the middle of a cell.
                x = left + (right - left) * (column + 0.15) / len(shares)
                y = top + (bottom - top) * (row + 0.15) / len(by_depth)
                expected_3 = matplotlib.colormaps["RdYlGn"](share)[:3]
                np.testing.assert_allclose(pixels_HxWx3[int(y), int(x)], expected_3, atol=0.02)


def _runs(mask_N: np.ndarray) -> list[tuple[int, int]]:
    """First and one past the last place of each series of places that are set."""
    edges = np.flatnonzero(np.diff(mask_N.astype(int), prepend=0, append=0))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist()))
