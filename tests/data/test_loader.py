"""The loader: the Batch contract, determinism, restoring on other workers, and sources that do not fit."""

import dataclasses

import grain
import numpy as np
import pytest

from oq2vl_jax.config import DataConfig, DecoderConfig, ModelConfig, VisionConfig
from oq2vl_jax.data.loading.batch import IGNORE, Batch
from oq2vl_jax.data.loading.loader import make_loader, row_arrays
from oq2vl_jax.data.loading.mixture import SourceCounts, mix, short_names
from oq2vl_jax.data.packing.packed import PackedRows
from oq2vl_jax.data.packing.packer import PackConfig, pack_shards
from oq2vl_jax.data.packing.rows import PackedRow, decode_row, encode_row
from oq2vl_jax.errors import UserError
from oq2vl_jax.jobs import Execution
from tests.data.conftest import caption_sample

MODEL = ModelConfig(
    vision=VisionConfig(image_size=16, patch_size=8, hidden_size=16, intermediate_size=32, num_layers=2, num_heads=2),
    decoder=DecoderConfig(320, 32, 64, 1, 2, 1, 16),
    num_visual_tokens=4,
    image_token_id=268,
)


@pytest.fixture(scope="module")
def packed(tmp_path_factory, byte_tokenizer_folder):
    """Two packed sources, of 40 and 20 captions."""
    from webdataset import TarWriter

    folders = []
    for name, count in (("a", 40), ("b", 20)):
        root = tmp_path_factory.mktemp(name)
        with TarWriter(str(root / "0.tar"), mtime=0) as writer:
            for i in range(count):
                writer.write(caption_sample(i, text=f"{name} {i}"))
        pack_shards(
            PackConfig(
                str(root / "0.tar"), str(root / "out"), byte_tokenizer_folder, 64, 3, 4, "plain", execution=Execution(1)
            )
        )
        folders.append(str(root / "out"))
    return folders


def data_config(sources, **overrides):
    return DataConfig(**{"sources": tuple(sources), "num_tokens": 64, "max_images": 3, "template": "plain"} | overrides)


def take(loader, count):
    iterator = iter(loader)
    batches = [next(iterator) for _ in range(count)]
    loader.close()
    return batches


def assert_equal(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        for name, x, y in zip(Batch._fields, a, b, strict=True):
            assert np.array_equal(x, y), name


def test_a_batch_keeps_its_contract(packed):
    (batch,) = take(make_loader(data_config([packed[0]]), MODEL, 4, seed=0), 1)
    assert batch.tokens.shape == batch.labels.shape == batch.positions.shape == batch.segment_ids.shape == (4, 64)
    assert batch.images.shape == (4, 3, 16, 16, 3)
    assert batch.images.dtype == np.uint8
    assert all(getattr(batch, name).dtype == np.int32 for name in Batch._fields[:4])
    num_images = (batch.tokens == 268).sum(axis=1) // 4
    for row, count in enumerate(num_images):
        used = batch.images[row].reshape(3, -1).any(axis=1)
        assert used.tolist() == [slot < count for slot in range(3)]
    assert (batch.labels[batch.segment_ids == 0] == IGNORE).all()
    assert not np.isin(batch.labels, [268]).any()


def test_labels_are_the_next_token_of_the_same_document_as_drawn():
    s, image, a, b, c, e = 1, 9, 2, 3, 4, 5
    row = PackedRow(
        tokens=np.array([s, image, image, image, image, a, e, s, b, c, e]),
        is_labelled=np.array([1, 0, 0, 0, 0, 1, 1, 1, 0, 1, 1], bool),
        lengths=[7, 4], images=[b""], keys=["x", "y"],
    )  # fmt: skip
    i = IGNORE
    tokens, labels, positions, segments = row_arrays(row, data_config((), num_tokens=12), pad_id=7)
    assert tokens.tolist() == [s, image, image, image, image, a, e, s, b, c, e, 7]
    assert labels.tolist() == [i, i, i, i, a, e, i, i, c, e, i, i]
    assert positions.tolist() == [0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 0]
    assert segments.tolist() == [1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 0]
    _, labels, positions, segments = row_arrays(row, data_config((), num_tokens=12, attention_scope="row"), pad_id=7)
    assert labels.tolist() == [i, i, i, i, a, e, s, i, c, e, i, i]
    assert positions.tolist() == [*range(11), 0]
    assert segments.tolist() == [1] * 11 + [0]


def test_a_row_survives_its_bytes():
    row = PackedRow(np.arange(9, dtype=np.int32), np.arange(9) % 2 == 0, [4, 5], [b"\x00\xff", b""], ["k", "l"])
    back = decode_row(encode_row(row))
    assert all(np.array_equal(x, y) for x, y in zip(row, back, strict=True))
    with pytest.raises(ValueError, match="not a packed row"):
        decode_row(b"\x80")


def test_batches_depend_on_the_seed_and_not_on_threads_or_workers(packed):
    config = data_config(packed, weights=(2.0, 1.0))
    batches = take(make_loader(config, MODEL, 4, seed=3), 6)
    assert_equal(batches, take(make_loader(dataclasses.replace(config, num_threads=1), MODEL, 4, seed=3), 6))
    assert_equal(batches, take(make_loader(dataclasses.replace(config, num_workers=2), MODEL, 4, seed=3), 6))
    other = take(make_loader(config, MODEL, 4, seed=4), 6)
    assert not all(np.array_equal(x.tokens, y.tokens) for x, y in zip(batches, other, strict=True))


def test_restored_state_goes_on_exactly_on_another_number_of_workers(packed):
    config = data_config([packed[0]])
    undisturbed = take(make_loader(config, MODEL, 4, seed=0), 9)
    loader = make_loader(config, MODEL, 4, seed=0)
    iterator = iter(loader)
    for _ in range(5):
        next(iterator)
    state = loader.get_state()
    loader.close()
    for workers in (0, 2):
        restored = make_loader(dataclasses.replace(config, num_workers=workers), MODEL, 4, seed=0)
        restored.set_state(state)
        assert_equal(take(restored, 4), undisturbed[5:])


def test_processes_share_a_global_batch_between_them(packed):
    config = data_config([packed[0]])
    whole = take(make_loader(config, MODEL, 4, seed=0), 3)
    halves = [take(make_loader(config, MODEL, 4, 0, index, 2), 3) for index in (0, 1)]
    for step in range(3):
        rows = {row.tobytes() for half in halves for row in half[step].tokens}
        assert rows == {row.tobytes() for row in whole[step].tokens}


def test_an_epoch_holds_every_row_once_and_the_next_is_in_another_order(packed):
    import json
    from pathlib import Path

    rows = json.loads((Path(packed[0]) / "manifest.json").read_text())["rows"]
    batches = take(make_loader(data_config([packed[0]]), MODEL, 1, seed=0), 2 * rows)
    first, second = ([b.tokens.tobytes() for b in batches[i : i + rows]] for i in (0, rows))
    assert sorted(first) == sorted(second)
    assert len(set(first)) == rows
    assert first != second


def test_the_mixture_follows_its_weights(packed):
    batches = take(make_loader(data_config(packed, weights=(3.0, 1.0)), MODEL, 4, seed=0), 20)
    from_a = sum((row == ord("a")).any() for batch in batches for row in batch.tokens)
    assert from_a == 60


@pytest.mark.parametrize("weights", [(0.7, 0.3), (5.0, 1.0, 1.0), (0.123, 0.877), (1.0, 1.0, 1.0, 1.0), ()])
def test_any_thousand_rows_hold_the_weights_that_were_asked_for(weights):
    number = len(weights) or 3
    marks = [grain.MapDataset.source([i]).repeat() for i in range(number)]
    mixed = mix(marks, data_config([""] * number, weights=weights))
    drawn = np.array([mixed[i] for i in range(5000)])
    shares = np.array(weights or [1.0] * number) / (sum(weights) or number)
    for i, share in enumerate(shares):
        within = np.convolve(drawn == i, np.ones(1000), "valid")
        assert abs(within - 1000 * share).max() <= 2  # measured 1.0


def test_rows_and_epochs_are_counted_as_the_loader_gives_them(packed):
    config = data_config(packed, weights=(2.0, 1.0))
    counts, loader = SourceCounts(config), make_loader(config, MODEL, 4, seed=0)
    batches = take(loader, 12)
    for step in (3, 12, 5):
        from_a = sum((row == ord("a")).any() for batch in batches[:step] for row in batch.tokens)
        found = counts.up_to(4 * step)
        assert [found[f"rows/{name}"] for name in counts.names] == [from_a, 4 * step - from_a]
        assert found[f"epochs/{counts.names[0]}"] == from_a / len(PackedRows(packed[0]))


def test_sources_have_short_names():
    assert short_names(("a/x", "a/y/")) == ["x", "y"]
    assert short_names(("a/x", "b/x")) == ["a/x", "b/x"]
    assert short_names(("a/x", "a/x")) == ["x#0", "x#1"]


def test_sources_that_do_not_fit_are_explained_together(packed):
    with pytest.raises(UserError, match=r"num_tokens is 64, the config says 128.*max_images is 3, the config says 5"):
        make_loader(data_config([packed[0]], num_tokens=128, max_images=5), MODEL, 4, seed=0)
    with pytest.raises(UserError, match="visual_tokens is 4, the config says 1"):
        make_loader(data_config([packed[0]]), dataclasses.replace(MODEL, num_visual_tokens=1), 4, seed=0)
    with pytest.raises(UserError, match=r"no manifest\.json; pack it with"):
        make_loader(data_config(["/nowhere"]), MODEL, 4, seed=0)


def test_a_row_whose_image_does_not_decode_names_the_sample(tmp_path, packed):
    import json
    import shutil
    from pathlib import Path

    from array_record.python.array_record_module import ArrayRecordWriter

    from oq2vl_jax.data.packing.rows import WRITER_OPTIONS

    broken = tmp_path / "broken"
    shutil.copytree(packed[0], broken)
    row = PackedRow(np.array([1, *[268] * 4, 5], np.int32), np.ones(6, bool), [6], [b"no picture"], ["sample-17"])
    writer = ArrayRecordWriter(str(broken / "rows-00000.array_record"), WRITER_OPTIONS)
    writer.write(encode_row(row))
    writer.close()
    manifest = json.loads((Path(broken) / "manifest.json").read_text())
    manifest["files"][0]["rows"] = 1
    (broken / "manifest.json").write_text(json.dumps(manifest))
    for workers in (0, 1):
        with pytest.raises(UserError, match=r"image 0 of the row of sample-17: it is damaged or none of"):
            take(make_loader(data_config([str(broken)], num_workers=workers), MODEL, 1, seed=0), 1)
