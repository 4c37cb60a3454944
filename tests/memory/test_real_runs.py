"""A few of the runs of `benchmarks.memories`: 60 steps of real text, wherever rows lie."""

import pytest

from benchmarks.memories import PROCESSES_MESH, Runs, compare

pytestmark = pytest.mark.little_effort

STEPS = 60


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    found = Runs(tmp_path_factory.mktemp("runs"), STEPS)
    found.prepare()
    return found


@pytest.mark.long
@pytest.mark.parametrize(
    ("memory", "form", "meshes", "others"),
    [
        pytest.param("value", "bfloat16", [(2, 2, 2)], False, marks=pytest.mark.nightly),
        pytest.param("per_layer", "float32", [(8, 1, 1)], False, marks=pytest.mark.nightly),
        # The gate of `engram` takes meshes apart, and other orders of sums: for itself.
        pytest.param("stem + ngram", "float32", [(2, 2, 2)], False, marks=pytest.mark.nightly),
        ("ngram to values", "bfloat16", [PROCESSES_MESH], True),
    ],
    ids=["value", "per_layer", "stem + ngram", "ngram to values"],
)
def test_runs_of_real_text(runs, memory, form, meshes, others):
    """Bit for bit within a mesh, also if killed and of two processes; meshes by their losses."""
    [record] = compare(runs, [memory], [form], meshes, others)
    assert not [what for what in record.items() if what[1].startswith("NOT")]
    judged = {name for name, what in record.items() if what.startswith("equal")}
    rows = {f"rows, {','.join(map(str, mesh))}" for mesh in meshes}
    assert judged == rows | ({"killed", "two processes"} if others else set())
