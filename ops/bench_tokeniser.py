"""`dwell bench tokeniser`: how long a million items take to get semantic IDs, and what these are worth.

Notable choices
- The embeddings are synthetic, for no public ones of this size come with the project: a mixture of many Gaussians,
  their weights by Zipf's law, their spreads log-normal, all with variances that fall as 1/j over the dimensions, as
  those of learned embeddings do. Reconstruction depends on that choice; compare it within a run only.
- Beside the fitted codebooks stand random ones (centroids are residuals of items drawn by lot) and balanced ones, on
  the same items. Codes that have no items at all are an error: the report's utilisation is 1.0.
- One item's time is that of `Codebooks.assign` on one row, each row another item. What it gives must be what it gave
  the item among all others, and what comparing all pairs in float64 gives.
"""

import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from scipy.spatial.distance import cdist

from learner.id_quality import Quality, quality, random_codebooks
from learner.semantic_ids import Codebooks, Tell, fit
from ops.config import Config
from ops.errors import UserError
from ops.results import Check, report

WIDTH: Final = 64
GAUSSIANS: Final = 20_000
SPREAD: Final = 0.5
"""Median of the Gaussians' standard deviations; that of their centres is 1."""
BALANCED: Final = 1.5
"""Bound of the balanced codebooks: items of a code over the mean."""
ALONE: Final = 1000
"""Items that are assigned one by one."""

Say = Callable[[str], None]
_Result = TypeVar("_Result")


def mixture(items: int, seed: int) -> NDArray[np.float32]:
    """The embeddings `[items, WIDTH]`."""
    rng = np.random.default_rng(seed)
    scale_D = np.arange(1, WIDTH + 1) ** -0.5
    scale_D /= np.sqrt(np.square(scale_D).sum())
    centre_GD = rng.standard_normal((GAUSSIANS, WIDTH)) * scale_D
    spread_G = SPREAD * rng.lognormal(0.0, 0.4, GAUSSIANS)
    weight_G = 1.0 / np.arange(1, GAUSSIANS + 1)
    of_N = rng.choice(GAUSSIANS, items, p=weight_G / weight_G.sum())
    x_ND = rng.standard_normal((items, WIDTH), dtype=np.float32)
    for start in range(0, items, 1 << 16):
        part = slice(start, start + (1 << 16))
        x_ND[part] *= spread_G[of_N[part], None] * scale_D
        x_ND[part] += centre_GD[of_N[part]]
    return x_ND


def measure(items: int, codes: int, seed: int, balanced: bool, say: Say) -> dict[str, Any]:
    """All figures, those of balanced codebooks if asked; `say` tells what is being done."""
    say("embeddings")
    x_ND = mixture(items, seed)
    results: dict[str, Any] = {"items": items, "width": WIDTH, "codes": codes}
    results["resident_before_bytes"] = _peak_resident()

    books, fit_s = _timed(lambda: fit(x_ND, codes, seed, tell=_telling(say, "fit")))
    sids_N3, assign_s = _timed(lambda: books.assign(x_ND))
    results["fit_s"], results["assign_all_s"] = fit_s, assign_s
    results["peak_resident_bytes"] = _peak_resident()
    say("quality")
    results["fitted"] = _figures(quality(books, x_ND, sids_N3))
    results["one_item"] = _alone(books, x_ND, sids_N3, np.random.default_rng([seed, 1]))

    say("random codebooks")
    random = random_codebooks(x_ND, codes, seed)
    results["random"] = _figures(quality(random, x_ND, random.assign(x_ND)))

    if not balanced:
        return results
    even, even_s = _timed(lambda: fit(x_ND, codes, seed, BALANCED, _telling(say, "balanced fit")))
    say("balanced: quality")
    found = _figures(quality(even, x_ND, even.assign(x_ND)))
    results["balanced"] = {"bound": BALANCED, "fit_s": even_s, **found}
    results["balanced"]["reconstruction_over_fitted"] = (
        found["level_3"]["reconstruction"] / results["fitted"]["level_3"]["reconstruction"]
    )
    return results


def checks_of(results: dict[str, Any]) -> list[Check]:
    """The figures held against their goals."""
    levels = ("level_1", "level_2", "level_3")
    utilisation = min(results["fitted"][level]["utilisation"] for level in levels)
    one = results["one_item"]
    checks = [
        Check("utilisation, the least of a level", utilisation, "1", utilisation == 1.0),
        Check("one_item.different", one["different"], "0", one["different"] == 0),
        Check("fit_s", results["fit_s"], "< 600", results["fit_s"] < 600, correctness=False),
        Check("one_item.p99_s", one["p99_s"], "< 0.005", one["p99_s"] < 0.005, correctness=False),
    ]
    if "balanced" in results:
        largest = max(results["balanced"][level]["largest_apart"] for level in levels)
        name = "balanced, largest_apart of a level"
        checks.append(Check(name, largest, f"<= {BALANCED}", largest <= BALANCED))
    return checks


def run(
    config: Config, items: int, codes: int, seed: int, balanced: bool, json: Path | None
) -> int:
    """Bench, print, and return the exit status."""
    if items < codes:
        raise UserError(f"--items {items} are fewer than --codes {codes}; ask for more items.")
    console = Console()
    with console.status("") as status:
        results = measure(items, codes, seed, balanced, status.update)
    return report(
        "dwell bench tokeniser", config, [seed], results, checks_of(results), json, console
    )


def _figures(found: Quality) -> dict[str, Any]:
    figures: dict[str, Any] = {
        f"level_{number}": asdict(level) for number, level in enumerate(found.levels, 1)
    }
    return {
        **figures,
        "distinct": found.distinct,
        "sharing": found.sharing,
        "largest_group": found.largest_group,
    }


def _alone(
    books: Codebooks,
    x_ND: NDArray[np.float32],
    sids_N3: NDArray[np.int64],
    rng: np.random.Generator,
) -> dict[str, float]:
    """Times of one item, and how many of them got other IDs than they should."""
    rows = rng.choice(len(x_ND), min(ALONE, len(x_ND)), replace=False)
    _, first_s = _timed(lambda: Codebooks(books.centroids).assign(x_ND[rows[:1]]))
    times: list[float] = []
    different = 0
    for row in rows:
        sid_13, seconds = _timed(partial(books.assign, x_ND[row : row + 1]))
        times.append(seconds)
        different += int(not np.array_equal(sid_13[0], sids_N3[row]))
    residual_ND = x_ND[rows].astype(np.float64)
    for level, table_KD in enumerate(books.centroids):
        cost_NK = cdist(residual_ND, table_KD.astype(np.float64), metric="sqeuclidean")
        different += int((cost_NK.argmin(axis=1) != sids_N3[rows, level]).sum())
        residual_ND -= table_KD[sids_N3[rows, level]]
    return {
        "p50_s": float(np.quantile(times, 0.5)),
        "p99_s": float(np.quantile(times, 0.99)),
        "first_s": first_s,
        "different": different,
    }


def _timed(work: Callable[[], _Result]) -> tuple[_Result, float]:
    began = time.perf_counter()
    result = work()
    return result, time.perf_counter() - began


def _telling(say: Say, phase: str) -> Tell:
    def tell(what: str, done: int, in_all: int) -> None:
        say(f"{phase}: {what}, {done / in_all:.0%}" if done < in_all else f"{phase}: {what}")

    return tell


def _peak_resident() -> int:
    """Most memory that this process ever held, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
