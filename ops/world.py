"""The simulated world `easy`: items, people with hidden tastes, what each would make of each item.

Notable choices (numbers and reasons: docs/simulator.md)
- The laws of affinity, satisfaction, duration and dwell are those under which a tiny policy was
  seen to learn; a harder world failed first. So the *size* of a lift measured here is a property of
  this choice.
- Every random number of a play is a hash of (seed, person, visit, item): twins who are shown the
  same item at the same visit, each in an arm of their own, have the same play, and no generator
  carries state between plays.
- Visits of the log that precedes the simulation are numbered -n .. -1; live visits start at 0.

Legend: I items, P people, D dimensions of a taste (16). Persons are indices 0 .. P-1, items are id
strings.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Counters = NDArray[np.uint64]

DIMENSIONS: Final = 16
TOPICS: Final = 20
COLD_SHARE: Final = 0.1
"""People without any log before the simulation."""
ORACLE_ITEMS: Final = 100
LOG_NO_REPEAT: Final = 128
"""The log's policy does not show a person's last 128 items again, as the contract asks of ours."""
MAX_SUFFIX: Final = 100_000

_GOLDEN: Final = 0x9E3779B97F4A7C15
_MASK: Final = (1 << 64) - 1
_PLAY, _VIEWER = 1, 2
_DRAWS: Final = 8


class Play(NamedTuple):
    """What one person makes of one item at one visit, were it watched without outer disturbance."""

    dwell_ms: int
    satisfaction: float
    like: bool
    follow: bool
    comment: bool
    forward: bool
    dislike: bool


class LogVisit(NamedTuple):
    """One slate of the log before the simulation, every slot of it watched, oldest slot first."""

    visit: int
    time_ms: int
    items: list[str]
    plays: list[Play]
    ends_ms: list[int]


@dataclass(frozen=True, eq=False)
class World:
    """The truth that no policy sees, apart from ids, tags, durations and noisy embeddings."""

    seed: int
    item_ids: list[str]
    tags: list[str]
    """Name of each item's topic."""
    duration_ms: NDArray[np.int64]
    """[I], 3,000 to 300,000."""
    embeddings: NDArray[np.float32]
    """[I, D], a noisy view of the items' latent place, for semantic IDs."""
    popularity: Floats
    """[I], sums to 1; the log's policy draws from it."""
    person_ids: list[str]
    dwell_factor: Floats
    """[P], how long this person stays with anything."""
    cold: NDArray[np.bool_]
    """[P], True = no log before the simulation."""
    permutation: NDArray[np.int64]
    """[P], nobody stays in place: `permutation[p]` judges p's slates in the permuted score."""
    satisfactions: NDArray[np.float32]
    """[P, I], true satisfaction in (0, 1)."""
    index: dict[str, int] = field(repr=False)
    """Place of an item id."""

    @classmethod
    def easy(cls, seed: int, items: int = 3000, people: int = 1500) -> "World":
        """Build the world that `seed` names; under a second and 20 MB at the defaults."""
        rng = np.random.default_rng(seed)
        noise = 1 / np.sqrt(DIMENSIONS)
        topics = _normalised(rng.normal(size=(TOPICS, DIMENSIONS)))
        topic = rng.integers(TOPICS, size=items)
        v_ID = _normalised(topics[topic] + 0.6 * noise * rng.normal(size=(items, DIMENSIONS)))
        liked = rng.random((people, TOPICS)).argsort(axis=1)[:, :3]
        share = rng.dirichlet([0.5] * 3, size=people)
        t_PD = np.einsum("pk,pkd->pd", share, topics[liked])
        t_PD = _normalised(t_PD + 0.3 * noise * rng.normal(size=(people, DIMENSIONS)))
        quality = 0.5 * rng.normal(size=items)
        score_PI = 1.6 * (4 * (t_PD @ v_ID.T - 0.5) + 0.7 * quality)
        length = 0.5 * rng.normal(size=TOPICS)[topic] + 0.65 * rng.normal(size=items)
        rank = np.argsort(
            np.argsort(-(0.3 * quality / 0.5 + np.sqrt(1 - 0.3**2) * rng.normal(size=items)))
        )
        weight = (1.0 + rank) ** -0.8
        circle = rng.permutation(people)
        permutation = np.empty(people, dtype=np.int64)
        permutation[circle] = np.roll(circle, 1)
        cold = np.zeros(people, dtype=np.bool_)
        cold[rng.permutation(people)[: round(COLD_SHARE * people)]] = True
        item_ids = _ids("i", items)
        return cls(
            seed=seed,
            item_ids=item_ids,
            tags=[f"topic{k:02d}" for k in topic],
            duration_ms=(1000 * np.clip(40 * np.exp(length), 3, 300)).astype(np.int64),
            embeddings=(v_ID + 0.25 * noise * rng.normal(size=v_ID.shape)).astype(np.float32),
            popularity=weight / weight.sum(),
            person_ids=_ids("p", people),
            dwell_factor=np.exp(0.35 * rng.normal(size=people)),
            cold=cold,
            permutation=permutation,
            satisfactions=(1 / (1 + np.exp(-score_PI))).astype(np.float32),
            index={item: at for at, item in enumerate(item_ids)},
        )

    def satisfaction(self, person: int) -> NDArray[np.float32]:
        """True satisfaction of one person with every item, [I]."""
        row: NDArray[np.float32] = self.satisfactions[person]
        return row

    def permuted_satisfaction(self, person: int, items: Sequence[str]) -> Floats:
        """What the stand-in under the fixed permutation would make of these items, [len(items)]."""
        row = self.satisfactions[self.permutation[person]]
        scores: Floats = row[self._places(items)].astype(np.float64)
        return scores

    def oracle(self, person: int, shown: Collection[str]) -> float:
        """Mean true satisfaction of the 100 best items not in `shown`; 0 if none is left."""
        row = self.satisfactions[person]
        if shown:
            row = np.delete(row, self._places(shown))
        if len(row) > ORACLE_ITEMS:
            row = np.partition(row, -ORACLE_ITEMS)[-ORACLE_ITEMS:]
        return float(row.mean()) if len(row) else 0.0

    def play(self, person: int, visit: int, item: str) -> Play:
        """This person's play of one item at this visit; the same whenever asked."""
        return self.plays(person, visit, [item])[0]

    def plays(self, person: int, visit: int, items: Sequence[str]) -> list[Play]:
        """The plays of a slate, independent of each other; KeyError for an unknown item."""
        return self._plays(np.array([person]), np.array([visit]), self._places(items))

    def uniforms(self, person: int, visit: int, rows: int, draws: int) -> Floats:
        """Numbers in (0, 1), [rows, draws], for what a viewer does around the plays."""
        key = self._key(_VIEWER, np.array([person]), np.array([visit]))
        return _uniforms(key + np.arange(rows, dtype=np.uint64) * np.uint64(_GOLDEN), draws)

    def mediocre_log(
        self, rng: np.random.Generator, visits: int, end_ms: int, span_s: float, slate: int = 6
    ) -> dict[int, list[LogVisit]]:
        """The log of a mediocre policy (.7 popularity + .3 uniform) for everybody who is not cold.

        Each has `visits` slates in chronological order, randomly spread over the `span_s` seconds
        before `end_ms` (ms since epoch), in world time: plays follow each other a second apart and
        have all ended by `end_ms`. Raises ValueError if the plays do not fit into the span.
        """
        law = np.cumsum(0.7 * self.popularity + 0.3 / len(self.item_ids))
        law /= law[-1]
        numbers = np.repeat(np.arange(-visits, 0), slate)
        log: dict[int, list[LogVisit]] = {}
        for person in np.flatnonzero(~self.cold).tolist():
            places = self._unrepeated(rng, law, visits * slate)
            plays = self._plays(np.full(len(places), person), numbers, places)
            busy = np.array([play.dwell_ms + 1000 for play in plays]).reshape(visits, slate)
            spare = int(span_s * 1000) - int(busy.sum())
            if spare < 0:
                raise ValueError(
                    f"{visits} visits of {slate} plays do not fit into a log of {span_s:g} s: "
                    f"person {self.person_ids[person]} needs {busy.sum() / 1000:.0f} s"
                )
            gaps = np.sort(rng.integers(0, spare + 1, size=visits))
            start = end_ms - int(span_s * 1000) + gaps + np.cumsum(busy.sum(1)) - busy.sum(1)
            ends = start[:, None] + np.cumsum(busy, axis=1)
            log[person] = [
                LogVisit(
                    k - visits,
                    int(start[k]),
                    [self.item_ids[at] for at in places[k * slate : (k + 1) * slate]],
                    plays[k * slate : (k + 1) * slate],
                    ends[k].tolist(),
                )
                for k in range(visits)
            ]
        return log

    def _unrepeated(self, rng: np.random.Generator, law: Floats, count: int) -> NDArray[np.int64]:
        """Draws from the cumulative law, skipping what was among the last `LOG_NO_REPEAT` taken."""
        apart = min(LOG_NO_REPEAT, len(self.item_ids) - 1)
        taken: list[int] = []
        recent: set[int] = set()
        while len(taken) < count:
            for at in np.searchsorted(law, rng.random(2 * count), side="right").tolist():
                if at in recent:
                    continue
                taken.append(at)
                recent.add(at)
                if len(taken) > apart:
                    recent.discard(taken[-apart - 1])
        return np.array(taken[:count])

    def _places(self, items: Collection[str]) -> NDArray[np.int64]:
        return np.array([self.index[item] for item in items], dtype=np.int64)

    def _key(self, stream: int, person: NDArray[np.int64], visit: NDArray[np.int64]) -> Counters:
        """One counter a (person, visit), [n]; as arrays, whose uint64 wraps without a warning."""
        key = _mixed(np.array([(self.seed * _GOLDEN + stream) & _MASK], dtype=np.uint64))
        key = _mixed(key + person.astype(np.uint64) * np.uint64(_GOLDEN))
        return _mixed(key + visit.astype(np.int64).view(np.uint64) * np.uint64(_GOLDEN))

    def _plays(
        self, person: NDArray[np.int64], visit: NDArray[np.int64], place: NDArray[np.int64]
    ) -> list[Play]:
        key = self._key(_PLAY, person, visit)
        u = _uniforms(key + place.astype(np.uint64) * np.uint64(_GOLDEN), _DRAWS).T
        z = self.satisfactions[person, place].astype(np.float64)
        duration = self.duration_ms[place]
        normal = np.sqrt(-2 * np.log(u[0])) * np.cos(2 * np.pi * u[1])
        dwell = 14_000 * self.dwell_factor[person] * np.exp(2.2 * (z - 0.4) + 0.6 * normal)
        dwell *= (duration / 40_000) ** 0.45
        dislike = u[2] < 0.12 * np.maximum(0, 1 - 4 * z)
        dwell = np.where(dislike, 2000 + 2000 * u[3], dwell)
        # A play without dislike may end in an action; all but the like are rarer still.
        happy = np.where(dislike, 0, z * z)
        return [
            Play(*row)
            for row in zip(
                np.minimum(dwell, duration).astype(np.int64).tolist(),
                z.tolist(),
                (u[4] < 0.12 * happy).tolist(),
                (u[5] < 0.02 * happy).tolist(),
                (u[6] < 0.01 * happy).tolist(),
                (u[7] < 0.01 * happy).tolist(),
                dislike.tolist(),
                strict=True,
            )
        ]


def twin_ids(
    person: str,
    arm_of: Callable[[str], str],
    arms: Iterable[str],
    row_of: Callable[[str], int] | None = None,
    taken: Collection[int] = (),
) -> dict[str, str]:
    """One user id a arm for this person: `person-k` with the smallest k whose hash gives the arm.

    With `row_of` (the row of an id in a hashed user table) ids whose row is in `taken`, or is
    another twin's, are passed over. Raises ValueError when no suffix below 100,000 fits: the arm
    has no share, or no row is free.
    """
    ids: dict[str, str] = {}
    rows: set[int] = set()
    for arm in arms:
        for suffix in range(MAX_SUFFIX):
            user = f"{person}-{suffix}"
            if arm_of(user) != arm:
                continue
            row = None if row_of is None else row_of(user)
            if row is not None and (row in taken or row in rows):
                continue
            ids[arm] = user
            if row is not None:
                rows.add(row)
            break
        else:
            raise ValueError(f"no id of {person} below suffix {MAX_SUFFIX} falls into arm {arm!r}")
    return ids


def all_twins(
    persons: Iterable[str],
    arm_of: Callable[[str], str],
    arms: Sequence[str],
    row_of: Callable[[str], int] | None = None,
) -> list[Mapping[str, str]]:
    """`twin_ids` of everybody; with `row_of` no two ids share a row of the user table."""
    taken: set[int] = set()
    everybody: list[Mapping[str, str]] = []
    for person in persons:
        ids = twin_ids(person, arm_of, arms, row_of, taken)
        if row_of is not None:
            taken.update(row_of(user) for user in ids.values())
        everybody.append(ids)
    return everybody


def _ids(prefix: str, count: int) -> list[str]:
    digits = max(4, len(str(count - 1)))
    return [f"{prefix}{at:0{digits}d}" for at in range(count)]


def _normalised(x_ND: Floats) -> Floats:
    unit: Floats = x_ND / np.linalg.norm(x_ND, axis=1, keepdims=True)
    return unit


def _mixed(x: Counters) -> Counters:
    """The finaliser of splitmix64: neighbouring counters become independent-looking bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _uniforms(key: Counters, draws: int) -> Floats:
    """[len(key), draws] numbers in the open interval (0, 1), 53 bits each."""
    steps = np.arange(1, draws + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
    bits = _mixed(_mixed(key)[:, None] + steps) >> np.uint64(11)
    uniform: Floats = (bits.astype(np.float64) + 0.5) * 2.0**-53
    return uniform
