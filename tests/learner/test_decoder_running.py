"""Where and how the decoder runs: names of its state, devices, precision, compilation, and that it learns."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from learner.decoder import LazyDecoder
from learner.policy import build, compile_blocks, state_of
from learner.presets import PRESETS
from learner.settings import PolicySettings
from ops.kinds import kinds
from tests.learner.makers import SMALL, random_model
from tests.learner.test_decoder import batch_of, logits_of, targets

CODES, ROWS = 7, 32
PARTS = replace(SMALL, layers=4, l_kv=2, s_kv=2, g_kv=2, short=2)

TINY_STATE = """
bos places embeddings.0 embeddings.1 embeddings.2 context.positions context.users.weight context.codes.weight
context.features.weight context.static.weight context.static.bias context.key_norms.0.weight
blocks.0.cross_norm.weight blocks.0.cross_query.weight blocks.0.cross_out.weight blocks.0.self_norm.weight
blocks.0.self_qkv.weight blocks.0.self_out.weight blocks.0.ffn_norm.weight blocks.0.ffn_in.weight
blocks.0.ffn_out.weight norms.0.weight norms.1.weight norms.2.weight heads.0.weight heads.0.bias heads.1.weight
heads.1.bias heads.2.weight heads.2.bias
"""


def gradients(model: LazyDecoder, *, seed: int = 0) -> dict[str, Tensor]:
    model.zero_grad()
    logits = model(model.process(batch_of([6, 3])), targets(2, 3, seed))
    loss = F.cross_entropy(logits.flatten(0, 2).float(), targets(2, 3, seed).flatten())
    loss.backward()  # type: ignore[no-untyped-call]
    found = {}
    for name, value in model.named_parameters():
        assert value.grad is not None
        found[name] = value.grad.to_dense().clone()
    return found


def test_names_and_order_of_the_state_of_tiny_stay() -> None:
    """Published versions are compared by name, and optimisers' states in checkpoints are kept by order."""
    model = build("tiny", 32, 64)
    assert [name for name, _ in model.named_parameters()] == TINY_STATE.split()
    assert set(state_of(model)) == set(TINY_STATE.split())


def test_every_preset_can_be_configured() -> None:
    assert kinds(PolicySettings)["preset"].choices == tuple(PRESETS)


@pytest.mark.parametrize("tied", [True, False])
def test_a_deeper_policy_with_parts_learns(tied: bool) -> None:
    torch.manual_seed(5)
    model = LazyDecoder(replace(PARTS, tied=tied), CODES, ROWS)
    of, sids = batch_of([6, 3, 5, 2]), targets(4, 3)
    dense = [value for name, value in model.named_parameters() if name != "context.users.weight"]
    optimiser = torch.optim.Adam(dense, 1e-2)
    losses = []
    for _ in range(60):
        loss = F.cross_entropy(model(model.process(of), sids).flatten(0, 2), sids.flatten())
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.3 * losses[0]


def test_inputs_follow_the_parameters_to_their_device() -> None:
    """On torch's meta device, where nothing that stays on the CPU could be multiplied."""
    with torch.device("meta"):
        model = LazyDecoder(PARTS, CODES, ROWS)
    of, sids = batch_of([6, 3]), targets(2, 3)
    kv = model.process(of)
    assert model(kv, sids).device.type == "meta"
    assert model.step(kv, sids[..., :2]).shape == (2, 3, CODES)


@pytest.mark.parametrize("seed", range(4))
def test_bfloat16_under_autocast_is_close_to_float32(seed: int) -> None:
    """2^-8 is .4 %; through four blocks with sharp attention .8 to 3.3 % of the logits' spread were measured."""
    model = random_model(PARTS, CODES, ROWS, seed)
    of, sids = batch_of([6, 3, 0]), targets(3, 3)
    exact = logits_of(model, of, sids)
    with torch.autocast("cpu", torch.bfloat16):
        rough = logits_of(model, of, sids).float()
    error = float((rough - exact).square().mean().sqrt() / exact.std())
    assert 1e-4 < error < 0.06


@pytest.mark.parametrize("seed", range(4))
def test_gradients_of_bfloat16_are_close_to_those_of_float32(seed: int) -> None:
    """The least similar of all parameters' gradients had a cosine of .97 to .997."""
    model = random_model(PARTS, CODES, ROWS, seed)
    exact = gradients(model)
    with torch.autocast("cpu", torch.bfloat16):
        rough = gradients(model)
    for name, value in exact.items():
        cosine = F.cosine_similarity(value.flatten(), rough[name].flatten(), dim=0)
        assert cosine > 0.95, name


@pytest.mark.soak
@pytest.mark.filterwarnings("default")  # the compiler's own
@pytest.mark.timeout(600)
def test_compiled_blocks_change_logits_and_gradients_by_rounding_only() -> None:
    preset = replace(SMALL, d_model=64, d_ffn=256, d_embed=64, short=2)
    plain = random_model(preset, CODES, ROWS, seed=4)
    compiled = compile_blocks(random_model(preset, CODES, ROWS, seed=4))
    assert set(state_of(compiled)) == set(state_of(plain))
    for seed in range(2):
        expected, found = gradients(plain, seed=seed), gradients(compiled, seed=seed)
        for name, value in expected.items():
            largest = float(value.abs().max())
            assert torch.allclose(found[name], value, rtol=1e-4, atol=1e-5 * largest), name
    of, sids = batch_of([6, 3, 0]), targets(3, 2)
    assert torch.allclose(logits_of(compiled, of, sids), logits_of(plain, of, sids), atol=1e-4)
