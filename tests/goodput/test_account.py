"""Parts of the main thread's time: they exclude each other and leave nothing out."""

import pytest

from stem_jax.goodput.account import (
    COMPUTING,
    DATA,
    END,
    OTHER,
    PARTS,
    RESTART,
    ROWS,
    SAVE,
    START,
    VALIDATION,
    Account,
)


class Clock:
    """Moves by hand."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


def spent(account: Account) -> dict[str, float]:
    """Parts that are not 0."""
    seconds, parts = account.read()
    assert parts.keys() == set(PARTS)
    assert sum(parts.values()) == pytest.approx(seconds)
    return {name: value for name, value in parts.items() if value}


def test_time_counts_for_the_innermost_part(clock):
    account = Account(90.0, START, clock)
    account.started()
    clock.now += 1
    with account.part(SAVE):
        clock.now += 2
        with account.part(DATA):
            clock.now += 4
            assert account.current == DATA
        clock.now += 8
    clock.now += 16
    account.ending()
    clock.now += 32
    assert spent(account) == {START: 10, OTHER: 17, SAVE: 10, DATA: 4, END: 32}
    assert account.read()[0] == 73


def test_a_start_and_a_validation_keep_their_waits(clock):
    account = Account(100.0, RESTART, clock)
    for name in (COMPUTING, ROWS):
        with account.part(name):
            clock.now += 1
    with account.part(VALIDATION), account.part(DATA):
        clock.now += 2
    with account.part(COMPUTING):
        clock.now += 4
        # The first step is awaited inside.
        account.started()
        clock.now += 8
    with account.part(VALIDATION):
        with account.part(COMPUTING):
            clock.now += 16
        with account.part(SAVE):
            clock.now += 32
        with account.part(account.starting), account.part(DATA):
            clock.now += 64
    expected = {RESTART: 6 + 64, VALIDATION: 18, COMPUTING: 8, SAVE: 32}
    assert spent(account) == expected


def test_an_error_leaves_its_part(clock):
    account = Account(None, START, clock)
    account.started()
    with pytest.raises(KeyError), account.part(DATA):
        clock.now += 1
        raise KeyError
    clock.now += 2
    assert spent(account) == {DATA: 1, OTHER: 2}
