import shutil
import subprocess

import pytest

from stem_jax.errors import InputError
from stem_jax.study import code_state


def _git(folder, *command):
    named = ("-c", "user.name=x", "-c", "user.email=x@x")
    subprocess.run(["git", *named, *command], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    folder = tmp_path / "checkout"
    (folder / "stem_jax" / "study").mkdir(parents=True)
    (folder / "stem_jax" / "study" / "code_state.py").touch()
    _git(folder, "init", "-q")
    _git(folder, "add", ".")
    _git(folder, "commit", "-qm", "one")
    monkeypatch.setattr(code_state, "ROOT", folder)
    return folder


def test_changed_code_is_not_its_commit(checkout):
    clean = code_state.commit()
    assert len(clean) == 40
    (checkout / "README.md").write_text("no code")
    assert code_state.commit() == clean
    (checkout / "stem_jax" / "more.py").touch()
    assert code_state.commit().startswith(f"{clean}+")


def test_a_package_without_its_repository(checkout):
    _git(checkout, "rm", "-q", "--cached", "-r", "stem_jax")
    assert code_state.commit().startswith("sources-")
    shutil.rmtree(checkout / ".git")
    assert code_state.commit().startswith("sources-")


def test_another_commit_in_a_worktree(checkout, tmp_path):
    first, folder = code_state.commit(), tmp_path / "work" / "code"
    (checkout / "stem_jax" / "more.py").touch()
    _git(checkout, "add", ".")
    _git(checkout, "commit", "-qm", "two")
    assert code_state.worktree(first, folder) == folder
    assert not (folder / "stem_jax" / "more.py").exists()
    assert code_state.worktree(first, folder) == folder
    # Removed by hand, as a message asks.
    shutil.rmtree(folder)
    code_state.worktree(first, folder)
    with pytest.raises(InputError, match=f"holds commit {first}, the records are of"):
        code_state.worktree(code_state.commit(), folder)
    (folder / "stem_jax" / "mine.py").touch()
    with pytest.raises(
        InputError, match=r"with changes, the records are of .*; remove that folder"
    ):
        code_state.worktree(first, folder)


def test_a_commit_that_is_not_there(checkout, tmp_path):
    with pytest.raises(InputError, match=r"cannot bring back .*--mixed-code"):
        code_state.worktree("f" * 40, tmp_path / "code")
