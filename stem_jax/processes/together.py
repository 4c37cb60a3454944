"""A program that several processes run together, each with the same command.

JAX is imported where they join, as flags are parsed before.
"""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator

from stem_jax.processes.cluster import Gang, membership
from stem_jax.processes.code_version import code_version

# Flags that processes of one command may differ in.
_OWN_FLAGS = {
    *("multihost", "coordinator", "num_processes", "process_index", "init_timeout"),
    *("no_progress", "compilation_cache"),
}


@contextlib.contextmanager
def together(args: argparse.Namespace) -> Iterator[bool]:
    """Joins the other processes of `cluster.add_flags`; the value says whether this one is first.

    The first one speaks and writes for all. What is refused in one of them is refused in all, and
    none goes on while another is not done.

    Raises:
        InputError: a refusal, or processes that were given different commands or code.
    """
    killed_by_sigterm()
    with membership(Gang.from_flags(args), "start all processes again"):
        from stem_jax.processes.agreement import PREPARING_SECONDS, check_same, is_first, unanimous

        with unanimous(PREPARING_SECONDS, tell_failures=True):
            if args.multihost:
                # What JAX says when it first meets the others would stand before a program's JSON.
                with stdout_kept():
                    check_same(facts_of(args))
            yield is_first()


def killed_by_sigterm() -> None:
    """Leaves SIGTERM as it is; JAX would have several processes of a program go on in spite of it.

    A training has its own way, see `stop_signal`.
    """
    import jax

    jax.config.update("jax_enable_preemption_service", False)


@contextlib.contextmanager
def stdout_kept() -> Iterator[None]:
    """Whatever is written to stdout meanwhile goes to stderr, also what libraries in C++ write."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def facts_of(args: argparse.Namespace) -> dict[str, str]:
    """What must be the same in all processes: their flags and their code."""
    import jax

    facts = {"the version of stem_jax": code_version(), "the version of jax": jax.__version__}
    for name, value in vars(args).items():
        if name not in _OWN_FLAGS:
            facts["--" + name.replace("_", "-")] = json.dumps(value, default=str)
    return facts
