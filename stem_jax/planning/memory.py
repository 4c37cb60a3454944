"""Bytes of a device's memory that a compiled program takes, also one that its compiler refused."""

import dataclasses
import re

import jax

from stem_jax.planning.program import Program

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
SIZE = r"([\d.]+)([KMGT]?)"
# Two checks refuse in their own words. This one calls "temporaries" what has the arguments in it.
_TEMPORARIES = re.compile(rf"memory required for HLO temporaries \({SIZE}i?B?\)")
_PROGRAM = re.compile(rf"Program hbm requirement {SIZE}")
# The compiler's account of one memory space: all that it allocates there, arguments included.
_ACCOUNT = re.compile(r"^Memory Space: default .*\nTotal bytes: (\d+)", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one chip, by kind. outputs: those that do not take over an argument's memory.
    workspace: what the largest call of a library takes for itself, beside the temporaries.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int
    host: int
    workspace: int = 0

    @property
    def total(self) -> int:
        """Everything that must fit at once."""
        return self.arguments + self.outputs + self.temporaries + self.code + self.workspace


def memory_of(compiled: jax.stages.Compiled, report: str) -> Memory:
    """By kind, from the executable, and from the compiler's report where there is one."""
    stats = compiled.memory_analysis()
    assert stats is not None, "this backend has no account of memory"
    outputs = stats.output_size_in_bytes - stats.alias_size_in_bytes
    account = _ACCOUNT.search(report)
    # Where a program has loops, libtpu's statistics count some temporaries twice: a program that
    # by them is over the limit compiles. The report has what is compared with the limit.
    temporaries = (
        int(account.group(1)) - stats.argument_size_in_bytes - outputs
        if account
        else stats.temp_size_in_bytes
    )
    return Memory(
        arguments=stats.argument_size_in_bytes,
        outputs=outputs,
        aliased=stats.alias_size_in_bytes,
        temporaries=temporaries,
        code=stats.generated_code_size_in_bytes,
        host=stats.host_argument_size_in_bytes + stats.host_temp_size_in_bytes,
    )


def refused_memory(message: str, program: Program) -> Memory:
    """What the compiler said it needs: everything, or the program without its arguments."""
    arguments = program.argument_bytes
    everything, alone = _TEMPORARIES.search(message), _PROGRAM.search(message)
    if everything:
        temporaries = max(0, size_of(*everything.groups()) - arguments)
    else:
        temporaries = size_of(*alone.groups()) if alone else 0
    return Memory(arguments, 0, 0, temporaries, 0, 0)


def size_of(number: str, unit: str) -> int:
    """Bytes that a compiler writes as in 2.81G."""
    return int(float(number) * _UNITS[unit])
