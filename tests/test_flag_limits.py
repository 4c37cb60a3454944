"""Flags that would be ignored, or end in a traceback, are wrong usage: before JAX is imported."""

import pytest

from stem_jax import analyze, edit, export
from stem_jax.errors import InputError

EXPORT = ["--workdir=x", "--out=y"]


@pytest.mark.parametrize(
    ("main", "flags", "message"),
    [
        (export.main, [*EXPORT, "--format=hf", "--file-gib=nan"], "--file-gib=nan must be more"),
        (export.main, [*EXPORT, "--format=hf", "--file-gib=inf"], "--file-gib=inf must be more"),
        (export.main, [*EXPORT, "--format=hf", "--file-gib=-1"], "--file-gib=-1.0 must be more"),
        (
            export.main,
            [*EXPORT, "--format=official", "--file-gib=2"],
            "--file-gib=2.0 is for --format=hf",
        ),
        (analyze.main, ["--workdir=x", "--dense-step=3"], "--dense-step=3 needs --dense-workdir"),
        (edit.main, ["--workdir=x", "--swap=a=>b", "--top=-1"], "--top=-1 must be 0 or more"),
    ],
)
def test_wrong_usage(main, flags, message, capsys):
    with pytest.raises(SystemExit) as left:
        main(flags)
    assert left.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--seed=-1", "--rows=1", "--tokens=0", "--tokens=-5"])
def test_an_analysis_refuses_its_numbers_before_the_work(flag):
    # No run is there to be read: the numbers come first.
    with pytest.raises(InputError, match=f"{flag} must be"):
        analyze.main(["--workdir=x", flag])
