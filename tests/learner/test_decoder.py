"""The lazy decoder against its description (report, "Context processor" and "Lazy decoder block")."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from learner.context import Contexts, contexts
from learner.context_processor import KeyValues
from learner.decoder import Block, LazyDecoder
from learner.presets import PRESETS, Preset
from streams.events import SemanticId
from tests.learner.makers import SMALL, context_of, random_model

CODES, ROWS = 7, 32
SIDS: list[SemanticId] = [(1, 2, 3), (0, 6, 4), (5, 5, 5), (2, 0, 1), (6, 3, 0), (3, 1, 2)]


def batch_of(lengths: list[int], length: int = SMALL.context) -> Contexts:
    """One context a request, of so many behaviours."""
    return contexts(
        [f"user{row}" for row in range(len(lengths))],
        [context_of(SIDS[:count], seed=row) for row, count in enumerate(lengths)],
        length,
        ROWS,
        CODES,
    )


def targets(requests: int, k: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(CODES, (requests, k, 3), generator=generator)


def logits_of(model: LazyDecoder, of: Contexts, sids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(model.process(of), sids)
    return found


@pytest.fixture(params=["plain", "shared", "grouped", "parts"])
def model(request: pytest.FixtureRequest) -> LazyDecoder:
    presets = {
        "plain": SMALL,
        "shared": replace(SMALL, layers=4, l_kv=2, s_kv=2),
        "grouped": replace(SMALL, layers=3, l_kv=3, g_kv=2),
        "parts": replace(SMALL, short=2, tied=False),
    }
    return random_model(presets[request.param], CODES, ROWS, seed=1)


def test_targets_of_a_request_do_not_see_one_another(model: LazyDecoder) -> None:
    of, sids = batch_of([3, 5]), targets(2, 4)
    together = logits_of(model, of, sids)
    for slot in range(4):
        alone = logits_of(model, of, sids[:, slot : slot + 1])
        assert torch.allclose(together[:, slot : slot + 1], alone, atol=1e-5)
    other = sids.clone()
    other[:, 1:] = (other[:, 1:] + 1) % CODES
    assert torch.equal(logits_of(model, of, other)[:, 0], together[:, 0])


def test_a_context_processed_once_for_all_targets_equals_one_for_each(model: LazyDecoder) -> None:
    of, sids = batch_of([4, 2]), targets(2, 3)
    once = logits_of(model, of, sids)
    repeated = Contexts(*(part.repeat_interleave(3, dim=0) for part in of))
    each = logits_of(model, repeated, sids.reshape(6, 1, 3)).reshape(once.shape)
    assert torch.allclose(once, each, atol=1e-5)


def test_teacher_forced_logits_are_those_of_decoding_step_by_step(model: LazyDecoder) -> None:
    of, sids = batch_of([6, 0, 1]), targets(3, 4)
    forced = logits_of(model, of, sids)
    with torch.no_grad():
        kv = model.process(of)
        for level in range(3):
            stepped = model.step(kv, sids[..., :level])
            assert torch.allclose(forced[:, :, level], stepped, atol=1e-5)
    assert (forced[:, 0] - forced[:, 1]).abs().max() > 0.01


@pytest.mark.parametrize("cost", [0, 10**6], ids=["each alone", "of the whole level"])
def test_single_logits_are_those_of_the_whole_level(
    model: LazyDecoder, cost: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("learner.layers.SMALL_LEVEL", 0)
    monkeypatch.setattr("learner.layers.SINGLE_COST", cost)
    of, sids = batch_of([6, 0, 1]), targets(3, 4)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        kv = model.process(of)
        for level in range(3):
            whole = model.step(kv, sids[..., :level]).reshape(-1, CODES)
            wanted = torch.rand(whole.shape, generator=generator) < 0.4
            wanted[5] = False  # a prefix without children
            place, code = wanted.nonzero(as_tuple=True)
            found = model.step_to(kv, sids[..., :level], place, code)
            assert torch.allclose(found, whole[wanted], atol=1e-5)
            nothing = model.step_to(kv, sids[..., :level], place[:0], code[:0])
            assert nothing.shape == (0,)


def test_a_level_sees_only_the_codes_before_it(model: LazyDecoder) -> None:
    of, sids = batch_of([3]), targets(1, 1)
    before = logits_of(model, of, sids)
    for level in range(3):
        other = sids.clone()
        other[..., level] = (other[..., level] + 1) % CODES
        after = logits_of(model, of, other)
        assert torch.equal(after[:, :, : level + 1], before[:, :, : level + 1])
        if level < 2:
            assert (after[:, :, level + 1 :] - before[:, :, level + 1 :]).abs().max() > 1e-3


def test_padding_of_the_context_changes_nothing(model: LazyDecoder) -> None:
    sids = targets(2, 3)
    full = batch_of([4, 2])
    shorter = batch_of([4, 2], length=4)
    assert torch.allclose(logits_of(model, full, sids), logits_of(model, shorter, sids), atol=1e-5)
    rubbish = full._replace(
        codes_BTL=torch.where(full.present_BT[..., None], full.codes_BTL, CODES - 1),
        features_BTF=torch.where(full.present_BT[..., None], full.features_BTF, 1e3),
    )
    assert torch.equal(logits_of(model, full, sids), logits_of(model, rubbish, sids))


def test_every_part_of_a_context_matters(model: LazyDecoder) -> None:
    of, sids = batch_of([4]), targets(1, 2)
    before = logits_of(model, of, sids)
    for other in (
        of._replace(users_B=(of.users_B + 1) % ROWS),
        of._replace(codes_BTL=(of.codes_BTL + 1) % CODES),
        of._replace(features_BTF=of.features_BTF + 0.5),
        of._replace(present_BT=torch.zeros_like(of.present_BT)),
        Contexts(of.users_B, of.codes_BTL.flip(1), of.features_BTF.flip(1), of.present_BT),
    ):
        assert (logits_of(model, other, sids) - before).abs().max() > 1e-3


def test_requests_of_a_batch_keep_apart(model: LazyDecoder) -> None:
    lengths, sids = [6, 0, 3], targets(3, 2)
    of = batch_of(lengths)
    together = logits_of(model, of, sids)
    for row in range(3):
        alone = Contexts(*(part[row : row + 1] for part in of))
        assert torch.allclose(
            logits_of(model, alone, sids[row : row + 1]), together[row : row + 1], atol=1e-5
        )


def test_a_position_of_the_context_depends_on_that_position_alone(model: LazyDecoder) -> None:
    """No encoder and no self-attention over the context."""
    of = batch_of([6])
    with torch.no_grad():
        before = model.process(of)
        codes = of.codes_BTL.clone()
        codes[0, 2] = (codes[0, 2] + 1) % CODES
        after = model.process(of._replace(codes_BTL=codes))
    for old, new in zip([*before.keys, *before.values], [*after.keys, *after.values], strict=True):
        moved = (old - new).abs().amax(dim=(0, 1, 3)) > 0
        assert moved.tolist() == [place == 3 for place in range(7)]  # position 0 is the user


def test_cross_attention_attends_to_the_context_as_it_is() -> None:
    """Only W_q and W_o: the processed context is key and value without another projection."""
    preset = replace(SMALL, g_kv=2, s_kv=2, l_kv=1, layers=1)
    model = random_model(preset, CODES, ROWS, seed=2)
    (block,) = model.blocks
    assert isinstance(block, Block)
    with torch.no_grad():
        block.self_out.weight.zero_()
        block.ffn_out.weight.zero_()
        kv = model.process(batch_of([4, 2]))
        x = torch.randn(2, 3, 2, preset.d_model)
        found = block(x, kv.keys[0], kv.values[0], kv.present_BN) - x
        q = block.cross_query(block.cross_norm(x)).reshape(2, 6, preset.heads, preset.d_head)
        group = preset.heads // preset.kv_heads
        y = torch.zeros_like(q)
        for head in range(preset.heads):
            keys, values = kv.keys[0][:, head // group], kv.values[0][:, head // group]
            score = q[:, :, head] @ keys.mT / preset.d_head**0.5
            score = score.masked_fill(~kv.present_BN[:, None, :], -torch.inf)
            y[:, :, head] = score.softmax(-1) @ values
        expected = block.cross_out(y.reshape(2, 3, 2, preset.d_model))
    assert torch.allclose(found, expected, atol=1e-5)


def test_every_key_and_value_set_has_its_own_norm_over_its_own_chunk() -> None:
    preset = replace(SMALL, layers=4, l_kv=2, s_kv=2)
    model = random_model(preset, CODES, ROWS, seed=3)
    of = batch_of([5])
    chunks: list[Tensor] = []
    spy = model.context.key_norms[0].register_forward_pre_hook(
        lambda _, inputs: chunks.append(inputs[0])
    )
    with torch.no_grad():
        kv = model.process(of)
    spy.remove()
    width = preset.kv_heads * preset.d_head
    assert preset.d_context == 4 * width
    assert chunks[0].shape[-1] == width
    norms = [*model.context.key_norms, *model.context.value_norms]
    assert len({id(norm) for norm in norms}) == 4
    sets = [*kv.keys, *kv.values]
    for number, norm in enumerate(norms):
        with torch.no_grad():
            norm.weight.mul_(2.0)
            again = model.process(of)
            norm.weight.div_(2.0)
        for other, (old, new) in enumerate(zip(sets, [*again.keys, *again.values], strict=True)):
            if other == number:
                assert torch.allclose(new, 2.0 * old)
            else:
                assert torch.equal(new, old)


def test_chunks_of_the_context_lie_in_the_order_key_value_of_each_set() -> None:
    """k_l from C_{l * S_kv}, v_l from C_{l * S_kv + 1}: seen by moving one slice of the projection."""
    preset = replace(SMALL, layers=4, l_kv=2, s_kv=2)
    model = random_model(preset, CODES, ROWS, seed=4)
    of = batch_of([5])
    width = preset.kv_heads * preset.d_head
    with torch.no_grad():
        before = model.process(of)
        order = [before.keys[0], before.values[0], before.keys[1], before.values[1]]
        for chunk in range(4):
            bias = torch.zeros(preset.d_context)
            bias[chunk * width : (chunk + 1) * width] = torch.randn(width)
            spy = model.context.static.register_forward_hook(
                lambda _, __, output, bias=bias: output + bias
            )
            after = model.process(of)
            spy.remove()
            found = [after.keys[0], after.values[0], after.keys[1], after.values[1]]
            moved = [not torch.equal(old, new) for old, new in zip(order, found, strict=True)]
            assert moved == [place == chunk for place in range(4)]


def test_without_separate_values_the_keys_are_the_values() -> None:
    kv = random_model(SMALL, CODES, ROWS, seed=5).process(batch_of([2]))
    assert len(kv.keys) == 1
    assert torch.equal(kv.keys[0], kv.values[0])


@pytest.mark.parametrize(
    ("layers", "sets", "read"),
    [(4, 2, [0, 0, 1, 1]), (6, 3, [0, 0, 1, 1, 2, 2]), (5, 2, [0, 0, 0, 1, 1]), (3, 1, [0, 0, 0])],
)
def test_layers_read_the_sets_in_order(layers: int, sets: int, read: list[int]) -> None:
    preset = replace(SMALL, layers=layers, l_kv=sets)
    model = random_model(preset, CODES, ROWS, seed=6)
    seen: list[Tensor] = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    with torch.no_grad():
        kv = model.process(batch_of([3]))
        model.step(kv, torch.zeros(1, 1, 0, dtype=torch.int64))
    assert [[keys is one for one in kv.keys].index(True) for keys in seen] == read


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_keys_and_values_have_g_kv_heads(kv_heads: int) -> None:
    preset = replace(SMALL, g_kv=kv_heads)
    kv = random_model(preset, CODES, ROWS, seed=7).process(batch_of([3]))
    assert kv.keys[0].shape == (1, kv_heads, 1 + SMALL.context, SMALL.d_head)


def test_equal_key_heads_are_as_one() -> None:
    """With both key heads equal, two key heads are as one."""
    one = random_model(replace(SMALL, g_kv=1, layers=1), CODES, ROWS, seed=8)
    kv = one.process(batch_of([4]))
    doubled = KeyValues(
        [keys.repeat(1, 2, 1, 1) for keys in kv.keys],
        [values.repeat(1, 2, 1, 1) for values in kv.values],
        kv.present_BN,
    )
    sids = targets(1, 3)
    with torch.no_grad():
        assert torch.allclose(one(kv, sids), one(doubled, sids), atol=1e-5)


def test_each_level_has_its_own_norm_and_head() -> None:
    model = random_model(SMALL, CODES, ROWS, seed=9)
    of, sids = batch_of([3]), targets(1, 2)
    before = logits_of(model, of, sids)
    for level in range(3):
        for part in (model.norms[level], model.heads[level]):
            state = {name: value.clone() for name, value in part.state_dict().items()}
            with torch.no_grad():
                part.weight.add_(0.5 * torch.randn_like(part.weight))  # type: ignore
            after = logits_of(model, of, sids)
            part.load_state_dict(state)
            moved = [(after[:, :, at] - before[:, :, at]).abs().max() > 0 for at in range(3)]
            assert moved == [at == level for at in range(3)]


def test_gradient_reaches_every_parameter() -> None:
    preset = replace(SMALL, layers=4, l_kv=2, s_kv=2, g_kv=2, short=2)
    model = random_model(preset, CODES, ROWS, seed=10)
    loss = F.cross_entropy(
        model(model.process(batch_of([6, 3])), targets(2, 3)).flatten(0, 2),
        targets(2, 3).flatten(),
    )
    loss.backward()  # type: ignore[no-untyped-call]
    for name, value in model.named_parameters():
        assert value.grad is not None, name
        assert value.grad.to_dense().abs().max() > 0, name


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_preset_keeps_the_rules_of_sharing(name: str) -> None:
    preset: Preset = PRESETS[name]
    assert preset.d_model % preset.heads == 0
    assert preset.heads % preset.kv_heads == 0
    assert preset.layers % preset.l_kv == 0
    assert preset.s_kv in (1, 2)
    assert preset.short < preset.context
    assert 0 <= preset.top <= (preset.experts or preset.top)


def test_code_embeddings_start_from_the_centroids() -> None:
    """Codes whose centroids lie together start together, those far apart start far apart."""
    torch.manual_seed(0)
    model = LazyDecoder(SMALL, CODES, ROWS)
    centroids = torch.randn(CODES, 5)
    centroids[1] = centroids[0]
    model.start_from_centroids([centroids.numpy()] * 3)
    for table in model.embeddings:
        near = (table[0] - table[1]).norm()
        assert near < 0.5
        assert all((table[0] - table[other]).norm() > 2 * near for other in range(2, CODES))


@pytest.mark.parametrize("sets", [1, 2])
@pytest.mark.parametrize("separate", [1, 2])
@pytest.mark.parametrize("short", [0, 2])
def test_contexts_looked_up_code_by_code_are_those_processed(
    sets: int, separate: int, short: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    preset = replace(SMALL, l_kv=sets, s_kv=separate, g_kv=2, short=short)
    model = random_model(preset, CODES, ROWS, seed=21).eval().requires_grad_(False)
    of = batch_of([0, 1, 3, 6, 6, 2, 5])
    want = model.process(of)
    model.prepare()
    for piece in (1, 2 * SMALL.context * preset.d_context, 1 << 18):  # requests: one, two, all
        monkeypatch.setattr("learner.context_processor.PIECE", piece)
        got = model.looked_up(of)
        assert torch.equal(got.present_BN, want.present_BN)
        assert len(got.keys) == len(got.values) == sets
        for ours, theirs in zip([*got.keys, *got.values], [*want.keys, *want.values], strict=True):
            assert ours.shape == theirs.shape
            assert (ours - theirs).abs().max() < 1e-6


def test_tables_never_outlive_their_weights() -> None:
    one, other = (
        random_model(SMALL, CODES, ROWS, seed).eval().requires_grad_(False) for seed in (22, 23)
    )
    of = batch_of([6])
    one.prepare()
    one.load_state_dict(other.state_dict())
    assert torch.equal(one.looked_up(of).keys[0], other.process(of).keys[0])
    one.prepare()
    assert (one.looked_up(of).keys[0] - other.process(of).keys[0]).abs().max() < 1e-6


def test_tables_are_not_made_of_weights_that_learn() -> None:
    with pytest.raises(ValueError, match="fixed weights"):
        random_model(SMALL, CODES, ROWS, seed=24).prepare()
