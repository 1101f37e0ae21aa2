"""Counted parameters and compute against the model itself, torch's counter, and the report's cells."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from learner.counting import (
    Load,
    active,
    encoder_decoder,
    kv_elements,
    lazy,
    lazy_activations,
    naive,
    parameters,
    report_encoder_decoder,
    report_lazy,
    report_naive,
    size,
)
from learner.decoder import LazyDecoder
from learner.presets import PRESETS, REPORT_CODES, Preset
from tests.learner.makers import SMALL, random_model
from tests.learner.test_decoder import batch_of, targets

CODES, ROWS = 7, 32
SIZES = {
    "plain": SMALL,
    "as wide as the embedding": replace(SMALL, d_embed=16),
    "untied": replace(SMALL, tied=False),
    "parts": replace(SMALL, short=2),
    "shared": replace(SMALL, layers=4, l_kv=2, s_kv=2),
    "grouped": replace(SMALL, layers=3, l_kv=3, g_kv=2),
    "experts": replace(SMALL, layers=4, experts=5, top=2, d_expert=8),
}
PLACES = {"bos", "places"}


def part_of(name: str) -> str:
    """The part that a parameter is counted in."""
    if name.startswith("context."):
        rest = name.removeprefix("context.")
        if "norms" in rest:
            return "norms"
        return {"users.weight": "users", "positions": "places"}.get(rest, "context")
    if name.startswith("blocks."):
        rest = name.split(".", 2)[2]
        if "_norm" in rest:
            return "norms"
        if rest.startswith("experts."):
            return "router" if "router" in rest else "experts"
        return rest.partition("_")[0]
    first = name.partition(".")[0]
    return "places" if first in PLACES else first


@pytest.mark.parametrize("preset", [*PRESETS.values(), *SIZES.values()], ids=[*PRESETS, *SIZES])
def test_parameters_by_part_are_those_of_the_model(preset: Preset) -> None:
    with torch.device("meta"):
        model = LazyDecoder(preset, REPORT_CODES, ROWS)
    found: Counter[str] = Counter()
    for name, value in model.named_parameters():
        found[part_of(name)] += value.numel()
    counted = parameters(preset, REPORT_CODES, ROWS)
    assert found == Counter({part: count for part, count in counted.items() if count})


@pytest.mark.parametrize("preset", SIZES.values(), ids=SIZES)
def test_compute_is_what_torch_counts(preset: Preset) -> None:
    requests, k = 3, 4
    model = random_model(preset, CODES, ROWS, seed=1)
    of, sids = batch_of([6, 2, 0]), targets(requests, k)
    counted = lazy(preset, CODES, Load(preset.positions, k))
    items = requests * k
    with sdpa_kernel(SDPBackend.MATH):  # plain products, which the counter sees
        with FlopCounterMode(display=False) as forward:
            logits = model(model.process(of), sids)
        with FlopCounterMode(display=False) as backward:
            logits.sum().backward()
    assert forward.get_total_flops() == pytest.approx(sum(counted.values()) / 3 * items)
    # Behaviours' features are data: nothing flows back into them.
    back = (2 * sum(counted.values()) - counted["features"]) / 3
    assert backward.get_total_flops() == pytest.approx(back * items)


def test_what_is_not_shared_counts_for_each_target() -> None:
    one, five = Load(512, 1), Load(512, 5)
    preset = PRESETS["1B"]
    alone, shared = lazy(preset, REPORT_CODES, one), lazy(preset, REPORT_CODES, five)
    moved = {part for part in alone if alone[part] != shared[part]}
    assert moved == {"context", "features"}
    assert alone["features"] == pytest.approx(5 * shared["features"])
    assert kv_elements(preset, one, 10) == 10 * 512 * 1792


@pytest.mark.parametrize(
    ("name", "nominal", "cells", "splits"),
    [
        ("0.1B", 1e8, (25.64, 17.72, 63.78, 1.98), ((6, 6), (4, 8))),
        ("0.5B", 5e8, (142.73, 104.73, 317.68, 9.55), ((7, 7), (5, 9))),
        ("1B", 1e9, (296.36, 204.21, 634.83, 18.89), ((9, 9), (6, 12))),
    ],
)
def test_the_reports_accounting_gives_its_cells_to_the_printed_digit(
    name: str,
    nominal: float,
    cells: tuple[float, ...],
    splits: tuple[tuple[int, int], ...],
) -> None:
    preset, load = PRESETS[name], Load(512, 5)
    found = [report_encoder_decoder(preset, *split, REPORT_CODES, load) for split in splits]
    found += [report_naive(preset, nominal, load), report_lazy(preset, nominal, load)]
    for parts, cell in zip(found, cells, strict=True):
        assert round(sum(parts.values()) / 1e9, 2) == cell


def test_another_ffn_or_key_maps_would_not_give_the_reports_cells() -> None:
    """What the cells of the encoder-decoders say about the FFN's width and the projections they leave out."""
    preset, load = PRESETS["1B"], Load(512, 5)
    layer = 6 * load.share * preset.d_model**2
    right = sum(report_encoder_decoder(preset, 9, 9, REPORT_CODES, load).values())
    for other in (
        right + 9 * 2 * layer,
        right + 9 * 3 * layer * (8 / 3 - 4),
    ):  # maps; an FFN of 8/3
        assert abs(other / 1e9 / 296.36 - 1) > 0.1


def test_the_mixture_has_the_experts_of_the_dense_model_at_work() -> None:
    mixture, dense = (parameters(PRESETS[name], REPORT_CODES, ROWS) for name in ("4B-MoE", "0.5B"))
    assert active(PRESETS["4B-MoE"], mixture) == size(dense) + mixture["router"]
    assert size(mixture) > 7 * size(dense)
    compute = [lazy(PRESETS[name], REPORT_CODES, Load(512, 5)) for name in ("4B-MoE", "0.5B")]
    assert compute[0]["experts"] + compute[0]["ffn"] == compute[1]["ffn"]


def test_baselines_as_built_are_dearer_than_the_lazy_decoder() -> None:
    for name in ("small", "0.1B", "1B"):
        preset, load = PRESETS[name], Load(512, 5)
        ours = sum(lazy(preset, 256, load).values())
        half = preset.layers // 2
        split = sum(encoder_decoder(preset, half, half, 256, load).values())
        whole = sum(naive(preset, 256, load).values())
        assert whole > split > 10 * ours


def test_kept_elements_are_21_widths_a_position_and_layer_besides_the_context() -> None:
    preset, load = PRESETS["1B"], Load(512, 5)
    own = lazy_activations(preset, load, 512) - 2 * kv_elements(preset, load, 512)
    assert own == 512 * 3 * 1792 * (18 * 21 + 1)
