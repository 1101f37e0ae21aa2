"""The mixture of experts against a loop over positions, and its balance without an auxiliary loss."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from learner.batch import assemble
from learner.decoder import Block, ExpertBlock, LazyDecoder
from learner.experts import BALANCE_RATE, Experts
from learner.policy import load_state, state_of
from learner.presets import PRESETS
from learner.settings import LearnSettings
from learner.step import Trainer
from streams.blocks import digest_of
from tests.learner.makers import SMALL, learnable, random_catalogue, random_model
from tests.learner.test_decoder import batch_of, targets

PRESET = replace(SMALL, layers=4, experts=8, top=3, d_expert=8)
CODES, ROWS = 7, 32


def experts_of(seed: int = 0) -> Experts:
    torch.manual_seed(seed)
    return Experts(PRESET)


def by_position(experts: Experts, x_TD: Tensor) -> Tensor:
    """The definition, one position after another."""

    def swiglu(x_D: Tensor, into: Tensor, out: Tensor) -> Tensor:
        both = into @ x_D
        gate, up = both[: len(both) // 2], both[len(both) // 2 :]
        return out @ (gate * torch.sigmoid(gate) * up)

    rows = []
    for x_D in x_TD:
        score_X = 1 / (1 + (-(experts.router.weight @ x_D)).exp())
        chosen = sorted(
            range(PRESET.experts), key=lambda e: -float(score_X[e].detach() + experts.bias[e])
        )
        chosen = chosen[: PRESET.top]
        total = sum(score_X[e] for e in chosen)
        y_D = swiglu(x_D, experts.shared_in.weight, experts.shared_out.weight)
        for e in chosen:
            y_D = y_D + score_X[e] / total * swiglu(x_D, experts.into[e], experts.out[e])
        rows.append(y_D)
    return torch.stack(rows)


def max_share(experts: Experts) -> float:
    """The largest share of the load; uniform is 1 / experts."""
    return float(experts.load.max() / experts.load.sum())


def test_experts_do_what_a_loop_over_positions_does() -> None:
    experts = experts_of().double()
    experts.bias.copy_(0.3 * torch.randn(PRESET.experts))
    x = torch.randn(4, 5, PRESET.d_model, dtype=torch.float64, requires_grad=True)
    found = experts(x)
    expected = by_position(experts, x.flatten(0, 1)).reshape(x.shape)
    assert torch.allclose(found, expected, atol=1e-12)
    by_name = dict(experts.named_parameters())
    weights = torch.randn_like(found)
    ours = torch.autograd.grad((found * weights).sum(), [x, *by_name.values()])
    slow = torch.autograd.grad((expected * weights).sum(), [x, *by_name.values()])
    for name, one, other in zip(["x", *by_name], ours, slow, strict=True):
        assert torch.allclose(one, other, atol=1e-12), name
        assert one.abs().max() > 0, name


def test_an_expert_that_no_position_chose_changes_nothing_and_learns_nothing() -> None:
    experts = experts_of(1)
    experts.bias[5] = -10.0
    x = torch.randn(20, PRESET.d_model)
    found = experts(x)
    found.sum().backward()
    assert experts.load[5] == 0
    assert experts.load.sum() == 20 * PRESET.top
    assert experts.into.grad is not None
    assert (experts.into.grad.abs().amax(dim=(1, 2)) > 0).tolist() == [e != 5 for e in range(8)]


def test_the_bias_decides_who_works_and_never_how_loud() -> None:
    experts = experts_of(2)
    x = torch.randn(6, PRESET.d_model)
    before, gates = experts.route(x)
    assert torch.allclose(gates.sum(-1), torch.ones(6))
    experts.bias += 5.0  # all alike: the same choice, the same gates
    again, same = experts.route(x)
    assert torch.equal(before, again)
    assert torch.equal(gates, same)
    experts.bias[4] += 5.0
    chosen, gates = experts.route(x)
    assert (chosen == 4).any(-1).all()
    score = F.linear(x, experts.router.weight).sigmoid().gather(-1, chosen)
    assert torch.allclose(gates, score / score.sum(-1, keepdim=True))


def test_gradient_reaches_the_router_and_not_the_bias() -> None:
    model = random_model(PRESET, CODES, ROWS, seed=3)
    model(model.process(batch_of([6, 3])), targets(2, 3)).square().sum().backward()
    for block in model.blocks[2:]:
        assert isinstance(block, ExpertBlock)
        grad = block.experts.router.weight.grad
        assert grad is not None
        assert grad.abs().max() > 0
        assert not block.experts.bias.requires_grad


def test_after_a_step_biases_move_by_the_rate_against_the_load() -> None:
    experts = experts_of()
    experts.load.copy_(torch.tensor([4, 0, 9, 4, 4, 4, 3, 4]))  # mean 4
    experts.balance()
    assert experts.bias.tolist() == pytest.approx(
        [BALANCE_RATE * way for way in (0, 1, -1, 0, 0, 0, 1, 0)]
    )
    assert experts.load.sum() == 0
    before = experts.bias.clone()
    experts.balance()  # nothing seen
    assert torch.equal(experts.bias, before)


def test_only_training_counts_as_load() -> None:
    experts = experts_of()
    x = torch.randn(5, PRESET.d_model)
    with torch.no_grad():
        experts(x)
    experts.eval()
    experts(x)
    assert experts.load.sum() == 0
    experts.train()
    experts(x)
    assert experts.load.sum() == 5 * PRESET.top


def test_a_skewed_router_is_balanced_without_a_loss() -> None:
    experts = experts_of(4)
    with torch.no_grad():
        experts.router.weight[:3, 0] += 1.0
    generator = torch.Generator().manual_seed(0)
    shares = []
    for _ in range(120):
        x = torch.randn(256, PRESET.d_model, generator=generator)
        x[:, 0] = 2.0  # what the first three experts look for is in every position
        experts(x)
        shares.append(max_share(experts))
        experts.balance(rate=0.01)
    assert shares[0] > 0.28  # of at most 1/3
    assert sum(shares[-10:]) / 10 < 0.16  # uniform is 1/8
    unbalanced = experts_of(4)
    with torch.no_grad():
        unbalanced.router.weight[:3, 0] += 1.0
    unbalanced(x)
    assert max_share(unbalanced) > 0.28


def test_a_policy_with_experts_learns_and_stays_balanced() -> None:
    torch.manual_seed(5)
    model = LazyDecoder(PRESET, CODES, ROWS)
    of, sids = batch_of([6, 3, 5, 2]), targets(4, 3)
    optimiser = torch.optim.Adam(
        [value for name, value in model.named_parameters() if name != "context.users.weight"], 1e-2
    )
    losses, loads = [], torch.zeros(PRESET.experts, dtype=torch.int64)
    for _ in range(60):
        loss = F.cross_entropy(model(model.process(of), sids).flatten(0, 2), sids.flatten())
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        last = model.blocks[3]
        assert isinstance(last, ExpertBlock)
        loads += last.experts.load
        model.balance()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.3 * losses[0]
    assert (loads > 0).all()


def test_the_first_blocks_are_dense() -> None:
    model = LazyDecoder(PRESET, CODES, ROWS)
    assert [type(block) for block in model.blocks] == [Block, Block, ExpertBlock, ExpertBlock]


def test_the_bias_is_part_of_the_published_state_and_the_load_is_not() -> None:
    model = random_model(PRESET, CODES, ROWS, seed=6)
    model(model.process(batch_of([4])), targets(1, 3))
    before = state_of(model)
    name = "blocks.2.experts.bias"
    assert before[name].dtype == "float32"
    assert not any("load" in name for name in before)
    model.balance()
    after = state_of(model)
    assert digest_of(after) != digest_of(before)
    other = random_model(PRESET, CODES, ROWS, seed=7)
    load_state(other, after)
    assert digest_of(state_of(other)) == digest_of(after)
    assert abs(after[name]).max() == pytest.approx(BALANCE_RATE)


def test_a_learning_step_moves_the_bias_the_same_way_each_time() -> None:
    catalogue = random_catalogue(CODES, 40, seed=1)
    digests = set()
    for _ in range(2):
        trainer = Trainer(random_model(PRESET, CODES, ROWS, seed=8), LearnSettings(), 1e-3)
        for seed in range(3):
            batch = assemble(learnable(catalogue, 8, seed), catalogue.valid, PRESET.context, ROWS)
            assert trainer.step(batch) is not None
        state = state_of(trainer.model)
        digests.add(digest_of(state))
        assert abs(state["blocks.3.experts.bias"]).max() >= BALANCE_RATE * 0.99
    assert len(digests) == 1


def test_targets_do_not_see_one_another_through_experts() -> None:
    model = random_model(PRESET, CODES, ROWS, seed=9).eval()
    of, sids = batch_of([3, 5]), targets(2, 4)
    other = sids.clone()
    other[:, 1:] = (other[:, 1:] + 1) % CODES
    with torch.no_grad():
        kv = model.process(of)
        before, after = model(kv, sids), model(kv, other)
    # Not to the bit: how many positions an expert multiplies together decides the rounding.
    assert torch.allclose(before[:, 0], after[:, 0], atol=1e-5)
    assert (before[:, 1:] - after[:, 1:]).abs().max() > 0.01


def test_routing_is_done_in_float32_under_autocast() -> None:
    experts = experts_of(10)
    x = torch.randn(50, PRESET.d_model)
    plain, gates = experts.route(x)
    with torch.autocast("cpu", torch.bfloat16):
        chosen, same = experts.route(x)
        assert experts(x).dtype == torch.bfloat16
    assert torch.equal(plain, chosen)
    assert torch.equal(gates, same)


def test_more_choices_than_experts_are_refused() -> None:
    with pytest.raises(ValueError, match="top 9 of 8 experts"):
        Experts(replace(PRESET, top=9))


def test_the_reports_mixture_is_as_it_says() -> None:
    preset = PRESETS["4B-MoE"]
    assert (preset.experts, preset.top, preset.d_expert, preset.dense_layers) == (53, 3, 1408, 2)
    assert replace(preset, experts=0, d_expert=0) == PRESETS["0.5B"]


def test_serving_step_by_step_equals_teacher_forcing_with_experts() -> None:
    model = random_model(replace(PRESET, short=2), CODES, ROWS, seed=11).eval()
    of, sids = batch_of([6, 0, 1]), targets(3, 4)
    with torch.no_grad():
        kv = model.process(of)
        forced = model(kv, sids)
        for level in range(3):
            assert torch.allclose(forced[:, :, level], model.step(kv, sids[..., :level]), atol=1e-5)
