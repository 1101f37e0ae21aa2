"""The join and the shaping of the streams over a feed log, in one process; and the same fold without bounds. Pure.

Notable choices
- Rows become events by the replay's own functions (`ops.log_requests`); users go to partitions as on Kafka, each
  with a join and a shaping state of its own. Its watermark is the time of its latest event, as if ticks came all
  the time; after the last row one tick passes every deadline.
- The fold without bounds keeps every play and every percentile: all of a user's plays of a bucket, the population
  as exact play times, and the cut as the weighted quantile of all percentiles so far, under the same forgetting and
  the same prior. Where it differs from `streams.shape` is the error of what that throws away.

Shapes: N requests of the log.
"""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Iterator
from typing import Final

import numpy as np
from numpy.typing import NDArray

from actor.settings import ActorSettings
from actor.users import Users
from learner.catalogue import Catalogue
from ops.log_requests import Requests
from streams.events import ACTION_BITS, Exposure, Sample, Upsert, encode
from streams.intake import partition_of
from streams.join import Join, Joined
from streams.settings import JoinSettings, ShapeSettings
from streams.shape import RunningQuantile, Shape

FOLDED: Final = np.dtype(
    [
        ("row", "i8"),
        ("partition", "i4"),
        ("seen", "?"),
        ("censored", "?"),
        ("dislike", "?"),
        ("percentile", "f8"),
        ("target", "?"),
        ("advantage", "i1"),
        ("supervised", "?"),
        ("own_plays", "i4"),
        ("population", "f8"),
        ("threshold", "f8"),
        ("median", "f8"),
        ("own_dropped", "i4"),
        ("exact_percentile", "f8"),
        ("exact_threshold", "f8"),
        ("exact_median", "f8"),
        ("literal", "f8"),
    ]
)
"""What became of one request of the log. Without `target` the advantage is 0 and means nothing; figures from
`percentile` on are only for what was `seen`. `literal` is the report's percentile as written: the share of the
user's plays of the bucket, the present one among them, that are no longer than it."""

_BLOCK = 4096
_RESCALE_AT = 1e12

Floats = NDArray[np.float64]


class Unbounded:
    """The shaping fold of one partition, with everything kept."""

    def __init__(self, settings: ShapeSettings) -> None:
        self._prior = settings.prior_plays
        self._own: dict[tuple[str, int], list[tuple[int, int]]] = {}
        self._population: dict[int, list[int]] = {}

    def judge(self, joined: Joined, sample: Sample) -> tuple[float, int, float]:
        """Percentile, own plays that count in it, and the literal percentile.

        For a sample of one item that was seen; its play then enters the state unless it is censored.
        """
        item = sample.items[0]
        assert item.bucket is not None
        history = self._own.setdefault((sample.user, item.bucket), [])
        own = [play for end, play in history if end < sample.time_ms]
        population = self._population.setdefault(item.bucket, [])
        q_population = _mid_rank(population, item.play_ms) if population else 0.5
        less = sum(play < item.play_ms for play in own)
        equal = sum(play == item.play_ms for play in own)
        percentile = (less + equal / 2 + self._prior * q_population) / (len(own) + self._prior)
        if item.outcome != "censored":
            insort(history, (joined.decision.positions[item.position].last_ms, item.play_ms))
            insort(population, item.play_ms)
        return percentile, len(own), (less + equal + 1) / (len(own) + 1)


def _mid_rank(values: list[int], value: int) -> float:
    return (bisect_left(values, value) + bisect_right(values, value)) / 2 / len(values)


def exact_cuts(
    values_N: Floats, learned_N: NDArray[np.bool_], quantile: float, memory: int
) -> Floats:
    """The quantile of all `learned` values before each one `[N]`, older ones fading by 1/e each `memory`.

    The prior is the streams' own, as points in the middle of its bins.
    """
    prior = np.array(RunningQuantile(memory).weights)
    points = (np.arange(len(prior)) + 0.5) / len(prior)
    every = np.concatenate([points, values_N])
    order = np.argsort(every, kind="stable")
    ascending = every[order]
    place = np.empty(len(every), np.int64)
    place[order] = np.arange(len(every))
    sums = _Sums(len(every))
    for at, weight in zip(place[: len(prior)].tolist(), prior.tolist(), strict=True):
        sums.add(at, weight)
    cuts = np.empty(len(values_N))
    weight = 1.0
    places = place[len(prior) :].tolist()
    for n, (at, learned) in enumerate(zip(places, learned_N.tolist(), strict=True)):
        cuts[n] = ascending[sums.first(quantile * sums.total)]
        if learned:
            sums.add(at, weight)
            weight *= 1.0 + 1.0 / memory
            if weight > _RESCALE_AT:
                sums.scale(1.0 / weight)
                weight = 1.0
    return cuts


class _Sums:
    """Weights at places 0 to size - 1 whose running sums are searched in logarithmic time (a Fenwick tree)."""

    def __init__(self, size: int) -> None:
        self.total = 0.0
        self._tree = [0.0] * (size + 1)
        self._top = 1 << (size.bit_length() - 1)

    def add(self, place: int, weight: float) -> None:
        self.total += weight
        at = place + 1
        while at < len(self._tree):
            self._tree[at] += weight
            at += at & -at

    def scale(self, factor: float) -> None:
        self.total *= factor
        self._tree = [weight * factor for weight in self._tree]

    def first(self, target: float) -> int:
        """The first place up to which the weights come to the target."""
        at, step = 0, self._top
        while step:
            if at + step < len(self._tree) and self._tree[at + step] < target:
                at += step
                target -= self._tree[at]
            step >>= 1
        return min(at, len(self._tree) - 2)


def fold(
    rows: NDArray[np.void],
    chosen: NDArray[np.integer],
    join: JoinSettings,
    shape: ShapeSettings,
    partitions: int,
    progress: Callable[[int], None] = lambda _: None,
) -> NDArray[np.void]:
    """The chosen rows of a log joined and shaped, with and without bounds: `[N]` of `FOLDED`, in sample order.

    `rows` are of `ops.feedlog.ROW` by time, `chosen` ascending indices; `progress` is told the requests begun.
    """
    out = np.zeros(len(chosen), FOLDED)
    unbounded = [Unbounded(shape) for _ in range(partitions)]
    done = 0
    for row, number, joined, sample in _samples(rows, chosen, join, shape, partitions, progress):
        _note(out[done], row, number, joined, sample, unbounded[number])
        done += 1
    out = out[:done]
    for number in range(partitions):
        mine = np.flatnonzero((out["partition"] == number) & out["seen"])
        learned = ~out["censored"][mine]
        for name, quantile in (
            ("exact_threshold", shape.threshold_quantile),
            ("exact_median", 0.5),
        ):
            values = out["exact_percentile"][mine]
            out[name][mine] = exact_cuts(values, learned, quantile, shape.threshold_memory)
    return out


def _samples(
    rows: NDArray[np.void],
    chosen: NDArray[np.integer],
    join: JoinSettings,
    shape: ShapeSettings,
    partitions: int,
    progress: Callable[[int], None],
) -> Iterator[tuple[int, int, Joined, Sample]]:
    """Row, partition, outcome and sample of each request, in the order in which they close."""
    joins = [Join(join, lambda _: False) for _ in range(partitions)]
    shapes = [Shape(shape, lambda _arm, _user: None) for _ in range(partitions)]
    requests = Requests(rows, chosen, Users(ActorSettings()), videos_of(rows, chosen), context=1)
    open_rows: dict[str, int] = {}
    numbers: dict[str, int] = {}
    now_ms = begun = 0

    def shaped(number: int, closed: list[Joined]) -> Iterator[tuple[int, int, Joined, Sample]]:
        for one in closed:
            sample = shapes[number].shape(one)
            yield open_rows.pop(sample.request), number, one, sample

    offset = 0
    while (block := requests.take(_BLOCK, policy_version=0)).events:
        fresh = iter(block.rows)
        for event in block.events:
            now_ms = event.time_ms
            offset += 1
            number = numbers.get(event.user, -1)
            if number < 0:
                number = numbers[event.user] = partition_of(event.user, partitions)
            one = joins[number]
            if isinstance(event, Exposure):
                open_rows[event.request] = next(fresh)
                closed = one.expose(event, offset, now_ms)
            else:
                closed = one.feed(event, offset, now_ms)
            yield from shaped(number, closed)
            closed = one.tick(now_ms, not isinstance(event, Exposure), now_ms)
            yield from shaped(number, closed)
        begun += len(block.rows)
        progress(begun)
    for number, one in enumerate(joins):
        end_ms = now_ms + one.times.cap + one.times.lateness + 1
        for on_exposures in (True, False):
            yield from shaped(number, one.tick(end_ms, on_exposures, end_ms))


def videos_of(rows: NDArray[np.void], chosen: NDArray[np.integer]) -> Catalogue:
    """The log's videos; no policy serves here, so all have the same semantic ID."""
    catalogue = Catalogue(codes=1)
    for offset, video in enumerate(np.unique(rows["video"][chosen]).tolist()):
        entry = Upsert(item=str(video), sid=(0, 0, 0), codebook="none", duration_ms=0)
        catalogue.take(offset, entry.item.encode(), encode(entry))
    return catalogue


def _note(
    out: np.void, row: int, number: int, joined: Joined, sample: Sample, unbounded: Unbounded
) -> None:
    item = sample.items[0]
    out["row"], out["partition"] = row, number
    if item.percentile is None:
        return
    exact, own, literal = unbounded.judge(joined, sample)
    out["seen"] = True
    out["censored"] = item.outcome == "censored"
    out["dislike"] = bool(item.actions & ACTION_BITS["dislike"])
    out["percentile"] = item.percentile
    out["target"], out["advantage"] = item.advantage is not None, item.advantage or 0
    out["supervised"], out["own_plays"] = item.supervised, item.own_plays
    out["population"] = item.population
    out["threshold"], out["median"] = sample.threshold, sample.median
    out["own_dropped"], out["exact_percentile"], out["literal"] = (
        own - item.own_plays,
        exact,
        literal,
    )
