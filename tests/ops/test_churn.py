"""A catalogue that moves: which items leave and return, and what stands on the log afterwards."""

import asyncio
import threading

import pytest

from ops.churn import AWAY, Churn, churn, known, moving
from ops.errors import UserError
from ops.settings import SimulateSettings
from streams.clients import producer
from streams.settings import KafkaSettings
from streams.topics import CATALOGUE

ENTRIES = {f"i{number:02}": f"v{number}".encode() for number in range(50)}


def test_items_leave_and_return_with_their_own_record() -> None:
    catalogue = Churn(ENTRIES, set(), seed=1)
    away: set[str] = set()
    most = 0
    for _ in range(2_000):
        item, value = catalogue.next()
        assert (item in away) == (value is not None)
        if value is None:
            away.add(item)
        else:
            assert value == ENTRIES[item]
            away.remove(item)
        most = max(most, len(away))
    assert most == AWAY * len(ENTRIES)


def test_the_seed_chooses_and_nothing_else() -> None:
    def first(seed: int) -> list[str]:
        catalogue = Churn(dict(reversed(ENTRIES.items())), {"i03", "i01"}, seed)
        return [catalogue.next()[0] for _ in range(50)]

    again = Churn(ENTRIES, {"i01", "i03"}, seed=1)
    assert first(1) == [again.next()[0] for _ in range(50)]
    assert first(1) != first(2)


def test_what_was_away_at_the_end_of_a_run_may_return_in_the_next(made_log: KafkaSettings) -> None:
    client = producer(made_log.bootstrap)
    for item, value in ENTRIES.items():
        client.send(CATALOGUE, value, item.encode(), partition=0)
    for item in ("i04", "i05", "never there"):
        client.send(CATALOGUE, None, item.encode(), partition=0)
    client.send(CATALOGUE, b"new", b"i05", partition=0)
    client.flush()
    assert known(made_log) == (ENTRIES | {"i05": b"new"}, {"i04"})

    over = threading.Event()
    timer = threading.Timer(2.0, over.set)
    timer.start()
    made = churn(made_log, 50.0, 1, over)
    timer.join()
    assert 60 <= made <= 100
    entries, away = known(made_log)
    assert entries == ENTRIES | {"i05": b"new"}
    assert 0 < len(away) <= AWAY * len(ENTRIES)
    client.close()


def test_a_catalogue_at_rest_needs_no_cluster_and_a_moving_one_says_so() -> None:
    async def meanwhile(per_s: float) -> bool:
        ended = asyncio.Event()
        settings = SimulateSettings(churn_per_s=per_s)
        async with moving(KafkaSettings(), settings, ended.set):
            await asyncio.sleep(0)
            if per_s:
                await ended.wait()
        return ended.is_set()

    assert asyncio.run(meanwhile(0.0)) is False
    with pytest.raises(UserError, match=r"kafka\.bootstrap"):
        asyncio.run(meanwhile(1.0))
