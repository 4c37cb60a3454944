import pytest

from stem_jax.study.flags import parse

_ASKED = ["--config=configs/study/core.py", "--workdir=runs/study"]


def test_places_and_phases():
    args = parse([*_ASKED, "--phases=rate, main"], "")
    assert args.texts == args.workdir / "texts" and args.phases == ["rate", "main"]
    assert args.minutes is None


@pytest.mark.parametrize(
    "flag, said",
    [
        ("--workers=0", "--workers must be at least 1"),
        ("--threads=-1", "--threads at least 0"),
        ("--minutes=0", "--minutes=0 must be more than 0"),
        ("--minutes=nan", "--minutes=nan must be more than 0"),
    ],
)
def test_flags_are_refused(capsys, flag, said):
    with pytest.raises(SystemExit, match="2"):
        parse([*_ASKED, flag], "")
    assert said in capsys.readouterr().err
