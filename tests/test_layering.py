"""The shape of the code: imports point one way, files stay short, importing has no effects."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from stem_jax.interop import hf_export

ROOT = Path(__file__).parent.parent
PACKAGE = "stem_jax"
# From the bottom up; a module imports from its own level and those below. Inside a level no cycles.
LEVELS = [
    [
        "errors",
        "background",
        "bucket",
        "bucket_errors",
        "bucket_lock",
        "bucket_reach",
        "local_copy",
        "bucket_files",
        "byte_order_mark",
        "files",
        "hub",
        "json_fields",
        "lock",
        "outgoing",
        "staging",
        "storage",
        "swapped_names",
        "unfinished",
        "compilation_cache",
        "cuda_plugin",
        "jax_start",
        "kept_memory",
        "lora_targets",
        "config_keys",
        "config_memories",
        "config",
        "layer_patterns",
        "config_file",
        "config_program",
        "config_checks",
        "cli",
        "prometheus",
        "goodput",
        "standing",
        "elastic_mesh",
        "hardware",
        "compiler_options",
        "parts",
        "processes",
        "work_folder",
    ],
    ["mesh", "context_order"],
    ["kernels"],
    ["data"],
    ["tables"],
    ["memory"],
    ["model"],
    ["training"],
    ["checkpoints"],
    ["generation"],
    ["serving"],
    [
        "result_folder",
        "interop",
        "planning",
        "editing",
        "analysis",
        "evaluation",
        "run_checks",
        "run_saves",
        "run",
    ],
    ["study"],
]
# The programs: one per thing a user does, imported by nobody.
ENTRY_POINTS = ["train", "generate", "edit", "analyze", "evaluate", "export", "import_torch"]
ENTRY_POINTS += ["prepare", "plan", "serve", "status"]
# The console scripts, which import a program when it is called.
SCRIPTS = ["scripts"]
LEVEL = {
    name: level for level, names in enumerate([*LEVELS, ENTRY_POINTS, SCRIPTS]) for name in names
}
# Tighter than the levels: the data pipeline runs without JAX, in worker processes.
ONLY = {
    "data": {
        "data",
        "byte_order_mark",
        "files",
        "hub",
        "json_fields",
        "lock",
        "outgoing",
        "bucket",
        "staging",
        "storage",
        "unfinished",
        "errors",
    },
    "byte_order_mark": set(),
    "files": {"byte_order_mark", "errors", "swapped_names", "unfinished"},
    "swapped_names": set(),
    "hub": {"errors"},
    "json_fields": {"errors"},
    "lock": set(),
    "prometheus": set(),
    "goodput": {"goodput", "errors", "prometheus"},
    # It answers at once: without JAX.
    "standing": {
        "standing",
        "bucket",
        "bucket_lock",
        "bucket_reach",
        "errors",
        "files",
        "goodput",
        "local_copy",
        "lock",
        "storage",
    },
    "storage": {"errors"},
    "unfinished": {"errors", "lock"},
    "errors": set(),
    "hardware": set(),
    "parts": set(),
}
FILES = sorted((ROOT / PACKAGE).rglob("*.py"))


# Copied into exports, where they stand alone with transformers; importing that has effects.
CODE_FILES = {*hf_export.CODE_FILES}.union(*(code.files for code in hf_export.CODES.values()))
CODE_OF_EXPORTS = {f"interop.{name.removesuffix('.py')}" for name in CODE_FILES}


def _module(path: Path) -> str:
    """Dotted name inside the package; "" for the package itself."""
    parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {_module(path): path for path in FILES}


def _statements(tree: ast.AST):
    """All nodes but those under `if typing.TYPE_CHECKING`, which never run."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from _statements(node)


def _imported_names(path: Path) -> set[str]:
    names = set()
    for node in _statements(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module
            if path.name in CODE_FILES and node.level == 1:
                module = f"{PACKAGE}.interop.{module}"
            else:
                assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return names


def _imports(path: Path) -> set[str]:
    """Modules of this package that a file imports, wherever in it."""
    own = {name.removeprefix(f"{PACKAGE}.") for name in _imported_names(path) if PACKAGE in name}
    return {name for name in own if name in MODULES and name}


def _top(module: str) -> str:
    return module.partition(".")[0]


def test_every_module_has_a_place():
    assert [module for module in MODULES if module and _top(module) not in LEVEL] == []


@pytest.mark.parametrize("module", [module for module in MODULES if module])
def test_imports_point_down(module):
    for imported in _imports(MODULES[module]):
        place, other = _top(module), _top(imported)
        assert LEVEL[other] <= LEVEL[place], f"{module} imports {imported}, which is above it"
        assert other not in ENTRY_POINTS or place == other, f"{module} imports a program"
        assert other in ONLY.get(place, {other}), f"{module} may not import {imported}"


def test_no_import_cycles():
    # A package's __init__ runs with its modules; none of ours imports anything.
    reached, path = set(), []

    def visit(module):
        assert module not in path, f"import cycle: {' -> '.join([*path, module])}"
        if module not in reached:
            path.append(module)
            for imported in _imports(MODULES[module]):
                visit(imported)
            reached.add(path.pop())

    for module in MODULES:
        visit(module)


def test_code_of_exports_imports_nothing_else_of_ours():
    assert set(MODULES) >= CODE_OF_EXPORTS
    for module in CODE_OF_EXPORTS:
        assert _imports(MODULES[module]) <= CODE_OF_EXPORTS


@pytest.mark.parametrize("module", [module for module in MODULES if _top(module) == "data"])
def test_data_runs_without_jax(module):
    assert not {name.partition(".")[0] for name in _imported_names(MODULES[module])} & {
        "jax",
        "flax",
        "optax",
        "orbax",
    }


def test_no_file_over_400_lines():
    long = {
        str(path.relative_to(ROOT)): lines
        for folder in (PACKAGE, "configs", "tests")
        for path in (ROOT / folder).rglob("*.py")
        if (lines := len(path.read_text().splitlines())) > 400
    }
    assert long == {}


@pytest.mark.parametrize("name", [name for name in ENTRY_POINTS if name in MODULES])
def test_entry_points_are_short(name):
    assert len(MODULES[name].read_text().splitlines()) <= 60


_IMPORT_ALL = """
import importlib, sys
import jax, flax.nnx, optax, orbax.checkpoint

before = dict(jax.config.values)
for name in sys.argv[2:]:
    importlib.import_module(name)
after = dict(jax.config.values)
changed = [key for key in before if before[key] != after[key]]
assert not changed, f"importing changed jax.config: {changed}"
print("imported", len(sys.argv) - 2)
"""


def test_importing_has_no_effects(tmp_path):
    """No backend, no files, no flags parsed, no output, no jax.config."""
    names = [
        f"{PACKAGE}.{module}" if module else PACKAGE
        for module in MODULES
        if module not in CODE_OF_EXPORTS
    ]
    environment = {
        **os.environ,
        # No such platform: whoever creates a backend gets an error.
        "JAX_PLATFORMS": "none_such",
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
        "TMPDIR": str(tmp_path),
    }
    done = subprocess.run(
        # A program that parsed its flags on import would refuse this one.
        [sys.executable, "-c", _IMPORT_ALL, "--no-such-flag", *names],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode, done.stdout) == (0, f"imported {len(names)}\n"), done.stderr
    assert list(tmp_path.iterdir()) == []
