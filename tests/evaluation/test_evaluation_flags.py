"""The flags of `evaluate`: those of another measurement are refused, not ignored."""

import pytest

from stem_jax.evaluation.flags import parse


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--niah", "--limit=-3"], "--limit belongs to --tasks or --perplexity or --facts or"),
        (["--facts", "--by-frequency"], "--by-frequency belongs to --perplexity, not to --facts"),
        (["--perplexity=facts", "--lengths=9"], "--lengths belongs to --niah, not to --perplexity"),
        (["--facts", "--max-gen-toks=7"], "--max-gen-toks belongs to --tasks, not to --facts"),
        (["--niah", "--out=z.PNG"], "--out=z.PNG must be the JSON file; the picture is put beside"),
    ],
)
def test_flags_that_do_not_belong_are_refused(capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        parse(["--workdir=x", *flags], None)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_lists_may_have_spaces():
    assert parse(["--workdir=x", "--tasks=a, b ,"], None).tasks == ["a", "b"]
    assert parse(["--workdir=x", "--niah", "--depths=0, 1"], None).depths == [0, 1]
