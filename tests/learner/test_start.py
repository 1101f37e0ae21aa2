"""What an untrained policy begins with decides how soon it tells persons apart."""

import numpy as np
import torch

from learner.context import contexts, features
from learner.decoder import LazyDecoder
from learner.presets import PRESETS
from learner.semantic_ids import fit
from streams.events import BEHAVIOUR
from tests.learner.makers import context_of

TINY = PRESETS["tiny"]


def test_embeddings_of_an_items_codes_add_up_to_its_place() -> None:
    """Levels that are projected or scaled apart would not: like items must get like sums."""
    rng = np.random.default_rng(0)
    places_ND = rng.normal(size=(400, 16)).astype(np.float32)
    codebooks = fit(places_ND, 16, seed=1)
    torch.manual_seed(0)
    model = LazyDecoder(TINY, 16, 32)
    model.start_from_centroids(list(codebooks.centroids))
    sids_N3 = codebooks.assign(places_ND)
    sums_NE = sum(
        table.detach()[torch.from_numpy(sids_N3[:, level])]
        for level, table in enumerate(model.embeddings)
    )
    assert isinstance(sums_NE, torch.Tensor)
    coded_ND = sum(table[sids_N3[:, level]] for level, table in enumerate(codebooks.centroids))
    distances = torch.pdist(sums_NE)
    expected = torch.pdist(torch.from_numpy(np.asarray(coded_ND)))
    assert np.corrcoef(distances.numpy(), expected.numpy())[0, 1] > 0.97


def test_an_untrained_policy_prefers_codes_in_the_direction_of_its_state() -> None:
    torch.manual_seed(0)
    model = LazyDecoder(TINY, 16, 32)
    model.start_from_centroids([np.random.default_rng(1).normal(size=(16, 16)).astype("f4")] * 3)
    for level, table in enumerate(model.embeddings):
        with torch.no_grad():
            logits_K = model.logits(level, table[3][None, None])[0, 0]
        assert int(logits_K.argmax()) == 3
        others = torch.cat([logits_K[:3], logits_K[4:]])
        assert 3.0 < logits_K[3] - others.mean() < 12.0  # nats: heard, and not deaf to the rest


def test_an_untrained_policy_asks_for_more_of_what_the_context_holds() -> None:
    rng = np.random.default_rng(3)
    codebooks = fit(rng.normal(size=(400, 16)).astype("f4"), 16, seed=1)
    found = []  # how many codes come before the one that the context is full of
    for seed in range(10):
        torch.manual_seed(seed)
        model = LazyDecoder(TINY, 16, 32)
        model.start_from_centroids(list(codebooks.centroids))
        packed = context_of([(seed, 2, 5)] * 6)
        with torch.no_grad():
            kv = model.process(contexts(["u"], [packed], TINY.context, 32, 16))
            logits_K = model.step(kv, torch.zeros(1, 1, 0, dtype=torch.int64))[0, 0]
        found.append(int((logits_K > logits_K[seed]).sum()))
    assert max(found) <= 4  # of 16 codes
    assert found.count(0) >= 5  # by chance one in sixteen is first


def test_a_short_and_a_long_video_enjoyed_alike_look_alike() -> None:
    """The same multiple of the usual play time gives the same feature at every duration."""
    durations_s = np.array([10.0, 40.0, 160.0])
    for joy, taken in ((0.4, "bored"), (1.6, "held")):
        rows = [
            ((0, 0, 0), 0, int(1000 * joy * 1.2 * d**0.5), int(1000 * d), 0) for d in durations_s
        ]
        surprise_N = features(np.array(rows, dtype=BEHAVIOUR))[:, 1]
        assert np.ptp(surprise_N) < 0.4
        assert (surprise_N < 0).all() if taken == "bored" else (surprise_N > 0).all()


def test_features_of_ordinary_plays_are_centred_and_of_like_size() -> None:
    rng = np.random.default_rng(2)
    duration_s = 40 * np.exp(0.8 * rng.normal(size=2000))
    play_s = np.minimum(duration_s, 1.2 * duration_s**0.5 * np.exp(0.8 * rng.normal(size=2000)))
    rows = [
        ((0, 0, 0), 0, int(1000 * p), int(1000 * d), 0)
        for p, d in zip(play_s, duration_s, strict=True)
    ]
    features_NF = features(np.array(rows, dtype=BEHAVIOUR))[:, 1:4]
    assert np.abs(features_NF.mean(axis=0)).max() < 0.4
    assert features_NF.std(axis=0).min() > 0.3
    assert features_NF.std(axis=0).max() < 1.5
