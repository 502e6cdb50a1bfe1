"""python -m oq2vl_jax.data.pack: packs samples from tars and other files into ArrayRecord rows.

Inputs are tars, LLaVA-style instruction files, or the published packer's *_packed.json. One task takes files_per_task
files, or entries_per_task entries of an instruction file. It checks every image, tokenises, packs
(data/packing/bins.py), and writes rows-NNNNN.array_record and its report. jobs.py runs the tasks, resumes them and
spreads them over machines. OUT/manifest.json is written last, when every task is done.
"""

from oq2vl_jax.bounds import parse
from oq2vl_jax.data.packing.packer import PackConfig, pack_shards
from oq2vl_jax.errors import run_command
from oq2vl_jax.jobs import counted


def main() -> None:
    import tyro

    config = parse(PackConfig, prog="python -m oq2vl_jax.data.pack", config=(tyro.conf.OmitArgPrefixes,))
    manifest = pack_shards(config)
    if manifest is not None:
        print(
            f"{manifest['documents']} documents in {manifest['rows']} rows, "
            f"token fill {manifest['token_fill']:.3f}, image fill {manifest['image_fill']:.3f}; "
            f"skipped: {counted(manifest['skipped'])}; noted: {counted(manifest['notes'])}. "
            f"Manifest: {config.out}/manifest.json"
        )


if __name__ == "__main__":
    run_command(main)
