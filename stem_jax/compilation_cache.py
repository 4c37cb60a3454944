"""Compiled programs are kept between starts, in a folder of the user, where that is of use.

On CPUs an entry holds machine code, so a folder is for one jaxlib, one platform and one set of CPU
features. On some machines an entry that was just written does not load (jax#38445): every start
would compile all the same, and complain about it. A new folder is therefore tried out once.
"""

import hashlib
import importlib.metadata
import os
import platform
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

# Of all folders together.
MAX_BYTES = 2 << 30
# What is compiled faster is as fast to compile as to load.
_MIN_SECONDS = 0.1
_WORKS, _USELESS = "loads", "does-not-load"
_PROBE_SECONDS = 60
# Writes one entry and reads it again, as another process would.
_PROBE = """
import sys, jax, jax.numpy as jnp
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name))
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
for _ in range(2):
    jax.jit(lambda x: jnp.tanh(x @ x).sum())(jnp.ones((64, 64))).block_until_ready()
    jax.clear_caches()
sys.exit(0 if "/jax/compilation_cache/cache_hits" in hits else 1)
"""


def keep_programs(enabled: bool = True, folder: Path | None = None) -> None:
    """Tells JAX where compiled programs are kept, unless its own variables say so.

    Args:
        enabled: False to compile anew and keep nothing.
        folder: of the user's choice; None: one in the user's cache folder, if it can be written and
            what is written there loads.
    """
    import jax

    if folder is not None and enabled:
        _use(folder)
    elif not enabled:
        jax.config.update("jax_enable_compilation_cache", False)
    elif (
        jax.config.values["jax_enable_compilation_cache"]
        and "JAX_COMPILATION_CACHE_DIR" not in os.environ
    ):
        folder = _user_folder()
        if folder is not None:
            _use(folder)
            _shrink(folder.parent)


def _use(folder: Path) -> None:
    import jax

    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _MIN_SECONDS)
    # An entry that is lost, or cut off by a full disk, costs a compilation and no word.
    for verb in ("reading", "writing"):
        warnings.filterwarnings("ignore", f"Error {verb} persistent compilation cache", UserWarning)


def _user_folder() -> Path | None:
    """The folder of this jaxlib and machine; None where keeping programs is of no use."""
    folder = cache_home() / "stem_jax" / "programs" / _machine()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            return None
        if (folder / _USELESS).exists():
            return None
        if not (folder / _WORKS).exists():
            loads = _loads(folder)
            if loads is not None:
                (folder / (_WORKS if loads else _USELESS)).touch()
            return folder if loads else None
    except OSError:
        return None
    return folder


def cache_home() -> Path:
    """The user's folder for what can be made again."""
    given = os.environ.get("XDG_CACHE_HOME")
    return Path(given) if given else Path(os.path.expanduser("~")) / ".cache"


def _machine() -> str:
    """Names what machine code depends on: jaxlib, platform, CPU features."""
    features = {platform.machine(), platform.processor(), platform.system()}
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    features |= {line for line in lines if line.startswith(("flags", "Features", "model name"))}
    digest = hashlib.sha256("\n".join(sorted(features)).encode()).hexdigest()[:12]
    where = f"{platform.system()}-{platform.machine()}".lower()
    return f"jaxlib-{importlib.metadata.version('jaxlib')}-{where}-{digest}"


def _loads(folder: Path) -> bool | None:
    """Whether an entry that was just written loads; tried on the CPU, as accelerators do load.

    None where it took too long to tell, as on a machine that is busy: the next start tries again.
    """
    probe = folder / f"probe-{os.getpid()}"
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",
        "JAX_ENABLE_COMPILATION_CACHE": "true",
    }
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROBE, str(probe)],
            env=environment,
            capture_output=True,
            timeout=_PROBE_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return None
    finally:
        for path in _files(probe):
            path.unlink(missing_ok=True)
        if probe.is_dir():
            probe.rmdir()
    return done.returncode == 0


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())


def _shrink(folder: Path) -> None:
    """Removes what was not used for longest, until `MAX_BYTES` are left."""
    found = []
    for path in _files(folder):
        try:
            status = path.stat()
        # Another program may be doing the same.
        except OSError:
            continue
        found.append((max(status.st_atime, status.st_mtime), status.st_size, path))
    excess = sum(size for _, size, _ in found) - MAX_BYTES
    for _, size, path in sorted(found):
        if excess <= 0:
            return
        path.unlink(missing_ok=True)
        excess -= size
