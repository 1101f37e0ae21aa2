"""The two inputs stay abreast: each record is taken once, in its input's order, and not far ahead of the other."""

from typing import NamedTuple

from hypothesis import given
from hypothesis import strategies as st

from streams.inputs import Inputs


class Record(NamedTuple):
    which: int
    offset: int
    timestamp: int


def records(which: int, *stamps: int, first: int = 0) -> list[Record]:
    return [Record(which, first + n, stamp) for n, stamp in enumerate(stamps)]


def test_what_is_ahead_of_the_other_input_waits_and_is_not_read_on() -> None:
    inputs: Inputs[Record] = Inputs()
    inputs.read(0, records(0, 1, 5, 9), at_end=False)
    inputs.read(1, records(1, 2, 6), at_end=False)
    assert [record.timestamp for record in inputs.take()] == [1, 2, 5, 6]
    assert not inputs.wants(0) and inputs.wants(1)
    assert (inputs.position(0, 3), inputs.position(1, 2)) == (2, 2)
    inputs.read(1, records(1, 8, 12, first=2), at_end=False)
    assert [record.timestamp for record in inputs.take()] == [8, 9]
    assert inputs.wants(0) and not inputs.wants(1)
    assert (inputs.position(0, 3), inputs.position(1, 4)) == (3, 3)


def test_nobody_waits_for_an_input_that_is_read_to_its_end() -> None:
    inputs: Inputs[Record] = Inputs()
    inputs.read(0, records(0, 1, 5, 9), at_end=True)
    inputs.read(1, [], at_end=False)
    assert inputs.take() == []  # the other has not been heard of
    inputs.read(1, [], at_end=True)
    assert [record.timestamp for record in inputs.take()] == [1, 5, 9]
    assert inputs.position(0, 3) == 3


@given(st.lists(st.integers(0, 60)), st.lists(st.integers(0, 60)), st.data())
def test_every_record_is_taken_once_in_the_order_of_its_input(
    first: list[int], second: list[int], data: st.DataObject
) -> None:
    """Timestamps may go back and forth, reads may be of any size, and nothing blocks for ever."""
    logs = (records(0, *first), records(1, *second))
    inputs: Inputs[Record] = Inputs()
    upto, taken = [0, 0], []
    for _ in range(2 * (len(first) + len(second)) + 4):
        for which, log in enumerate(logs):
            if inputs.wants(which):
                more = data.draw(st.integers(1, 5))
                read = log[upto[which] : upto[which] + more]
                upto[which] += len(read)
                inputs.read(which, read, at_end=upto[which] == len(log))
        taken += inputs.take()
        for which in (0, 1):
            left = [record.offset for record in logs[which] if record not in taken]
            assert inputs.position(which, upto[which]) == min([*left, upto[which]])
    for which, log in enumerate(logs):
        assert [record for record in taken if record.which == which] == log


@given(st.lists(st.integers(0, 60)), st.lists(st.integers(0, 60)))
def test_ascending_inputs_are_taken_by_time(first: list[int], second: list[int]) -> None:
    inputs: Inputs[Record] = Inputs()
    for which, stamps in enumerate((first, second)):
        inputs.read(which, records(which, *sorted(stamps)), at_end=True)
    assert [record.timestamp for record in inputs.take()] == sorted(first + second)
