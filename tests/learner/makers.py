"""Small policies, catalogues and samples for the tests of learner and actor."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from learner.catalogue import Catalogue
from learner.context import contexts, pack_behaviours
from learner.decoder import LazyDecoder
from learner.presets import Preset
from learner.valid_tree import sids_of
from streams.events import (
    Behaviour,
    LogpLevels,
    Sample,
    SampleItem,
    SemanticId,
    Source,
    Upsert,
    encode,
    pack_leaves,
)

CODEBOOK = "c0debook"
NOW_MS = 1_700_000_000_000

SMALL = Preset(d_model=16, layers=2, heads=4, d_embed=8, d_ffn=32, d_user=4, context=6)


def upsert(
    item: str,
    sid: SemanticId,
    codebook: str = CODEBOOK,
    duration_ms: int = 30_000,
    author: str = "",
) -> bytes:
    """A catalogue entry's value."""
    return encode(
        Upsert(item=item, sid=sid, codebook=codebook, duration_ms=duration_ms, author=author)
    )


def catalogue_of(codes: int, sids: Sequence[SemanticId], codebook: str = CODEBOOK) -> Catalogue:
    """Items i0, i1, ... at these leaves; offsets count from 0."""
    catalogue = Catalogue(codes)
    for offset, sid in enumerate(sids):
        item = f"i{offset}"
        catalogue.take(offset, item.encode(), upsert(item, sid, codebook))
    return catalogue


def random_catalogue(codes: int, items: int, seed: int, shared: int = 0) -> Catalogue:
    """`items` items at random leaves; the last `shared` of them share a leaf with an earlier one."""
    rng = np.random.default_rng(seed)
    keys = rng.choice(codes**3, items - shared, replace=False)
    keys = np.concatenate([keys, rng.choice(keys, shared)])
    return catalogue_of(codes, [(int(a), int(b), int(c)) for a, b, c in sids_of(keys, codes)])


def random_model(preset: Preset, codes: int, user_rows: int, seed: int) -> LazyDecoder:
    """A decoder all of whose parameters are random, so that nothing is zero by initialisation."""
    torch.manual_seed(seed)
    model = LazyDecoder(preset, codes, user_rows)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "norm" in name:
                value.copy_(1.0 + 0.3 * torch.randn_like(value))
            else:
                value.copy_(torch.randn_like(value) * (0.5 if value.dim() == 1 else 0.4))
    return model


def context_of(sids: Sequence[SemanticId], seed: int = 0) -> bytes:
    """A packed context that watched these leaves, oldest first."""
    rng = np.random.default_rng([seed, len(sids)])
    return pack_behaviours(
        [
            (
                Behaviour(
                    request=f"p{place}",
                    position=0,
                    item="",
                    end_ms=NOW_MS - 60_000 * (len(sids) - place),
                    play_ms=int(rng.integers(1_000, 60_000)),
                    duration_ms=int(rng.integers(5_000, 60_000)),
                    actions=int(rng.integers(0, 32)),
                ),
                sid,
            )
            for place, sid in enumerate(sids)
        ],
        NOW_MS,
    )


@dataclass(frozen=True)
class Shown:
    """One slot of a sample to be made."""

    sid: SemanticId
    advantage: int | None = None
    supervised: bool = False
    logp_levels: LogpLevels | None = None
    source: Source = "policy"
    item: str = "item"


def sample(
    request: str,
    shown: Sequence[Shown],
    catalogue_version: int,
    user: str = "u",
    arm: str = "learning",
    context: bytes = b"",
    excluded: Sequence[SemanticId] = (),
    temperature: float = 1.0,
    watermark_ms: int = NOW_MS,
    policy_version: int = 1,
) -> Sample:
    """A sample as the join would write it."""
    return Sample(
        request=request,
        user=user,
        time_ms=NOW_MS,
        arm=arm,
        policy_version=policy_version,
        catalogue_version=catalogue_version,
        decode_mode="gumbel_top_k",
        temperature=temperature,
        context=context,
        excluded=pack_leaves(np.array(list(excluded), np.int64).reshape(-1, 3)),
        items=[
            SampleItem(
                item=one.item,
                sid=one.sid,
                position=position,
                duration_ms=30_000,
                source=one.source,
                logp_levels=one.logp_levels,
                outcome="ended",
                play_ms=10_000,
                actions=0,
                advantage=one.advantage,
                supervised=one.supervised,
            )
            for position, one in enumerate(shown)
        ],
        threshold=0.75,
        median=0.5,
        start_ms=NOW_MS,
        decided_ms=NOW_MS + 10_000,
        closed_by="decided",
        watermark_ms=watermark_ms,
        closable_ms=NOW_MS + 10_000,
        exposure_offset=0,
        feedback_upto=0,
    )


def learnable(catalogue: Catalogue, requests: int, seed: int, slots: int = 3) -> list[Sample]:
    """Samples with targets of every kind: likes, dislikes, supervised, of the policy and of others."""
    rng = np.random.default_rng(seed)
    codes = catalogue.valid.codes
    leaves = catalogue.valid.tree(catalogue.version).leaves()
    made = []
    for number in range(requests):
        chosen = sids_of(rng.choice(leaves, slots + 3, replace=False), codes)
        sids = [(int(a), int(b), int(c)) for a, b, c in chosen]
        shown = [
            Shown(
                sid,
                advantage=(1, -1, 0)[(number + place) % 3],
                supervised=(number + place) % 2 == 0,
                logp_levels=None
                if (number + place) % 4 == 3
                else (
                    float(-rng.uniform(0.1, 3)),
                    float(-rng.uniform(0.1, 3)),
                    float(-rng.uniform(0.1, 3)),
                ),
                source="other" if (number + place) % 4 == 3 else "policy",
                item=f"i{place}",
            )
            for place, sid in enumerate(sids[:slots])
        ]
        made.append(
            sample(
                f"r{seed}-{number}",
                shown,
                catalogue.version,
                user=f"u{number}",
                context=context_of(sids[: int(rng.integers(0, slots + 1))], seed),
                excluded=sids[slots:],
                temperature=float(rng.choice([1.0, 0.7])),
            )
        )
    return made


def law(model: LazyDecoder, sample: Sample, catalogue: Catalogue) -> dict[SemanticId, LogpLevels]:
    """Every valid leaf's log-probability per level at the sample's temperature, by plain sums."""
    codes = catalogue.valid.codes
    excluded = {
        (int(a), int(b), int(c)) for a, b, c in np.frombuffer(sample.excluded, "<u2").reshape(-1, 3)
    }
    leaves = [
        (int(a), int(b), int(c))
        for a, b, c in sids_of(catalogue.valid.tree(sample.catalogue_version).leaves(), codes)
    ]
    leaves = [leaf for leaf in leaves if leaf not in excluded]
    children: dict[tuple[int, ...], set[int]] = {}
    for leaf in leaves:
        for level in range(3):
            children.setdefault(leaf[:level], set()).add(leaf[level])
    of = contexts([sample.user], [sample.context], model.preset.context, model.user_rows, codes)
    logp: dict[tuple[int, ...], float] = {}
    with torch.no_grad():
        kv = model.process(of)
        for prefix, valid in children.items():
            at = torch.tensor(prefix, dtype=torch.int64).reshape(1, 1, len(prefix))
            logits = model.step(kv, at)[0, 0].double() / sample.temperature
            below = logits[sorted(valid)].logsumexp(0)
            for code in valid:
                logp[(*prefix, code)] = float(logits[code] - below)
    return {leaf: (logp[leaf[:1]], logp[leaf[:2]], logp[leaf]) for leaf in leaves}
