"""A server under clients that ask, leave and send nonsense, as `benchmarks.server_load` has it."""

import pytest

from benchmarks.server_load import measure


@pytest.mark.long
def test_no_token_is_wrong_and_nothing_compiles(capsys):
    found = measure(clients=16, seconds=10.0, slots=4, number=24)
    assert found["wrong"] == 0, capsys.readouterr().out
    assert found["compiled_later"] == 0
    # All four kinds of clients have been there.
    assert all(found[kind] > 0 for kind in ("whole", "stream", "leave", "nonsense"))
