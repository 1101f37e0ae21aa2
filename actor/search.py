"""A beam's way down the valid tree: which children there are, what the policy says of them, which are kept.

Notable choices
- Only valid children exist here: all arrays are lists of children, those of a prefix together, and
  nothing has the codebook's width. So the constraint makes a decode cheaper, not dearer.
- Log-probabilities are kept in float64 and normalised there.
- Equal scores keep the order of beam and code.

Shapes: B requests, M prefixes of a request in the beam, N = B * M, n children.
"""

from collections.abc import Callable, Sequence
from typing import Final, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from learner.sorted_keys import ranges
from learner.valid_tree import Children, Keys, Tree

Step = Callable[[Tensor, Children], Tensor]
"""Prefixes `[B, M, l]` of l codes, int64 (padding: zeros), and their valid children -> the children's
logits `[n]`; called with l = 0 (and M = 1), 1 and 2."""

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Value = TypeVar("Value", np.float64, np.int64)


class NotFiniteError(ValueError):
    """A policy that cannot be drawn from: it must not be served."""


def of_whole_level(step: Callable[[Tensor], Tensor]) -> Step:
    """A `Step` of a policy that computes the logits `[B, M, K]` of all codes."""

    def of_children(prefix_BMl: Tensor, children: Children) -> Tensor:
        logits_BMK = step(prefix_BMl)
        logits_NK = logits_BMK.reshape(-1, logits_BMK.shape[-1])
        return logits_NK[torch.from_numpy(children.place_n), torch.from_numpy(children.code_n)]

    return of_children


class Level:
    """The children that a search looked at on one level, and their conditional log-probabilities.

    S of the N prefixes have children at all.
    """

    def __init__(self, children: Children, prefixes: int, scaled_n: Floats) -> None:
        """`scaled_n` are the children's logits at the temperature, not normalised."""
        self.children: Final = children
        self.size_N: Final = np.bincount(children.place_n, minlength=prefixes)
        """Children of each prefix."""
        self.first_N: Final = self.size_N.cumsum() - self.size_N
        """Where they begin."""
        self._there_S: Final = np.flatnonzero(self.size_N)
        self._size_S: Final = self.size_N[self._there_S]
        if len(scaled_n):
            peak_n = self.largest(scaled_n)
            total_S = np.add.reduceat(np.exp(scaled_n - peak_n), self.first_N[self._there_S])
            scaled_n = scaled_n - peak_n - np.repeat(np.log(total_S), self._size_S)
        self.logp_n: Final[Floats] = scaled_n

    def largest(self, value_n: Floats) -> Floats:
        """For each child the largest value among it and its siblings, `[n]`."""
        if not len(value_n):
            return value_n
        largest_S = np.maximum.reduceat(value_n, self.first_N[self._there_S])
        largest_n: Floats = np.repeat(largest_S, self._size_S)
        return largest_n

    def of_prefix(self, value_BM: Floats) -> Floats:
        """Each child's prefix's value `[n]`."""
        value_n: Floats = value_BM.reshape(-1)[self.children.place_n]
        return value_n

    def log_sums(self, value_n: Floats, prefixes: Ints) -> Floats:
        """For some prefixes, all with children, the log of the sum of exp of these; -inf where all are."""
        size_P = self.size_N[prefixes]
        if not len(prefixes):
            return np.empty(0)
        here_n = value_n[ranges(self.first_N[prefixes], size_P)]
        first_P = size_P.cumsum() - size_P
        peak_P = np.maximum.reduceat(here_n, first_P)
        peak_P[np.isneginf(peak_P)] = 0.0
        total_P = np.add.reduceat(np.exp(here_n - np.repeat(peak_P, size_P)), first_P)
        with np.errstate(divide="ignore"):
            log_sum_P: Floats = np.log(total_P) + peak_P
        return log_sum_P


class Search:
    """The beam as it goes down: codes, row and log-probability of each prefix, and where it came from."""

    def __init__(
        self,
        step: Step,
        tree: Tree,
        excluded: Sequence[Keys] | None,
        requests: int,
        temperature: float,
    ) -> None:
        self.requests: Final = requests if excluded is None else len(excluded)
        self.codes_BMl: Ints = np.zeros((self.requests, 1, 0), dtype=np.int64)
        self.logp_BM: Floats = np.zeros((self.requests, 1))
        self._step = step
        self._tree = tree
        self._excluded = None if excluded is None else tree.locate(excluded)
        if not temperature > 0.0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        self._temperature = temperature
        self._row_BM: Keys = np.zeros((self.requests, 1), dtype=np.int64)
        self._row_B1: Final = np.arange(self.requests)[:, None]
        self.levels: Final[list[Level]] = []
        self._parent_of_level: list[Ints] = []
        self._chosen_of_level: list[Ints] = []
        """Each prefix's place among its level's children; -1 in padding."""

    def expand(self) -> Level:
        """The beam's valid children, with their conditional log-probabilities."""
        depth = self.codes_BMl.shape[-1]
        children = self._tree.children(self._row_BM, depth, self._excluded)
        with torch.inference_mode():
            logits_n = self._step(torch.from_numpy(self.codes_BMl.clip(min=0)), children)
            # Divided in the logits' own type, as the learner does; then wide enough to sum to one.
            scaled_n = (logits_n / self._temperature).cpu().double().numpy()
        if not np.isfinite(scaled_n).all():
            raise NotFiniteError(f"the policy's logits of level {depth + 1} are not finite")
        self.levels.append(Level(children, self._row_BM.size, scaled_n))
        return self.levels[-1]

    def keep(self, chosen_BM: Ints, score_n: Floats) -> Floats:
        """Go down to these children; returns their scores."""
        level, row_B1 = self.levels[-1], self._row_B1
        place_n, row_n, code_n = level.children
        parent_BM = pick(place_n, chosen_BM, 0) % self._row_BM.shape[1]
        codes_BMl = np.where(chosen_BM[:, :, None] >= 0, self.codes_BMl[row_B1, parent_BM], -1)
        code_BM = pick(code_n, chosen_BM, -1)
        self.codes_BMl = np.concatenate([codes_BMl, code_BM[:, :, None]], -1)
        self.logp_BM = pick(level.logp_n + level.of_prefix(self.logp_BM), chosen_BM, -np.inf)
        self._row_BM = pick(row_n, chosen_BM, -1)
        self._parent_of_level.append(parent_BM)
        self._chosen_of_level.append(chosen_BM)
        return pick(score_n, chosen_BM, -np.inf)

    def best(self, score_n: Floats, width: int) -> Ints:
        """Places `[B, M]` of each request's largest scores, descending, the first of equal ones first; padding -1."""
        level, beam = self.levels[-1], self._row_BM.shape[1]
        size_B = level.size_N.reshape(-1, beam).sum(axis=1)
        first_B = level.first_N.reshape(-1, beam)[:, 0]
        best_BM = np.full((self.requests, max(1, min(width, size_B.max(initial=0)))), -1)
        for request, (first, size) in enumerate(
            zip(first_B.tolist(), size_B.tolist(), strict=True)
        ):
            own_n = score_n[first : first + size]
            open_n = np.arange(size)
            if size > width:
                # Sort little: what is below the width-th largest cannot be among the best.
                open_n = np.flatnonzero(own_n >= np.partition(own_n, size - width)[size - width])
            order_n = open_n[np.argsort(-own_n[open_n], kind="stable")][:width]
            best_BM[request, : len(order_n)] = first + order_n
        return best_BM

    def path(self, slots: int) -> tuple[Ints, Ints, Ints]:
        """Where the first `slots` finished prefixes went through on each level: places `[B, slots]` among its
        children."""
        # Up from their leaves.
        chosen_3, beam_3 = (
            part[:, :slots] for part in (self._chosen_of_level[2], self._parent_of_level[2])
        )
        chosen_2 = self._chosen_of_level[1][self._row_B1, beam_3]
        beam_2 = self._parent_of_level[1][self._row_B1, beam_3]
        chosen_1 = self._chosen_of_level[0][self._row_B1, beam_2]
        return chosen_1, chosen_2, chosen_3


def pick(value_n: NDArray[Value], at_BM: Ints, padding: float) -> NDArray[Value]:
    """The values at these places; `padding` where the place is -1."""
    if at_BM.min(initial=0) >= 0:
        return value_n[at_BM]
    picked_BM = np.full(at_BM.shape, padding, dtype=value_n.dtype)
    real_BM = at_BM >= 0
    picked_BM[real_BM] = value_n[at_BM[real_BM]]
    return picked_BM
