"""Saves of changes, and checksums, in processes of their own: a kill, two processes at once.

The file is its own child: `python .../test_chain_processes.py TASK FOLDER CONFIG...`.
"""

import contextlib
import os
import shutil
import signal
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from stem_jax.checkpoints.chain import saved_bases
from stem_jax.checkpoints.checkpointer import Checkpointer
from stem_jax.checkpoints.files import damage, set_aside_damaged
from stem_jax.config_file import config_from_json
from stem_jax.processes.cluster import wait_for_all
from stem_jax.tables.store_snapshot import StoreSnapshot
from tests.checkpoints.test_chains import (
    ROWS,
    Run,
    arrays,
    assert_same,
    configs,  # noqa: F401
    restored,
)
from tests.children import child, finish, pair
from tests.launching import wait_until

pytestmark = pytest.mark.little_effort

OPTIONS = {"keep": 9, "full_every": 3}


def update(run: Run) -> None:
    run.touch(range(run.step % 5, ROWS, 5 + run.step))


def expected(workdir: Path, config, step: int) -> dict[str, np.ndarray]:
    """The table after so many updates, of a run that was never saved."""
    run = Run(workdir / "expected", config, **OPTIONS)
    while run.step < step:
        update(run)
    run.checkpoints.close()
    return arrays(run.store)


def task(name: str, folder: Path, *configs) -> list[str]:  # noqa: F811
    return [__file__, name, str(folder), *(config.to_json() for config in configs)]


@pytest.mark.long
@pytest.mark.parametrize("at", [2, 3, 4])
def test_a_save_that_is_killed_leaves_the_chain_before(configs, tmp_path, at):  # noqa: F811
    """Saves 1 and 4 are whole, 2 and 3 are changes."""
    config = configs[0]
    with child(*task(f"killed_{at}", tmp_path, config)) as process:
        finish(process, code=-signal.SIGKILL)
    assert set_aside_damaged(tmp_path / "checkpoints") == []
    run = Run(tmp_path, config, **OPTIONS)
    # Orbax removes it on a thread; a second one that does would be in its way.
    wait_until(lambda: not list(run.checkpoints.folder.glob("*.orbax-checkpoint-tmp*")))
    run.start_again()
    assert run.step == at - 1
    assert_same(arrays(run.store), expected(tmp_path, config, at - 1))
    update(run)
    run.save()
    run.start_again()
    bases = saved_bases(tmp_path / "checkpoints" / str(at))
    assert bases["stem"].step == at - 1 if at < 4 else not bases
    assert_same(arrays(run.store), expected(tmp_path, config, at))
    run.checkpoints.close()


def _killed(folder: str, config, at: int) -> None:
    run, pieces = Run(Path(folder), config, **OPTIONS), StoreSnapshot.pieces

    def killing(self, block, name):
        yield from pieces(self, block, name)
        if name == "nu" and run.step == at:
            os.kill(os.getpid(), signal.SIGKILL)

    StoreSnapshot.pieces = killing
    while True:
        update(run)
        run.save()
        run.checkpoints.wait()


@pytest.mark.long
def test_two_processes(configs, tmp_path):  # noqa: F811
    """They save, go on from it on another mesh, and find a bit that one of them reads."""
    run_pair(tmp_path, "save", configs)
    with Checkpointer(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.steps() == [1, 2, 3, 4, 5]
        for step in checkpoints.steps():
            assert damage(tmp_path / "checkpoints" / str(step), verify=True) is None
            for config in configs:
                found = arrays(restored(checkpoints, config, step))
                assert_same(found, expected(tmp_path, config, step))
    bases = [saved_bases(tmp_path / "checkpoints" / str(step)) for step in range(1, 6)]
    assert [base["stem"].step if base else 0 for base in bases] == [0, 1, 2, 0, 4]
    for process in (0, 1):
        one = Path(shutil.copytree(tmp_path, tmp_path.with_name(f"flipped_{process}")))
        pattern = f"checkpoints/5/table_rows/ocdbt.process_{process}/d/*"
        path = max(one.glob(pattern), key=lambda path: path.stat().st_size)
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        for out in run_pair(one, "look", configs):
            [line] = [line for line in out.splitlines() if "damaged" in line]
            assert line.startswith("checkpoint 5 is damaged (table_rows/ocdbt.process_")
            assert "at 4" in out


def run_pair(folder: Path, name: str, configs) -> list[str]:  # noqa: F811
    with contextlib.ExitStack() as stack:
        both = map(stack.enter_context, pair(*task(name, folder, *configs), devices=4))
        return [finish(process) for process in list(both)]


def _join() -> None:
    jax.distributed.initialize(os.environ["PAIR_ADDRESS"], 2, int(os.environ["PAIR_ID"]))


def _save(folder: str, *configs) -> None:  # noqa: F811
    _join()
    shape = configs[1]
    run = Run(Path(folder), shape, **OPTIONS)
    for number in range(5):
        update(run)
        run.save()
        if number == 1:
            run.start_again()
    run.checkpoints.close()
    wait_for_all("saved", 60)


def _look(folder: str, *configs) -> None:  # noqa: F811
    _join()
    print(*set_aside_damaged(Path(folder) / "checkpoints"), sep="\n")
    run = Run(Path(folder), configs[1], **OPTIONS)
    run.start_again()
    print("at", run.step)
    run.checkpoints.close()
    wait_for_all("looked", 60)


if __name__ == "__main__":
    task_name, where, *texts = sys.argv[1:]
    given = [config_from_json(text) for text in texts]
    if task_name.startswith("killed_"):
        _killed(where, *given, at=int(task_name.removeprefix("killed_")))
    else:
        {"save": _save, "look": _look}[task_name](where, *given)
