"""The baselines: what they are, that they are fair, and that what trains and serves the lazy decoder runs on them."""

from collections.abc import Callable
from dataclasses import replace
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from actor.sampling import draw
from actor.search import of_whole_level
from learner.baselines import Baseline, EncoderDecoder, NaiveDecoder, split
from learner.batch import assemble
from learner.context import Contexts
from learner.context_processor import KeyValues
from learner.decoder import LazyDecoder
from learner.presets import PRESETS, REPORT_CODES, Preset
from learner.settings import LearnSettings
from learner.step import Trainer
from tests.learner.makers import SMALL, learnable, random_catalogue
from tests.learner.test_decoder import batch_of, targets

CODES, ROWS = 7, 32
DEEP = replace(SMALL, layers=3)
BUILD: dict[str, Callable[[Preset, int, int], Baseline]] = {
    "1:1": lambda preset, codes, rows: EncoderDecoder(replace(preset, layers=4), codes, rows),
    "1:2": lambda preset, codes, rows: EncoderDecoder(preset, codes, rows, ratio=2),
    "naive": NaiveDecoder,
}


def made(name: str, preset: Preset = DEEP, codes: int = CODES, seed: int = 1) -> Baseline:
    """With random parameters throughout, so that nothing is zero by initialisation."""
    torch.manual_seed(seed)
    model = BUILD[name](preset, codes, ROWS)
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn_like(value)
            value.copy_(1.0 + 0.3 * noise if "norm" in name else 0.4 * noise)
    return model


@pytest.fixture(params=BUILD)
def model(request: pytest.FixtureRequest) -> Baseline:
    return made(request.param)


def logits_of(model: Baseline, of: Contexts, sids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(model.process(of), sids)
    return found


def shifted(sids: Tensor, level: int) -> Tensor:
    other = sids.clone()
    other[..., level] = (other[..., level] + 1) % CODES
    return other


def test_targets_of_a_request_do_not_see_one_another(model: Baseline) -> None:
    of, sids = batch_of([3, 5]), targets(2, 4)
    together = logits_of(model, of, sids)
    for slot in range(4):
        alone = logits_of(model, of, sids[:, slot : slot + 1])
        assert torch.allclose(together[:, slot : slot + 1], alone, atol=1e-4)
    other = sids.clone()
    other[:, 1:] = (other[:, 1:] + 1) % CODES
    assert torch.equal(logits_of(model, of, other)[:, 0], together[:, 0])


def test_a_level_sees_the_codes_before_it_and_no_other(model: Baseline) -> None:
    of, sids = batch_of([3, 5]), targets(2, 4)
    base = logits_of(model, of, sids)
    for level in range(3):
        other = logits_of(model, of, shifted(sids, level))
        assert torch.allclose(other[:, :, : level + 1], base[:, :, : level + 1], atol=1e-5)
        for after in range(level + 1, 3):
            assert (other[:, :, after] - base[:, :, after]).abs().max() > 1e-3


def test_decoding_with_the_processed_context_gives_teacher_forced_logits(model: Baseline) -> None:
    of, sids = batch_of([6, 0, 1]), targets(3, 4)
    forced = logits_of(model, of, sids)
    with torch.no_grad():
        kv = model.process(of)
        for level in range(3):
            stepped = model.step(kv, sids[..., :level])
            assert torch.allclose(forced[:, :, level], stepped, atol=1e-4)
    assert (forced[:, 0] - forced[:, 1]).abs().max() > 0.01


def test_padding_is_not_seen(model: Baseline) -> None:
    of, sids = batch_of([4, 2, 0]), targets(3, 2)
    base = logits_of(model, of, sids)
    codes = torch.where(of.present_BT.unsqueeze(-1), of.codes_BTL, (of.codes_BTL + 3) % CODES)
    features = torch.where(of.present_BT.unsqueeze(-1), of.features_BTF, 9.0)
    changed = of._replace(codes_BTL=codes, features_BTF=features)
    assert torch.allclose(logits_of(model, changed, sids), base, atol=1e-4)


def test_every_behaviour_that_is_there_is_seen(model: Baseline) -> None:
    of, sids = batch_of([6]), targets(1, 1)
    base = logits_of(model, of, sids)
    for place in range(6):
        codes = of.codes_BTL.clone()
        codes[:, place] = (codes[:, place] + 1) % CODES
        other = logits_of(model, of._replace(codes_BTL=codes), sids)
        assert (other - base).abs().max() > 1e-3, place


def test_encoder_positions_see_both_ways_and_naive_ones_only_back() -> None:
    of = batch_of([6])
    codes = of.codes_BTL.clone()
    codes[:, -1] = (codes[:, -1] + 1) % CODES
    later = of._replace(codes_BTL=codes)
    for name, back in (("1:1", False), ("naive", True)):
        model = made(name)
        with torch.no_grad():
            before, after = model.process(of), model.process(later)
        for keys, others in zip(before.keys, after.keys, strict=True):
            assert torch.allclose(keys[:, :, :-1], others[:, :, :-1], atol=1e-5) == back


def naive_by_hand(model: NaiveDecoder, of: Contexts, sids_L: Tensor) -> Tensor:
    """Logits `[L, K]` of one target, context and target as one sequence through all of every layer."""
    context, present = model.read(of)
    x = torch.cat([context[0][present[0]], model.embedded(sids_L[None, None, :2])[0, 0]])[None]
    for block in model.blocks:
        x = x + block.attend(x)  # type: ignore[operator]
        x = x + block.feed(x)  # type: ignore[operator]
    return model.all_logits(x[:, None, -3:])[0, 0]


def test_the_naive_decoder_is_one_causal_sequence() -> None:
    model = made("naive")
    assert isinstance(model, NaiveDecoder)
    sids = targets(1, 3)
    for length in (6, 4, 0):
        of = batch_of([length])
        found = logits_of(model, of, sids)
        for slot in range(3):
            with torch.no_grad():
                expected = naive_by_hand(model, of, sids[0, slot])
            assert torch.allclose(found[0, slot], expected, atol=1e-4)


def test_a_context_is_processed_once_whatever_the_targets(model: Baseline) -> None:
    of = batch_of([6, 3])
    with torch.no_grad():
        kv: KeyValues = model.process(of)
    assert isinstance(model.blocks, nn.ModuleList)
    assert len(kv.keys) == len(kv.values) == len(model.blocks)
    assert {tuple(keys.shape) for keys in kv.keys} == {(2, 4, 7, 4)}


def matrices(model: nn.Module) -> int:
    """Entries of the layers' matrices, in d_model squared."""
    found = sum(
        value.numel()
        for name, value in model.named_parameters()
        if name.startswith(("blocks.", "encoder.")) and value.dim() == 2
    )
    return found // PRESETS["small"].d_model ** 2


def test_parameters_are_where_they_should_be() -> None:
    """At an FFN of 4 d_model: 16 d^2 a layer of self-attention and FFN, 2 d^2 for W_q and W_o of cross attention, and
    2 d^2 for its W_k and W_v, which only the encoder-decoder has."""
    small = PRESETS["small"]
    with torch.device("meta"):
        lazy = LazyDecoder(small, REPORT_CODES, ROWS)
        even = EncoderDecoder(small, REPORT_CODES, ROWS)
        uneven = EncoderDecoder(small, REPORT_CODES, ROWS, ratio=2)
        naive = NaiveDecoder(small, REPORT_CODES, ROWS)
    assert [matrices(each) for each in (lazy, even, uneven, naive)] == [
        6 * 18,
        3 * 16 + 3 * 20,
        2 * 16 + 4 * 20,
        6 * 16,
    ]
    names = {each: {name for name, _ in each.named_parameters()} for each in (lazy, even, naive)}
    assert sum("cross_key_value" in name for name in names[even]) == 3
    assert not any("key_value" in name for name in names[lazy] | names[naive])
    assert not any("cross" in name for name in names[naive])
    shared = {name for name in names[lazy] if not name.startswith("blocks.")}
    assert shared <= names[even] and shared <= names[naive]


def test_nothing_is_left_without_a_gradient(model: Baseline) -> None:
    of, sids = batch_of([6, 3]), targets(2, 3)
    loss = F.cross_entropy(model(model.process(of), sids).flatten(0, 2), sids.flatten())
    loss.backward()  # type: ignore[no-untyped-call]
    without = [
        name
        for name, value in model.named_parameters()
        if value.grad is None or not value.grad.to_dense().abs().sum() > 0
    ]
    assert without == []


def test_layers_are_split_as_the_report_splits_them() -> None:
    assert [split(layers, 1) for layers in (6, 12, 14, 18)] == [(3, 3), (6, 6), (7, 7), (9, 9)]
    assert [split(layers, 2) for layers in (6, 12, 14, 18)] == [(2, 4), (4, 8), (5, 9), (6, 12)]
    with pytest.raises(ValueError, match="take more layers"):
        split(1, 1)


@pytest.mark.parametrize(
    "preset", [replace(SMALL, l_kv=2), replace(SMALL, s_kv=2), replace(SMALL, g_kv=2)]
)
def test_a_preset_of_another_context_is_refused(preset: Preset) -> None:
    with pytest.raises(ValueError, match="l_kv = s_kv = 1"):
        NaiveDecoder(preset, CODES, ROWS)
    with pytest.raises(ValueError, match="without experts"):
        EncoderDecoder(replace(SMALL, experts=4, d_expert=8), CODES, ROWS)


@pytest.mark.parametrize("name", BUILD)
def test_the_learner_s_step_teaches_them(name: str) -> None:
    """Every objective's step is the same code; here its supervised part on one batch, again and again."""
    torch.manual_seed(5)
    catalogue = random_catalogue(CODES, 40, seed=1)
    model = BUILD[name](DEEP, CODES, ROWS)
    settings = LearnSettings(objective="supervised", supervised=1.0, entropy=0.0)
    trainer = Trainer(cast(LazyDecoder, model), settings, lr=1e-2)
    batch = assemble(learnable(catalogue, 6, seed=2), catalogue.valid, DEEP.context, ROWS)
    losses = []
    for _ in range(30):
        metrics = trainer.step(batch)
        assert metrics is not None
        losses.append(metrics.loss_supervised)
    assert losses[-1] < 0.3 * losses[0]


def test_slates_are_drawn_from_them_as_from_ours(model: Baseline) -> None:
    catalogue = random_catalogue(CODES, 40, seed=1)
    with torch.no_grad():
        kv = model.process(batch_of([6, 2]))
    tree = catalogue.valid.tree(catalogue.version)
    rng = np.random.default_rng(1)
    slates = draw(
        of_whole_level(lambda prefix: model.step(kv, prefix)), tree, None, 5, 1.0, rng, requests=2
    )
    assert slates.filled_BJ.all()
    sids = torch.from_numpy(slates.sids_BJ3)
    mask = torch.from_numpy(tree.path_masks(slates.sids_BJ3))
    with torch.no_grad():
        logits = model(kv, sids).masked_fill(~mask, -torch.inf)
    expected = logits.log_softmax(-1).gather(-1, sids.unsqueeze(-1)).squeeze(-1)
    assert np.allclose(slates.logp_levels_BJ3, expected.numpy(), atol=1e-4)
