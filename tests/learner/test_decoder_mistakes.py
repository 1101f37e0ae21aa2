"""The mistakes that copies of this model make: each check passes ours and fails a deliberately wrong variant."""

from collections.abc import Callable
from dataclasses import replace
from itertools import permutations, product

import pytest
import torch
from torch import Tensor, nn

from learner.context import Contexts
from learner.context_processor import ContextProcessor, KeyValues
from learner.counting import parameters
from learner.decoder import Block, LazyDecoder
from learner.presets import Preset
from tests.learner.makers import SMALL, random_model
from tests.learner.test_decoder import batch_of, logits_of, targets

CODES, ROWS = 7, 32
SHARING = [
    replace(SMALL, layers=4, s_kv=s_kv, l_kv=l_kv, g_kv=g_kv, short=short)
    for s_kv, l_kv, g_kv, short in product((1, 2), (1, 2, 4), (4, 2, 1), (0, 2))
]


def rms_normed(x: Tensor, weight: Tensor) -> Tensor:
    eps = torch.finfo(x.dtype).eps
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def named(preset: Preset) -> str:
    parts = f"s{preset.s_kv}-l{preset.l_kv}-g{preset.kv_heads}"
    return f"{parts}-parts" if preset.short else parts


# Key/value projection


def context_by_hand(model: LazyDecoder, of: Contexts) -> Tensor:
    """`[B, N, d_context]`, position by position: one linear map of what stands there, and nothing else."""
    preset, state = model.preset, model.context.state_dict()
    rows = []
    for user, codes, features in zip(of.users_B, of.codes_BTL, of.features_BTF, strict=True):
        line = [state["static.weight"] @ state["users.weight"][user] + state["static.bias"]]
        for place in range(len(codes)):
            age = len(codes) - 1 - place  # 0: the newest behaviour
            part = "long_" if preset.short and age >= preset.short else ""
            code = torch.cat([model.embeddings[level][codes[place, level]] for level in range(3)])
            line.append(
                state[f"{part}codes.weight"] @ code
                + state[f"{part}features.weight"] @ features[place]
                + state["positions"][preset.context - 1 - age]
            )
        rows.append(torch.stack(line))
    return torch.stack(rows)


def assert_keys_are_the_normed_context(model: LazyDecoder) -> None:
    """k_l = RMSNorm(C_{l S_kv}), v_l = RMSNorm(C_{l S_kv + 1}) or k_l, and no parameter besides."""
    preset = model.preset
    of = batch_of([6, 3, 0])
    with torch.no_grad():
        chunks = context_by_hand(model, of).chunk(preset.s_kv * preset.l_kv, dim=-1)
        kv = model.process(of)
    assert chunks[0].shape[-1] == preset.kv_heads * preset.d_head
    state = model.context.state_dict()
    for index in range(preset.l_kv):
        for found, kind, chunk in (
            (kv.keys[index], "key", chunks[index * preset.s_kv]),
            (
                kv.values[index],
                "value" if preset.s_kv == 2 else "key",
                chunks[(index + 1) * preset.s_kv - 1],
            ),
        ):
            expected = rms_normed(chunk, state[f"{kind}_norms.{index}.weight"])
            assert torch.allclose(found.transpose(1, 2).flatten(2), expected, atol=1e-5)
    cross = {name for name, _ in model.blocks[0].named_parameters() if name.startswith("cross")}
    assert cross == {"cross_norm.weight", "cross_query.weight", "cross_out.weight"}
    counted = parameters(preset, CODES, ROWS)
    assert sum(value.numel() for value in model.parameters()) == sum(counted.values())


@pytest.mark.parametrize("preset", SHARING, ids=named)
def test_keys_and_values_are_the_normed_context_and_nothing_else(preset: Preset) -> None:
    assert_keys_are_the_normed_context(random_model(preset, CODES, ROWS, seed=1))


def test_a_kept_key_projection_is_found() -> None:
    class Projected(ContextProcessor):
        def forward(self, contexts: Contexts, embeddings: nn.ParameterList) -> KeyValues:
            kv = super().forward(contexts, embeddings)
            B, G, N, d = kv.keys[0].shape
            flat = kv.keys[0].transpose(1, 2).reshape(B, N, G * d)
            projected = (flat @ self.get_parameter("W_k")).reshape(B, N, G, d).transpose(1, 2)
            return KeyValues([projected], [projected], kv.present_BN)

    model = random_model(replace(SMALL, layers=1), CODES, ROWS, seed=1)
    model.context.__class__ = Projected
    model.context.register_parameter("W_k", nn.Parameter(torch.randn(16, 16)))
    with pytest.raises(AssertionError):
        assert_keys_are_the_normed_context(model)
    with torch.no_grad():  # values as they should be: the parameter alone gives it away
        model.context.get_parameter("W_k").copy_(torch.eye(16))
    with pytest.raises(AssertionError):
        assert_keys_are_the_normed_context(model)


# One norm for all sets


def assert_every_set_has_its_own_norm(model: LazyDecoder) -> None:
    """Doubling one norm's weight doubles one set, and there are as many weights as sets."""
    norms = [*model.context.key_norms, *model.context.value_norms]
    of = batch_of([5])

    def sets() -> list[Tensor]:
        with torch.no_grad():
            kv = model.process(of)
        return [*kv.keys, *kv.values][: len(norms)]

    before = sets()
    names = [name for name, _ in model.context.named_parameters() if "_norms." in name]
    assert len(names) == model.preset.s_kv * model.preset.l_kv
    for number, norm in enumerate(norms):
        assert isinstance(norm, nn.RMSNorm)
        with torch.no_grad():
            norm.weight.mul_(2.0)
        moved = [not torch.equal(old, new) for old, new in zip(before, sets(), strict=True)]
        with torch.no_grad():
            norm.weight.div_(2.0)
        assert moved == [place == number for place in range(len(norms))]


@pytest.mark.parametrize("preset", SHARING, ids=named)
def test_every_set_has_a_norm_of_its_own(preset: Preset) -> None:
    assert_every_set_has_its_own_norm(random_model(preset, CODES, ROWS, seed=2))


@pytest.mark.parametrize("shared", ["key with key", "value with key"])
def test_a_shared_norm_is_found(shared: str) -> None:
    model = random_model(replace(SMALL, layers=4, l_kv=2, s_kv=2), CODES, ROWS, seed=2)
    keys, values = model.context.key_norms, model.context.value_norms
    if shared == "key with key":
        keys[1] = keys[0]
    else:
        values[0] = keys[0]
    with pytest.raises(AssertionError):
        assert_every_set_has_its_own_norm(model)


# Order within a block


def block_by_hand(block: Block, x_PD: Tensor, chunk_NW: Tensor, order: tuple[str, ...]) -> Tensor:
    """A block of one target over one context without padding, by plain products; keys are values."""
    state, preset = block.state_dict(), block.preset
    d, group = preset.d_head, preset.heads // preset.kv_heads

    def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        score = q @ k.T / d**0.5
        if causal:
            score = score.masked_fill(torch.ones_like(score).triu(1).bool(), -torch.inf)
        y: Tensor = score.softmax(-1) @ v
        return y

    def head(x: Tensor, number: int) -> Tensor:
        return x[:, number * d : (number + 1) * d]

    def cross(x: Tensor) -> Tensor:
        q = rms_normed(x, state["cross_norm.weight"]) @ state["cross_query.weight"].T
        parts = [
            attention(head(q, h), head(chunk_NW, h // group), head(chunk_NW, h // group), False)
            for h in range(preset.heads)
        ]
        y: Tensor = torch.cat(parts, -1) @ state["cross_out.weight"].T
        return y

    def own(x: Tensor) -> Tensor:
        qkv = rms_normed(x, state["self_norm.weight"]) @ state["self_qkv.weight"].T
        q, k, v = qkv.chunk(3, -1)
        parts = [attention(head(q, h), head(k, h), head(v, h), True) for h in range(preset.heads)]
        y: Tensor = torch.cat(parts, -1) @ state["self_out.weight"].T
        return y

    def ffn(x: Tensor) -> Tensor:
        gate, up = (rms_normed(x, state["ffn_norm.weight"]) @ state["ffn_in.weight"].T).chunk(2, -1)
        y: Tensor = (gate * gate.sigmoid() * up) @ state["ffn_out.weight"].T
        return y

    sublayers: dict[str, Callable[[Tensor], Tensor]] = {"cross": cross, "self": own, "ffn": ffn}
    for name in order:
        x_PD = x_PD + sublayers[name](x_PD)
    return x_PD


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_a_block_is_cross_attention_then_self_attention_then_swiglu(kv_heads: int) -> None:
    model = random_model(replace(SMALL, layers=1, g_kv=kv_heads), CODES, ROWS, seed=3).double()
    (block,) = model.blocks
    assert isinstance(block, Block)
    keys = torch.randn(1, kv_heads, 9, SMALL.d_head, dtype=torch.float64)
    x = torch.randn(1, 1, 3, SMALL.d_model, dtype=torch.float64)
    with torch.no_grad():
        found = block(x, keys, keys, torch.ones(1, 9, dtype=torch.bool))[0, 0]
    chunk = keys[0].transpose(0, 1).flatten(1)
    right = ("cross", "self", "ffn")
    for order in permutations(right):
        same = torch.allclose(found, block_by_hand(block, x[0, 0], chunk, order), atol=1e-10)
        assert same == (order == right), order


# Targets that see one another


def assert_targets_keep_apart(model: LazyDecoder) -> None:
    """To change one target changes the others' logits by no bit, and its own."""
    of, sids = batch_of([3, 5]), targets(2, 4)
    before = logits_of(model, of, sids)
    for slot in range(4):
        other = sids.clone()
        other[:, slot] = (other[:, slot] + 1) % CODES
        moved = (logits_of(model, of, other) != before).flatten(2).any(-1).any(0)
        assert moved.tolist() == [place == slot for place in range(4)]


@pytest.mark.parametrize("preset", SHARING[::5], ids=named)
def test_targets_keep_apart(preset: Preset) -> None:
    assert_targets_keep_apart(random_model(preset, CODES, ROWS, seed=4))


def test_targets_in_one_sequence_are_found() -> None:
    class Joined(Block):
        def attend(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            B, k, P, D = x.shape
            return super().attend(x.reshape(B, 1, k * P, D), mask).reshape(x.shape)

    model = random_model(SMALL, CODES, ROWS, seed=4)
    model.blocks[0].__class__ = Joined
    with pytest.raises(AssertionError):
        assert_targets_keep_apart(model)


# One norm or head for all levels


def assert_levels_have_their_own_ends(model: LazyDecoder) -> None:
    """To change one level's norm or head changes that level's logits only."""
    of, sids = batch_of([3]), targets(1, 2)
    before = logits_of(model, of, sids)
    for level, part in product(range(3), (model.norms, model.heads)):
        weight = part[level].get_parameter("weight")
        kept = weight.detach().clone()
        with torch.no_grad():
            weight.add_(0.5 * torch.randn_like(weight))
        moved = (logits_of(model, of, sids) != before).any(-1).flatten(0, 1).any(0)
        with torch.no_grad():
            weight.copy_(kept)
        assert moved.tolist() == [place == level for place in range(3)]


@pytest.mark.parametrize("tied", [True, False])
def test_levels_have_a_norm_and_a_head_each(tied: bool) -> None:
    assert_levels_have_their_own_ends(random_model(replace(SMALL, tied=tied), CODES, ROWS, seed=5))


@pytest.mark.parametrize("part", ["norms", "heads"])
def test_one_norm_or_head_for_all_levels_is_found(part: str) -> None:
    model = random_model(SMALL, CODES, ROWS, seed=5)
    parts = getattr(model, part)
    parts[1] = parts[0]
    with pytest.raises(AssertionError):
        assert_levels_have_their_own_ends(model)
