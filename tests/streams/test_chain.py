"""The chain of versions: begun at an anchor, followed by deltas, and left where something does not fit."""

from pathlib import Path

import numpy as np
import pytest

from streams.blocks import State, blocked_state, digest_of
from streams.chain import Chain, anchored, in_order
from streams.delta import changes
from streams.events import encode
from streams.signing import KeyFileError, Signer, Trust, make_pair
from streams.weights import (
    Assembler,
    Commit,
    Manifest,
    Trial,
    WeightError,
    pack,
    pack_anchored,
    schema_of,
)

Whole = tuple[Manifest, bytes]


def state_of(version: int) -> State:
    rng = np.random.default_rng(version)
    table = np.zeros((50, 4), np.float32)
    table[:version] = 1.0
    return {"table": table, "dense": rng.standard_normal(6)}


def manifest_of(version: int, base: int = 0, lineage: str = "line") -> Manifest:
    state = state_of(version)
    return Manifest(
        version=version,
        lineage=lineage,
        codebook="c0de",
        preset="tiny",
        codes=32,
        user_rows=50,
        schema=schema_of(state),
        digest=digest_of(state),
        base=base,
        anchor=1,
        chain=10 * version,
        size_bytes=0,
        chunks=0,
        journal=[],
        watermark_ms=5,
        created_ms=7,
    )


def assembled(records: list[tuple[str, bytes]], trust: Trust | None = None) -> Whole:
    assembler = Assembler(trust)
    (whole,) = [found for _, value in records if (found := assembler.take(value)) is not None]
    return whole


def anchor(version: int, lineage: str = "line") -> Whole:
    return assembled(pack(manifest_of(version, lineage=lineage), state_of(version)))


def delta(version: int, base: int | None = None, lineage: str = "line") -> Whole:
    base = version - 1 if base is None else base
    content, _ = changes(blocked_state(state_of(base)), state_of(version))
    return assembled(pack(manifest_of(version, base, lineage), content))


def begun() -> Chain:
    chain = Chain()
    assert chain.take(*anchor(3))
    return chain


def holds(chain: Chain, version: int) -> bool:
    assert chain.head is not None
    assert digest_of(chain.head.state) == digest_of(state_of(version))
    return chain.head.number == version


def test_an_anchor_and_its_deltas_lead_to_the_newest_version() -> None:
    chain = begun()
    for version in (4, 5, 6):
        assert chain.take(*delta(version))
    assert holds(chain, 6)


def test_a_delta_before_any_anchor_is_passed_over_and_the_anchor_says_where_to_read_again() -> None:
    chain = Chain()
    assert not chain.take(*delta(4))
    assert chain.head is None
    assert chain.rewind is None
    assert chain.take(*anchor(3))
    assert chain.rewind == 30


def test_what_is_known_changes_nothing() -> None:
    chain = begun()
    chain.take(*delta(4))
    chain.rewind = None
    for whole in (anchor(3), anchor(4), delta(4), delta(3)):
        assert not chain.take(*whole)
    assert chain.rewind is None
    assert holds(chain, 4)


def test_an_old_version_played_again_never_comes_back() -> None:
    chain = begun()
    chain.take(*delta(4))
    assert not chain.take(*anchor(2))
    assert holds(chain, 4)


def refused(chain: Chain, whole: Whole, says: str) -> None:
    before = chain.head
    with pytest.raises(WeightError, match=says):
        chain.take(*whole)
    assert chain.head is before


def test_a_gap_is_refused_until_the_next_anchor() -> None:
    chain = begun()
    refused(chain, delta(5), "version 5: a delta of version 4, and version 3 is here")
    refused(chain, delta(6), "version 6: a delta of version 5")
    assert chain.take(*anchor(7))
    assert chain.rewind == 70
    assert chain.take(*delta(8))
    assert holds(chain, 8)


def test_a_delta_with_a_wrong_base_state_is_seen_by_the_digest() -> None:
    chain = begun()
    manifest, _ = delta(4)
    _, foreign = assembled(
        pack(manifest_of(4, 3), changes(blocked_state(state_of(6)), state_of(4))[0])
    )
    refused(chain, (manifest, foreign), "version 4: digest")
    assert holds(chain, 3)


def test_a_damaged_delta_is_refused_by_its_version() -> None:
    manifest, content = delta(4)
    for at in range(0, len(content), 7):
        damaged = bytearray(content)
        damaged[at] ^= 0x55
        chain = begun()
        try:
            chain.take(manifest, bytes(damaged))
        except WeightError as error:
            assert "version 4" in str(error)
            assert holds(chain, 3)
        else:  # JSON has spellings that mean the same
            assert holds(chain, 4)


def test_a_second_version_of_the_same_number_is_refused() -> None:
    chain = begun()
    other = manifest_of(3)
    state = state_of(5)
    other.digest = digest_of(state)
    refused(chain, assembled(pack(other, state)), "version 3: a second one")


@pytest.mark.parametrize("whole", [anchor(4, "other"), delta(4, lineage="other")])
def test_another_lineage_is_refused(whole: Whole) -> None:
    refused(begun(), whole, "version 4: of lineage other, not line")


def test_a_version_without_a_delta_waits_for_its_anchor() -> None:
    chain = begun()
    assert not chain.take(*assembled(pack_anchored(manifest_of(4))))
    assert chain.take(*anchor(4))
    assert holds(chain, 4)


def test_deltas_come_before_the_anchor_of_the_same_version() -> None:
    arrived = in_order([anchor(5), delta(6), delta(5), delta(4)])
    assert [(manifest.version, manifest.base) for manifest, _ in arrived] == [
        (4, 3),
        (5, 4),
        (5, 0),
        (6, 5),
    ]


def test_what_arrived_in_any_order_is_followed_and_tells_from_where_to_read_again() -> None:
    chain = Chain()
    refused, again = chain.follow([delta(6), anchor(3), delta(4), delta(8), delta(5)])
    assert [(manifest.version, str(error)) for manifest, error in refused] == [
        (8, "version 8: a delta of version 7, and version 6 is here")
    ]
    assert again == 30
    assert holds(chain, 6)
    assert chain.follow([delta(7)]) == ([], None), "said once"
    assert holds(chain, 7)


def test_a_chain_goes_on_from_a_version_that_was_had_elsewhere() -> None:
    chain = Chain()
    chain.begin(anchored(*anchor(5)))
    refused, again = chain.follow([anchor(4), delta(5)])
    assert (refused, again) == ([], 50)
    assert chain.take(*delta(6))
    assert holds(chain, 6)


def test_a_trial_is_nothing_to_a_reader() -> None:
    assembler = Assembler()
    assert assembler.take(encode(Trial(data=b"x" * 100))) is None
    records = pack(manifest_of(3), state_of(3))
    values = [value for _, value in records]
    values.insert(1, encode(Trial(data=b"x")))
    assert [assembler.take(value) is not None for value in values][-1]


# --- signatures -------------------------------------------------------------------------------------


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Signer, Trust]:
    private, public = make_pair(tmp_path / "keys")
    assert private.stat().st_mode & 0o077 == 0
    return Signer(private), Trust.read(public)


def test_a_signed_version_is_taken(keys: tuple[Signer, Trust]) -> None:
    signer, trust = keys
    chain = Chain()
    assert chain.take(*assembled(pack(manifest_of(3), state_of(3), signer), trust))
    content, _ = changes(blocked_state(state_of(3)), state_of(4))
    assert chain.take(*assembled(pack(manifest_of(4, 3), content, signer), trust))


def test_a_version_that_is_not_or_wrongly_signed_is_refused(
    keys: tuple[Signer, Trust], tmp_path: Path
) -> None:
    signer, trust = keys
    other, _ = make_pair(tmp_path / "other")
    with pytest.raises(WeightError, match="version 3: not signed"):
        assembled(pack(manifest_of(3), state_of(3)), trust)
    with pytest.raises(WeightError, match="version 3: wrongly signed"):
        assembled(pack(manifest_of(3), state_of(3), Signer(other)), trust)
    records = pack(manifest_of(3), state_of(3), signer)
    forged = manifest_of(3)
    forged.digest = "0" * 32
    pack(forged, state_of(3))  # its size and chunks
    with pytest.raises(WeightError, match="version 3: wrongly signed"):
        assembled([("", encode(forged)), *records[1:]], trust)


def test_a_signature_cannot_be_borrowed_from_another_version(keys: tuple[Signer, Trust]) -> None:
    signer, trust = keys
    first, second = (pack(manifest_of(version), state_of(version), signer) for version in (3, 4))
    borrowed = encode(Commit(version=4, signature=signer.sign(first[0][1])))
    with pytest.raises(WeightError, match="version 4: wrongly signed"):
        assembled([*second[:-1], ("", borrowed)], trust)


def test_a_key_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    private, public = make_pair(tmp_path)
    with pytest.raises(KeyFileError, match="is there already"):
        make_pair(tmp_path)
    for wrong in (
        lambda: Signer(public),
        lambda: Trust.read(private),
        lambda: Trust.read(tmp_path / "no"),
    ):
        with pytest.raises(KeyFileError, match=str(tmp_path)):
            wrong()
