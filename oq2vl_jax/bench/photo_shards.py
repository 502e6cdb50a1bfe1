"""Writes tars of captioned photographs to measure with: crops of scikit-image's pictures, sized as by img2dataset."""

import io
import random
import tarfile
from pathlib import Path

from oq2vl_jax.errors import UserError

PICTURES = ("astronaut", "coffee", "chelsea", "rocket", "immunohistochemistry", "retina")
WORDS = "a photograph of the old harbour with red boats in evening light and two people beside the water".split()  # noqa: SIM905
LONGER_SIDE = 512
JPEG_QUALITY = 90
NUM_DIFFERENT_CROPS = 1000


def load_pictures() -> list:
    """Returns photographs as PIL images. Raises UserError if scikit-image is missing."""
    try:
        import skimage.data
    except ImportError as error:
        raise UserError("this measurement needs scikit-image: pip install 'oq2vl-jax[bench]'.") from error
    from PIL import Image

    pictures = []
    for name in PICTURES:
        try:
            pictures.append(Image.fromarray(getattr(skimage.data, name)()).convert("RGB"))
        except Exception:  # some pictures are downloaded on first use; those in the package are enough
            continue
    return pictures


def write_photo_shards(folder: Path, num_shards: int, samples_per_shard: int, seed: int) -> list[str]:
    """Writes NNNNN.tar with KEY.jpg (random crops, longer side 512), KEY.txt (5-40 words) and KEY.json; returns the
    paths."""
    rng, pictures = random.Random(seed), load_pictures()
    crops = [random_crop(rng, pictures) for _ in range(min(NUM_DIFFERENT_CROPS, num_shards * samples_per_shard))]
    for shard in range(num_shards):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for i in range(samples_per_shard):
                key = f"{shard:05d}{i:04d}"
                text = " ".join(rng.choices(WORDS, k=rng.randrange(5, 41)))
                members = {
                    "jpg": rng.choice(crops),
                    "txt": text.encode(),
                    "json": f'{{"key": "{key}"}}'.encode(),
                }
                for suffix, data in members.items():
                    info = tarfile.TarInfo(f"{key}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return [str(folder / f"{shard:05d}.tar") for shard in range(num_shards)]


def random_crop(rng: random.Random, pictures: list) -> bytes:
    picture = rng.choice(pictures)
    width, height = (rng.randrange(side // 2, side + 1) for side in picture.size)
    left, top = rng.randrange(picture.width - width + 1), rng.randrange(picture.height - height + 1)
    scale = LONGER_SIDE / max(width, height)
    cropped = picture.crop((left, top, left + width, top + height)).resize(
        (round(width * scale), round(height * scale))
    )
    buffer = io.BytesIO()
    cropped.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()
