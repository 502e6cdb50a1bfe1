"""Our CLIP against transformers' on random tiny weights, through the converter, the scorer and the command."""

import io

import numpy as np
import polars as pl
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from convert.from_clip import FromClipConfig, convert
from oq2vl_jax.curate.clip_scorer import ClipScorer, crop
from oq2vl_jax.curate.score import ScoreConfig, score_shards
from oq2vl_jax.data.samples.shards import Sample
from oq2vl_jax.errors import UserError
from oq2vl_jax.jobs import Execution
from tests.convert.conftest import randomize
from tests.data.conftest import caption_sample, png

COSINE_TOLERANCE = 2e-6  # measured 7.6e-8
IMAGE_SIZE = 28


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """(Hugging Face folder, torch model, checkpoint) of a random CLIP of two different towers."""
    folder = tmp_path_factory.mktemp("clip")
    letters = [chr(c) for c in range(97, 123)]
    vocab = {token: i for i, token in enumerate([*letters, *(f"{c}</w>" for c in letters)])}
    vocab |= {"th": 52, "<|startoftext|>": 53, "<|endoftext|>": 54}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=[("t", "h")], model_max_length=16)
    tokenizer.save_pretrained(folder)
    vision = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 3,
              "image_size": IMAGE_SIZE, "patch_size": 7, "hidden_act": "quick_gelu"}  # fmt: skip
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
            "vocab_size": 60, "max_position_embeddings": 16, "hidden_act": "quick_gelu",
            "bos_token_id": 53, "eos_token_id": 54, "pad_token_id": 54}  # fmt: skip
    model = randomize(CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)), seed=7)
    model.save_pretrained(folder)
    checkpoint = folder.parent / f"{folder.name}-checkpoint"
    assert "parameters" in convert(FromClipConfig(str(folder), str(checkpoint)))
    return folder, model, str(checkpoint)


def picture(width, height, seed):
    small = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (5, 6, 3), np.uint8))
    buffer = io.BytesIO()
    small.resize((width, height), Image.Resampling.BICUBIC).save(buffer, "PNG")
    return buffer.getvalue()


def test_scores_equal_those_of_transformers(clip):
    folder, model, checkpoint = clip
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    images = [picture(40, 33, 0), picture(28, 28, 1), picture(61, 200, 2), picture(20, 17, 3)]
    texts = ["the cat", "a", "this that the other and more than fits in here", "zebra zoo"]
    processor = CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    )
    pixels = processor([Image.open(io.BytesIO(image)) for image in images], return_tensors="pt").pixel_values
    inputs = tokenizer(texts, truncation=True, padding="max_length", max_length=16, return_tensors="pt")
    with torch.no_grad():
        model.double()
        image = model.visual_projection(model.vision_model(pixels.double()).pooler_output)
        text = model.text_projection(model.text_model(**inputs).pooler_output)
        expected = torch.nn.functional.cosine_similarity(image, text).numpy()
        model.float()
    scorer = ClipScorer(checkpoint, batch_size=8)
    prepared = [scorer.prepare(Sample("", [i], text=t)) for i, t in zip(images, texts, strict=True)]
    ours = np.array([row["clip_score"] for row in scorer.score(prepared)])
    print(f"largest difference of cosines {abs(ours - expected).max():.1e}")
    assert abs(ours - expected).max() < COSINE_TOLERANCE


@pytest.mark.parametrize("size", [(40, 33), (28, 28), (61, 200), (300, 29)])
def test_the_crop_is_that_of_the_image_processor(size):
    data = picture(*size, seed=sum(size))
    processor = CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        do_rescale=False, do_normalize=False,
    )  # fmt: skip
    theirs = processor(Image.open(io.BytesIO(data)), return_tensors="np").pixel_values[0].transpose(1, 2, 0)
    assert abs(crop(data, IMAGE_SIZE).astype(int) - np.round(theirs).astype(int)).max() <= 1


def test_a_long_strip_is_cut_before_it_is_resized():
    data = picture(3000, 40, seed=1)
    whole = Image.open(io.BytesIO(data)).resize((3000 * IMAGE_SIZE // 40, IMAGE_SIZE), Image.Resampling.BICUBIC)
    left = (whole.width - IMAGE_SIZE) // 2
    expected = np.asarray(whole.crop((left, 0, left + IMAGE_SIZE, IMAGE_SIZE))).astype(int)
    assert abs(crop(data, IMAGE_SIZE) - expected).max() <= 2
    assert crop(picture(100_000, 2, seed=2), IMAGE_SIZE).shape == (IMAGE_SIZE, IMAGE_SIZE, 3)


def test_the_command_writes_a_parquet_per_tar_and_counts_the_rest(clip, tmp_path, write_shard):
    samples = [caption_sample(i, text="the cat", image=png(40, 30, seed=i)) | {
        "json": f'{{"uid": "{i:032x}"}}'.encode()} for i in range(11)]  # fmt: skip
    samples[3]["png"] = b"no picture"
    samples[5] |= {"txt": b"\xff"}
    write_shard(tmp_path / "0.tar", samples)
    write_shard(tmp_path / "1.tar", samples[:2])
    config = ScoreConfig(str(tmp_path / "*.tar"), str(tmp_path / "out"), "clip", clip[2], 8, execution=Execution(1))
    manifest = score_shards(config)
    assert manifest["samples"] == 13
    assert manifest["scored"] == 11
    assert manifest["skipped"] == {"image_undecodable": 1, "text_not_utf8": 1}
    frame = pl.read_parquet(tmp_path / "out" / "00000000.parquet")
    assert frame.columns == ["key", "uid", "clip_score", "status"]
    assert frame["uid"].to_list() == [f"{i:032x}" if i != 5 else frame["uid"][5] for i in range(11)]
    assert frame["clip_score"].is_null().to_list() == [i in (3, 5) for i in range(11)]
    assert frame["clip_score"][0] == pl.read_parquet(tmp_path / "out" / "00000001.parquet")["clip_score"][0]


def test_parquet_is_scored_as_tars_are(clip, tmp_path, write_shard):
    images, texts = [png(40, 30, seed=i) for i in range(9)], [f"the cat {'a' * i}" for i in range(9)]
    write_shard(tmp_path / "0.tar", [caption_sample(i, text=texts[i], image=images[i]) for i in range(9)])
    pl.DataFrame({"key": [f"{i:06d}" for i in range(9)], "image": images, "caption": texts}).write_parquet(
        tmp_path / "0.parquet", row_group_size=4
    )
    frames = []
    for name in ("0.tar", "0.parquet"):
        out = str(tmp_path / f"out-{name}")
        score_shards(ScoreConfig(str(tmp_path / name), out, "clip", clip[2], 8, execution=Execution(1)))
        frames.append(pl.read_parquet(f"{out}/00000000.parquet"))
    assert frames[0]["clip_score"].n_unique() > 1
    assert frames[0].drop("key").equals(frames[1].drop("key"))


def test_another_checkpoint_is_explained(clip, tmp_path, write_shard):
    shard = write_shard(tmp_path / "0.tar", [caption_sample(0)])
    with pytest.raises(UserError, match="no such folder"):
        score_shards(ScoreConfig(shard, str(tmp_path / "out"), "clip", str(tmp_path / "nowhere")))
    with pytest.raises(UserError, match="no whole checkpoint here"):
        score_shards(ScoreConfig(shard, str(tmp_path / "out"), "clip", str(tmp_path)))
