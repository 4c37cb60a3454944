"""Which code runs, where no commit tells."""

import hashlib
from pathlib import Path


def code_version() -> str:
    """A digest of this package's sources."""
    digest, root = hashlib.sha256(), Path(__file__).parents[1]
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]
