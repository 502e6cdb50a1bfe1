"""python -m oq2vl_jax.data.inspect ROWS... or SAMPLES... --tokenizer FOLDER: a page to look at, and figures.

ROWS are files of one packed folder (rows-NNNNN.array_record), or the folder: its rows are drawn with pictures in their
places. SAMPLES are tars, parquet files or instruction files that are not packed yet: how many samples, pictures,
tokens, sizes and languages, what packing would skip and why, pictures that occur twice, and samples drawn as the model
will see them. By default the figures are of about 10,000 samples at random.
"""

from pathlib import Path

from oq2vl_jax import paths
from oq2vl_jax.bounds import check_bounds, parse
from oq2vl_jax.data.inspection.options import InspectCommand
from oq2vl_jax.errors import UserError, run_command

OF_ROWS = ("num_rows",)
OF_SAMPLES = (
    "tokenizer", "num_samples", "all", "shown", "images", "columns", "num_tokens", "max_images", "visual_tokens",
    "template", "unmarked_images", "long_documents",
    "image_size", "num_workers",
)  # fmt: skip


def inspect(command: InspectCommand) -> str:
    """Writes the page and returns what it says first. Raises UserError."""
    from oq2vl_jax.data.inspection.rows import inspect_rows

    check_bounds(command, as_flags=True)
    if not Path(command.out).absolute().parent.is_dir():
        raise UserError(f"--out {command.out}: its folder does not exist.")
    is_packed = are_packed(command.rows)
    unused = [name for name in (OF_SAMPLES if is_packed else OF_ROWS) if getattr(command, name) != default_of(name)]
    if unused:
        raise UserError(
            f"--{unused[0].replace('_', '-')} does not apply to {'packed rows' if is_packed else 'samples'}."
        )
    if is_packed:
        return inspect_rows(command.rows, command.out, command.num_rows, command.seed)
    from oq2vl_jax.data.inspection.page import inspect_samples

    return inspect_samples(command)


def default_of(name: str) -> object:
    return getattr(InspectCommand, name)


def are_packed(names: tuple[str, ...]) -> bool:
    """Returns whether the names are a packed folder, rows of one, or nothing that is there. Raises UserError for a
    folder of other files."""
    if not names:
        raise UserError("name a packed folder, or files of samples.")
    for name in names:
        if paths.is_remote(name):
            continue
        folder = Path(name)
        if folder.is_dir() and not (folder / "settings.json").is_file() and not list(folder.glob("*.array_record")):
            raise UserError(f"{name}: no packed rows here; for samples name the files, such as '{name}/*.parquet'.")
    return all(is_packed(name) for name in names)


def is_packed(name: str) -> bool:
    if name.endswith(".array_record"):
        return True
    if paths.is_remote(name):
        return "." not in name.rsplit("/", 1)[-1] and paths.exists(paths.join(name, "manifest.json"))
    return Path(name).is_dir() or "." not in Path(name).name


def main() -> None:
    command = parse(InspectCommand, prog="python -m oq2vl_jax.data.inspect")
    print(inspect(command))
    print(f"page: {command.out}")


if __name__ == "__main__":
    run_command(main)
