"""Every sample offset stands in exactly one range of the journals, with its disposition."""

from hypothesis import given, settings
from hypothesis import strategies as st

from learner.journal import Journal, Polled
from streams.events import Sample
from streams.weights import StepEntry
from tests.learner.makers import NOW_MS, Shown, sample

KINDS = ("trained", "control", "without_target")


def made(kind: str, number: int) -> Sample:
    targets = {"trained": (1, False), "control": (1, True), "without_target": (0, False)}
    advantage, supervised = targets[kind]
    return sample(
        f"r{number}",
        [Shown((0, 0, 0)), Shown((0, 0, 1), advantage, supervised)],
        0,
        arm="control" if kind == "control" else "learning",
        watermark_ms=NOW_MS + number,
    )


@st.composite
def polls(draw: st.DrawFn) -> list[Polled]:
    """Samples of three partitions, interleaved, with gaps where transaction markers stand."""
    next_offset = {partition: draw(st.integers(0, 5)) for partition in range(3)}
    stream = []
    for number in range(draw(st.integers(1, 60))):
        partition = draw(st.integers(0, 2))
        offset = next_offset[partition] + draw(st.integers(0, 2))
        next_offset[partition] = offset + 1
        kind = draw(st.sampled_from((*KINDS, "unreadable")))
        sample = made(kind, number) if kind in KINDS else None
        stream.append(Polled(partition, offset, sample))
    return stream


def kind_of(polled: Polled) -> str:
    if polled.sample is None:
        return "without_target"
    if polled.sample.arm == "control":
        return "control"
    return "trained" if polled.sample.items[1].advantage else "without_target"


@settings(max_examples=60)
@given(polls(), st.integers(1, 7), st.lists(st.integers(1, 20), min_size=1), st.data())
def test_every_offset_stands_in_exactly_one_range_with_its_disposition(
    stream: list[Polled], batch: int, chunks: list[int], data: st.DataObject
) -> None:
    journal = Journal({})
    entries: list[StepEntry] = []
    chosen: list[Sample] = []
    left = list(stream)
    while left or journal.waiting:
        size = chunks[len(entries) % len(chunks)]
        for polled in left[:size]:
            journal.add(polled)
        left = left[size:]
        if journal.waiting and (not left or data.draw(st.booleans())):
            before = journal.waiting
            chosen += journal.cut(batch)
            entries += journal.take_entries()
            assert journal.waiting < before
    assert journal.trainable == 0
    place = dict.fromkeys(range(3), 0)
    seen: list[list[Polled]] = []
    for entry in entries:
        inside = []
        for partition, first, upto in entry.ranges:
            assert first == place[partition], "a range does not begin where the one before ended"
            assert upto > first
            place[partition] = upto
            inside += [p for p in stream if p.partition == partition and first <= p.offset < upto]
        seen.append(inside)
        for kind in KINDS:
            assert getattr(entry, kind) == sum(kind_of(polled) == kind for polled in inside)
        read = sum(polled.sample is not None for polled in inside)
        assert read - entry.control <= batch
    assert sum(len(inside) for inside in seen) == len(stream)
    assert chosen == [one.sample for inside in seen for one in inside if kind_of(one) == "trained"]
    assert journal.offsets == {
        partition: max(p.offset for p in stream if p.partition == partition) + 1
        for partition in {polled.partition for polled in stream}
    }


def test_what_was_not_taken_stands_behind_the_offsets() -> None:
    """A learner that begins anew at the offsets of a journal meets exactly what was left."""
    stream = [Polled(n % 2, n // 2, made(KINDS[n % 3], n)) for n in range(40)]
    journal = Journal({})
    for polled in stream:
        journal.add(polled)
    first = journal.cut(6) + journal.cut(6)
    resumed = Journal(journal.offsets)
    for polled in stream:
        if polled.offset >= resumed.offsets[polled.partition]:
            resumed.add(polled)
    assert resumed.waiting == journal.waiting
    rest = resumed.cut(100)
    trained = [
        polled.sample.request for polled in stream if polled.sample and kind_of(polled) == "trained"
    ]
    assert sorted(sample.request for sample in first + rest) == sorted(trained)
    for partition in range(2):
        ranges = [
            (begin, upto)
            for entry in journal.entries + resumed.entries
            for number, begin, upto in entry.ranges
            if number == partition
        ]
        assert [begin for begin, _ in ranges] == [0, *(upto for _, upto in ranges[:-1])]
        assert ranges[-1][1] == 20


def test_a_step_does_not_depend_on_the_order_in_which_partitions_were_read() -> None:
    stream = [Polled(n % 3, n // 3, made("trained", n)) for n in range(12)]
    by_turns, one_by_one = Journal({}), Journal({})
    for polled in stream:
        by_turns.add(polled)
    for polled in sorted(stream, key=lambda polled: -polled.partition):
        one_by_one.add(polled)
    assert by_turns.cut(12) == one_by_one.cut(12)
    assert by_turns.entries == one_by_one.entries


def test_what_turned_out_to_be_of_no_use_is_accounted_for_as_without_target() -> None:
    journal = Journal({})
    for number in range(3):
        journal.add(Polled(0, number, made("trained", number)))
    assert len(journal.cut_polled(3)) == 3
    journal.set_aside(2)
    assert (journal.entries[0].trained, journal.entries[0].without_target) == (1, 2)


def test_a_step_holds_at_most_a_batch_of_the_learning_arm() -> None:
    journal = Journal({})
    for number in range(10):
        journal.add(Polled(0, 2 * number, made("control", number)))
        journal.add(Polled(0, 2 * number + 1, made("trained", number)))
    assert journal.trainable == 10
    assert len(journal.cut(4)) == 4
    assert journal.trainable == 6
    assert journal.offsets == {0: 8}
    assert journal.entries[0].control == 4


def test_the_control_arm_alone_is_accounted_for_and_trains_nothing() -> None:
    journal = Journal({0: 7})
    for number in range(3):
        journal.add(Polled(0, 7 + number, made("control", number)))
    assert journal.trainable == 0
    assert journal.cut(64) == []
    assert journal.entries == [
        StepEntry(ranges=[(0, 7, 10)], trained=0, control=3, without_target=0)
    ]


def test_an_arm_of_another_name_does_not_train() -> None:
    journal = Journal({})
    other = made("trained", 0)
    other.arm = "experiment"
    journal.add(Polled(0, 0, other))
    assert journal.cut(64) == []


def test_a_dislike_alone_or_a_supervised_slot_alone_is_a_target() -> None:
    journal = Journal({})
    disliked = sample("d", [Shown((0, 0, 0), -1)], 0)
    imitated = sample("s", [Shown((0, 0, 0), 0, True)], 0)
    journal.add(Polled(0, 0, disliked))
    journal.add(Polled(0, 1, imitated))
    assert journal.cut(64) == [disliked, imitated]


def test_the_watermark_is_that_of_what_was_taken() -> None:
    journal = Journal({})
    for number in (3, 9, 5):
        journal.add(Polled(0, number, made("trained", number)))
    journal.cut(1)
    assert journal.watermark_ms == NOW_MS + 3
    journal.cut(2)
    assert journal.watermark_ms == NOW_MS + 9


def test_entries_are_handed_out_once() -> None:
    journal = Journal({})
    journal.add(Polled(0, 0, made("trained", 0)))
    journal.cut(1)
    assert len(journal.take_entries()) == 1
    assert journal.take_entries() == []
