"""Uid sets: the format on disk, membership, multiplicity."""

import numpy as np
import pytest

from oq2vl_jax.data.samples.ids import parse_uid
from oq2vl_jax.data.samples.uids import UID_DTYPE, UidSet
from oq2vl_jax.errors import UserError


def random_halves(count, seed, top=2**64):
    return np.random.default_rng(seed).integers(0, top, (2, count), dtype=np.uint64, endpoint=False)


@pytest.mark.parametrize("top", [2**64 - 1, 5, 2**30])
def test_membership_is_that_of_a_python_set(top):
    """Random ids; few different ones; ids whose leading bits are all the same."""
    high, low = random_halves(3000, 0, top)
    asked_high, asked_low = np.concatenate([random_halves(2000, 1, top), [high[:500], low[:500]]], axis=1)
    members = set(zip(high.tolist(), low.tolist(), strict=True))
    expected = [pair in members for pair in zip(asked_high.tolist(), asked_low.tolist(), strict=True)]
    uids = UidSet(high, low)
    assert uids.contains(asked_high, asked_low).tolist() == expected
    found = uids.find(asked_high, asked_low)
    assert (uids.high[found[found >= 0]] == asked_high[found >= 0]).all()


def test_the_file_is_datacomps(tmp_path):
    high, low = random_halves(100, 2)
    UidSet(high, low).save(str(tmp_path / "uids.npy"))
    stored = np.load(tmp_path / "uids.npy")
    assert stored.dtype == UID_DTYPE
    assert stored.tolist() == sorted(zip(high.tolist(), low.tolist(), strict=True))
    assert (tmp_path / "uids.npy").stat().st_size == 128 + 16 * 100
    loaded = UidSet.load(str(tmp_path / "uids.npy"))
    assert (loaded.high == np.sort(high)).all()


def test_copies_are_counted_and_unique_drops_them():
    uids = UidSet([7, 1, 7, 7, 7], [0, 5, 2, 0, 0])
    assert [uids.count(7, 0), uids.count(7, 2), uids.count(1, 5), uids.count(1, 6), uids.count(9, 9)] == [3, 1, 1, 0, 0]
    assert len(uids.unique()) == 3


def test_an_empty_set_has_no_members():
    empty = UidSet([], [])
    assert not empty.contains(*random_halves(5, 0)).any()
    assert empty.count(1, 1) == 0
    assert len(empty.unique()) == 0


def test_uids_are_32_hex_digits():
    assert parse_uid("0" * 31 + "f") == (0, 15)
    assert parse_uid("F" * 16 + "0" * 16) == (2**64 - 1, 0)
    for text in (
        "",
        "0" * 31,
        "0" * 33,
        "g" * 32,
        " " + "0" * 31,
        "0x" + "0" * 30,
        "+" + "1" * 31,
        None,
        5,
        "1_1" + "1" * 29,
    ):
        assert parse_uid(text) is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a whole"),
        (b"no array", "not a whole"),
        (np.arange(4), "expected a 1-d array of dtype u8,u8"),
        (np.array(["a", "b"], object), "not a whole"),
    ],
)
def test_other_files_are_explained(tmp_path, content, message):
    file = tmp_path / "uids.npy"
    file.write_bytes(content) if isinstance(content, bytes) else np.save(file, content, allow_pickle=True)
    with pytest.raises(UserError, match=message):
        UidSet.load(str(file))
    with pytest.raises(UserError, match="no such file"):
        UidSet.load(str(tmp_path / "nothing.npy"))


def test_an_archive_and_a_header_that_claims_too_much_are_explained(tmp_path):
    np.savez(tmp_path / "a.npz", a=np.zeros(3))
    with pytest.raises(UserError, match="an archive of arrays"):
        UidSet.load(str(tmp_path / "a.npz"))
    np.save(tmp_path / "b.npy", np.zeros(3, UID_DTYPE))
    content = (tmp_path / "b.npy").read_bytes().replace(b"(3,)", b"(9999999999999,)", 1)
    (tmp_path / "b.npy").write_bytes(content)
    with pytest.raises(UserError, match="not a whole"):
        UidSet.load(str(tmp_path / "b.npy"))
