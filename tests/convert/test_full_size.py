"""The 2B model through the bridge: time, memory, logits. Random weights in bf16; run with `make bridge-full-size`.

Needs 24 GB of memory, 45 GB of disk and about 15 minutes on two cores. Every command runs as a user runs it, in a
process of its own; the memory is its peak resident size, mapped files included.
"""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from oq2vl_jax.config import ModelConfig

pytestmark = pytest.mark.slow

MAX_SECONDS = 300
MAX_MEMORY = 1.35  # of the larger of the input's and the output's files
TOLERANCE = 1e-3  # of the largest logit; measured 4.3e-6
IMAGE_TOKEN = 151_655
PEAK = "import resource, subprocess, sys; code = subprocess.run(sys.argv[1:]).returncode; "
PEAK += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(code)"


def random_tensors(layout, shapes, seed):
    """bf16 weights of a size that keeps activations near one; norms near one."""
    from convert.weight_map import their_shape, weights_of

    rng = np.random.default_rng(seed)
    for weight in weights_of(layout, shapes):
        shape = their_shape(weight, shapes)
        tensor = rng.standard_normal(shape, np.float32)
        is_norm = weight.row.ours[0].endswith("scale")
        tensor = 1 + 0.1 * tensor if is_norm else tensor * (0.02 if len(shape) > 1 else 0.1)
        yield weight.theirs, tensor.astype(ml_dtypes.bfloat16)


def write_model(folder, layout, shapes, config, seed):
    from convert.tensor_files import SafetensorsWriter
    from convert.weight_map import their_shape, weights_of

    folder.mkdir(exist_ok=True)
    sizes = {w.theirs: 2 * int(np.prod(their_shape(w, shapes))) for w in weights_of(layout, shapes)}
    writer = SafetensorsWriter(folder, sizes, 2 * 10**9)
    for name, tensor in random_tensors(layout, shapes, seed):
        writer.add(name, tensor)
    writer.close()
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def full_size(tmp_path_factory, qwen_tokenizer_folder):
    """Folders vision/ and decoder/ of the published sizes, as the hub has them."""
    from transformers import Qwen2Config, SiglipVisionConfig

    from convert.import_weights import parameter_shapes

    root = tmp_path_factory.mktemp("full_size")
    model = ModelConfig.open_qwen2vl_2b()
    shapes = parameter_shapes(model)
    vision = SiglipVisionConfig(
        hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16, image_size=384,
        patch_size=14,
    )  # fmt: skip
    text = Qwen2Config(
        vocab_size=151_936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
        num_key_value_heads=2, rope_parameters={"rope_theta": 1e6, "rope_type": "default"}, tie_word_embeddings=True,
    )  # fmt: skip
    write_model(root / "vision", "siglip", shapes, vision.to_dict(), 1)
    shutil.copytree(qwen_tokenizer_folder, root / "decoder")
    write_model(root / "decoder", "qwen2", shapes, text.to_dict(), 2)
    yield root
    shutil.rmtree(root)


def num_bytes(*paths):
    return sum(file.stat().st_size for path in paths for file in [path, *path.rglob("*")] if file.is_file())


def measured(name, arguments, inputs, output):
    """Runs a command; prints and checks its time and memory."""
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", PEAK, sys.executable, "-m", *arguments], capture_output=True, text=True
    )
    seconds = time.monotonic() - start
    assert done.returncode == 0, done.stderr
    peak, largest = 1024 * int(done.stdout.split()[-1]), max(num_bytes(*inputs), num_bytes(output))
    print(
        f"{name}: {seconds:.0f} s, peak {peak / 1e9:.2f} GB, files in {num_bytes(*inputs) / 1e9:.2f} GB, "
        f"out {num_bytes(output) / 1e9:.2f} GB, peak / largest {peak / largest:.2f}"
    )
    assert seconds <= MAX_SECONDS
    assert peak <= MAX_MEMORY * largest


def test_from_hf_and_to_hf(full_size):
    vision, decoder, out = full_size / "vision", full_size / "decoder", full_size / "imported"
    arguments = ["--vision", str(vision), "--decoder", str(decoder), "--out", str(out)]
    measured("from_hf", ["convert.from_hf", *arguments], [vision, decoder], out)
    exported, back = full_size / "exported", full_size / "back"
    measured("to_hf", ["convert.to_hf", str(out), "--out", str(exported)], [out], exported)
    measured("from_hf --model", ["convert.from_hf", "--model", str(exported), "--out", str(back)], [exported], back)


WRITE_PUBLISHED = """
import json, sys, torch
from pathlib import Path
from safetensors.torch import load_file
decoder, run = Path(sys.argv[1]), Path(sys.argv[2])
state = {}
for file in sorted(decoder.glob("*.safetensors")):
    state |= {f"llm.{name}": value.float() for name, value in load_file(file).items()}
state["llm.lm_head.weight"] = state["llm.model.embed_tokens.weight"].clone()
projector = {"mlp_projector.0.weight": torch.randn(1536, 1152) / 34, "mlp_projector.0.bias": torch.randn(1536) / 10,
             "mlp_projector.2.weight": torch.randn(1536, 1536) / 39, "mlp_projector.2.bias": torch.randn(1536) / 10}
(run / "checkpoints").mkdir(parents=True)
torch.save({"model": {"projector": projector, "llm_backbone": state}}, run / "checkpoints" / "latest-checkpoint.pt")
model = {"model_id": "x", "arch_specifier": "no-align+avgpool", "vision_backbone_id": "siglip-vit-so400m-384px",
         "llm_backbone_id": "qwen2.5-1.5b-instruct", "image_resize_strategy": "resize-naive", "llm_max_length": 4096}
(run / "config.json").write_text(json.dumps({"model": model, "stage": "pretrain", "mount_path": "Qwen"}))
"""


def test_from_prismatic(full_size):
    vision, decoder, run = full_size / "vision", full_size / "decoder", full_size / "published"
    subprocess.run([sys.executable, "-c", WRITE_PUBLISHED, str(decoder), str(run)], check=True)
    out = full_size / "from_published"
    arguments = ["convert.from_prismatic", str(run), "--vision", str(vision), "--decoder", str(decoder)]
    measured("from_prismatic", [*arguments, "--out", str(out)], [run, vision], out)
    shutil.rmtree(run)


TORCH_LOGITS = """
import sys, numpy as np, torch
from pathlib import Path
from transformers import AutoModelForImageTextToText
folder, rows, out = sys.argv[1:]
row = np.load(rows)
model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True).eval()
logits, image = [], 0
with torch.no_grad():
    for document in range(1, row["segment_ids"].max() + 1):
        tokens = row["tokens"][row["segment_ids"] == document]
        number = int((tokens == 151655).sum()) // 144
        pixels = torch.from_numpy(row["images"][image : image + number].transpose(0, 3, 1, 2).astype("float32"))
        image += number
        tokens = torch.from_numpy(tokens[None])
        images = {"pixel_values": pixels / 127.5 - 1} if number else {}
        logits.append(model(input_ids=tokens, **images).logits[0].numpy())
np.save(out, np.concatenate(logits))
"""

OUR_LOGITS = """
import sys, jax, numpy as np, jax.numpy as jnp
from oq2vl_jax.config import MeshConfig
from oq2vl_jax.generate.loading import load_model
from oq2vl_jax.checkpoint import find_checkpoint
from oq2vl_jax.sharding import make_mesh
checkpoint, rows, out = sys.argv[1:]
row = np.load(rows)
model = load_model(find_checkpoint(checkpoint), make_mesh(MeshConfig()))
fields = [jnp.asarray(row[name][None]) for name in ("tokens", "images", "segment_ids", "positions")]
np.save(out, np.asarray(jax.jit(lambda model, *fields: model.logits(model(*fields)))(model, *fields))[0])
"""


def packed_row():
    """1,024 tokens, three documents, four images: 0, 1 and 3 of them in the documents."""
    rng = np.random.default_rng(3)
    documents = []
    for num_images, length in ((0, 100), (1, 106), (3, 242)):
        text = rng.integers(0, 151_643, length)
        runs = np.full(144 * num_images, IMAGE_TOKEN)
        documents.append(np.concatenate([text[:5], runs, text[5:]]).astype(np.int32))
    assert sum(map(len, documents)) == 1024
    return {
        "tokens": np.concatenate(documents),
        "segment_ids": np.repeat(np.arange(1, 4, dtype=np.int32), [len(d) for d in documents]),
        "positions": np.concatenate([np.arange(len(d), dtype=np.int32) for d in documents]),
        "images": rng.integers(0, 256, (4, 384, 384, 3), np.uint8),
    }


def test_logits_of_a_packed_row(full_size):
    """The packed row at once here, its documents one by one there, on the bf16 weights that to_hf wrote."""
    rows, ours_file, theirs_file = (full_size / name for name in ("row.npz", "ours.npy", "theirs.npy"))
    np.savez(rows, **packed_row())
    for code, model, out in (
        (TORCH_LOGITS, full_size / "exported", theirs_file),
        (OUR_LOGITS, full_size / "back", ours_file),
    ):
        subprocess.run([sys.executable, "-c", code, str(model), str(rows), str(out)], check=True, cwd=Path.cwd())
    ours, theirs = np.load(ours_file), np.load(theirs_file)
    scale, error = np.abs(theirs).max(), np.abs(ours - theirs).max()
    top2 = np.partition(theirs, -2, axis=-1)[:, -2:]
    is_clear = top2[:, 1] - top2[:, 0] > error
    print(f"logits: error {error / scale:.1e} of {scale:.1f}; {is_clear.sum()} of 1,024 positions have a clear maximum")
    assert error <= TOLERANCE * scale
    assert (ours.argmax(-1) == theirs.argmax(-1))[is_clear].all()
    assert is_clear.any()
