"""Which code trains: the commit of a checkout, and another commit's in a worktree of its own."""

import subprocess
from pathlib import Path

from stem_jax.errors import InputError
from stem_jax.processes.code_version import code_version

# The folder that holds the package.
ROOT = Path(__file__).resolve().parents[2]
# What of a checkout decides what a run gives.
_DECIDES = ("stem_jax", "configs")


def commit() -> str:
    """The commit of this checkout; with a digest behind it where files were changed.

    Without a checkout, of an installed package, the digest alone.
    """
    head = _git("rev-parse", "HEAD")
    if head is None or _git("ls-files", "stem_jax/study/code_state.py") != str(
        Path("stem_jax/study/code_state.py")
    ):
        return f"sources-{code_version()}"
    changed = _git("status", "--porcelain", "--", *_DECIDES)
    return f"{head}+{code_version()}" if changed else head


def short(name: str) -> str:
    """A commit as `commit` gives it, for messages."""
    head, plus, digest = name.partition("+")
    return f"{head[:12]}{plus}{digest[:8]}"


def worktree(wanted: str, folder: Path) -> Path:
    """A checkout of a commit in `folder`, which is made where there is none.

    Raises:
        InputError: this package is no git checkout, or it has not that commit.
    """
    if folder.exists():
        there = _git("rev-parse", "HEAD", cwd=folder)
        if _git("status", "--porcelain", "--", *_DECIDES, cwd=folder):
            there = f"{there} with changes"
        if there == wanted:
            return folder
        raise InputError(
            f"{folder} holds commit {there}, the records are of {wanted}; remove that folder"
        )
    done = subprocess.run(
        # --force: one that was removed by hand is still listed.
        ["git", "worktree", "add", "--force", "--detach", str(folder.resolve()), wanted],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["git failed"])[-1]
        raise InputError(
            f"the records are of commit {wanted}, which this checkout cannot bring back ({why}); "
            "clone the repository whole, or train with this code by --mixed-code"
        )
    return folder


def _git(*command: str, cwd: Path | None = None) -> str | None:
    try:
        done = subprocess.run(["git", *command], cwd=cwd or ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
