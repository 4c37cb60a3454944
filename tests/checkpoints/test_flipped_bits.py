"""One bit of a checkpoint is another, in a file of any kind: it is noticed, and named."""

import contextlib
import json
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from stem_jax import edit, evaluate, export, generate
from stem_jax.bucket import walk
from stem_jax.checkpoints.checkpoint_info import CheckpointInfo
from stem_jax.checkpoints.checkpointer import Checkpointer
from stem_jax.checkpoints.file_list import LIST, read_list
from stem_jax.checkpoints.files import damage, set_aside_damaged
from stem_jax.checkpoints.loading import load_run
from stem_jax.errors import InputError
from stem_jax.training.state import init_state
from tests.tables.test_disk_runs import on_disk, run  # noqa: F401
from tests.tables.test_offload_run import text_file  # noqa: F401

pytestmark = pytest.mark.little_effort

# Files of one kind differ in what is hashed, and in the process that wrote them.
_KIND = [(r"\b[0-9a-f]{32}\b", "DATA"), (r"process_\d+", "process_N")]
KINDS = """
_CHECKPOINT_METADATA commit_success.txt files.json metrics/metrics
config/metadata data/metadata layout/metadata
params/_METADATA params/_sharding params/manifest.ocdbt params/d/DATA
params/array_metadatas/process_N params/ocdbt.process_N/manifest.ocdbt
params/ocdbt.process_N/d/DATA opt_state/ocdbt.process_N/d/DATA
table_rows/ocdbt.process_N/d/DATA table_slots/ocdbt.process_N/d/DATA table_slots/manifest.ocdbt
""".split()


def kind_of(name: str) -> str:
    for pattern, instead in _KIND:
        name = re.sub(pattern, instead, name)
    return name


@contextlib.contextmanager
def flipped(path: Path, place: int, bit: int) -> Iterator[None]:
    content = path.read_bytes()
    changed = bytearray(content)
    changed[place] ^= 1 << bit
    path.write_bytes(changed)
    try:
        yield
    finally:
        path.write_bytes(content)


def some_bits(path: Path, rng: random.Random) -> set[tuple[int, int]]:
    """Both ends of a file, and others."""
    size = path.stat().st_size
    places = {0, size - 1, *(rng.randrange(size) for _ in range(3))}
    return {(place, rng.randrange(8)) for place in places}


@pytest.fixture(scope="module")
def saved(train_step, tmp_path_factory) -> Path:
    """Checkpoints of steps 1 and 2."""
    step, workdir = train_step((2, 2, 2)), tmp_path_factory.mktemp("saved")
    state = init_state(step.blueprint)
    with Checkpointer(workdir) as checkpoints:
        for number in (1, 2):
            info = CheckpointInfo(number, number, 0, {"stem": 0}, "none", {}, step.config)
            checkpoints.save(state, info, 1.0 / number)
            checkpoints.wait()
    return workdir / "checkpoints"


@pytest.fixture
def checkpoints(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


def test_every_flipped_bit_is_noticed(saved):
    """In every file there is, so that a new kind is looked at, too."""
    folder, rng, kinds = saved / "2", random.Random(0), set()
    assert damage(folder, verify=True) is None
    for path in walk(folder):
        name = str(path.relative_to(folder))
        kinds.add(kind_of(name))
        for place, bit in some_bits(path, rng):
            with flipped(path, place, bit):
                found = damage(folder, verify=True)
            assert found is not None and found.startswith(f"{name} "), (name, place, bit, found)
    assert damage(folder, verify=True) is None
    assert kinds.issuperset(KINDS)


@pytest.mark.parametrize("processes", [2, 3, pytest.param(16, marks=pytest.mark.long)])
def test_processes_share_what_they_look_at(saved, processes):
    """Each file of table rows is read by one of them; what all read first, by all."""
    folder = saved / "2"
    shares = [(process, processes) for process in range(processes)]
    for path in walk(folder):
        name = str(path.relative_to(folder))
        with flipped(path, path.stat().st_size // 2, 3):
            found = [damage(folder, verify=True, share=share) for share in shares]
        assert any(found)
        if "ocdbt.process_" not in name:
            assert all(found)
        elif not name.endswith("manifest.ocdbt"):
            assert len([why for why in found if why is not None]) == 1


def test_a_flipped_bit_passes_where_nobody_compares(checkpoints):
    [path, *_] = (checkpoints / "2" / "params").glob("ocdbt.process_0/d/*")
    with flipped(path, 0, 0):
        assert damage(checkpoints / "2", verify=False) is None
        assert set_aside_damaged(checkpoints, verify=False) == []


@pytest.mark.parametrize(
    "file", ["table_slots/ocdbt.process_0/d/*", "params/manifest.ocdbt", "data/metadata", LIST]
)
def test_the_one_before_is_used(checkpoints, file):
    [path, *_] = (checkpoints / "2").glob(file)
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 16
    path.write_bytes(content)
    [line] = set_aside_damaged(checkpoints)
    assert line.startswith(f"checkpoint 2 is damaged ({path.relative_to(checkpoints / '2')} ")
    assert [path.name for path in checkpoints.iterdir()] == ["1"]


def test_a_loss_that_comes_later_is_listed(checkpoints):
    shutil.rmtree(checkpoints / "2" / "metrics")
    assert damage(checkpoints / "2") == "metrics/metrics is missing"
    with Checkpointer(checkpoints.parent) as opened:
        opened.add_eval_loss(2, 0.25)
        opened.add_eval_loss(2, 0.125)
    assert damage(checkpoints / "2", verify=True) is None
    with flipped(checkpoints / "2" / "metrics" / "metrics", 3, 1):
        assert damage(checkpoints / "2", verify=True).startswith("metrics/metrics has the checksum")


def test_a_list_of_an_earlier_version_has_sizes(checkpoints):
    folder = checkpoints / "2"
    sizes = {name: size for name, (size, _) in read_list(folder).items()}
    # Orbax added a time to the one, and the loss came later.
    sizes["_CHECKPOINT_METADATA"] -= 15
    del sizes["metrics/metrics"]
    (folder / LIST).write_text(json.dumps(sizes, indent=0))
    assert damage(folder, verify=True) is None
    with Checkpointer(checkpoints.parent) as opened:
        opened.add_eval_loss(2, 0.25)
    assert damage(folder, verify=True) is None
    (folder / "params" / "_METADATA").write_bytes(b"")
    assert damage(folder, verify=True).startswith("params/_METADATA has 0 bytes of ")


@pytest.mark.long
def test_rows_on_disk(run, tmp_path):  # noqa: F811
    """Every file that a save of them needs, at every row that it needs."""
    workdir = run("run", 4, **on_disk(tmp_path))
    folder, rng, kinds = workdir / "checkpoints" / "4", random.Random(0), set()
    assert damage(folder, verify=True) is None
    scratch = (".lock", "owner.json")
    for path in walk(tmp_path / "disk"):
        if path.name in scratch or path.name.startswith("index-") or ".lock" in path.parts:
            continue
        kinds.add(path.name)
        # Places that no save needs may be anything: the first has a row.
        ends = path.suffix == ".rows"
        for place, bit in {(0, 3), (17, 5)} if ends else some_bits(path, rng):
            with flipped(path, place, bit):
                found = damage(folder, verify=True)
            assert found is not None and str(path) in found, (path, place, found)
    rows = {"rows.npy", "places.npy", "needed.npy", "00000.rows", "facts.json", "step-4.json"}
    assert kinds == rows


@pytest.mark.long
def test_programs_refuse_it_in_one_line(run, tmp_path, capsys):  # noqa: F811
    workdir = run("run", 4, train__sample_prompt="")
    folder = workdir / "checkpoints" / "4"
    programs = {
        generate: ["--prompt=a"],
        evaluate: ["--niah"],
        edit: [f"--save={tmp_path / 'a.patch'}", "--swap=a=b"],
        export: [f"--out={tmp_path / 'out'}", "--format=hf"],
    }
    for path in walk(folder):
        name = str(path.relative_to(folder))
        if not name.startswith("opt_state"):
            with flipped(path, path.stat().st_size // 2, 1), pytest.raises(InputError) as error:
                load_run(workdir)
            assert f"checkpoint {folder} is damaged ({name} " in str(error.value)
            assert "\n" not in str(error.value)
    [path, *_] = (folder / "table_rows").glob("ocdbt.process_0/d/*")
    with flipped(path, 5, 1):
        for program, flags in programs.items():
            with pytest.raises(InputError, match=r"4 is damaged \(table_rows/ocdbt.process_0/d/"):
                program.main([f"--workdir={workdir}", *flags])
