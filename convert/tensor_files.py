"""Reads tensors of safetensors files (sharded or not) and torch files, and writes safetensors, a few at a time.

Nothing stays in memory between two `opened` contexts, not even mapped pages. The memory of a conversion therefore does
not grow with its file.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from oq2vl_jax.errors import UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
TORCH_SUFFIXES = (".pt", ".pth", ".bin")
FLOAT_DTYPES = ("F32", "F16", "BF16")
"""All of them are exact in float32."""

Reader = Callable[[str], np.ndarray]


class TensorSource(Protocol):
    """Named tensors on disk. `where` names the file or folder in messages; `shapes` are read without the data."""

    where: str
    shapes: dict[str, tuple[int, ...]]

    def opened(self) -> Any:
        """A context that yields a Reader: name -> array in its stored dtype. Mapped memory is freed when it ends."""
        ...


class SafetensorsSource:
    """A .safetensors file, or a folder with model.safetensors or an index of shards."""

    def __init__(self, path: Path):
        self.where = str(path)
        self._files = _safetensors_files(path)
        self.shapes = {}
        self._file_of: dict[str, Path] = {}
        for file, listed in self._files.items():
            with _open_safetensors(file) as tensors:
                for name in tensors.keys():  # noqa: SIM118  (`tensors` is not a dict)
                    tensor = tensors.get_slice(name)
                    if tensor.get_dtype() not in FLOAT_DTYPES:
                        if name.endswith("position_ids"):  # a buffer of old versions: 0, 1, 2, ...
                            continue
                        allowed = ", ".join(FLOAT_DTYPES)
                        raise UserError(f"{file}: {name} is of type {tensor.get_dtype()}, expected one of {allowed}.")
                    if name in self.shapes:
                        raise UserError(f"{path}: {name} stands in {self._file_of[name].name} and in {file.name}.")
                    self.shapes[name], self._file_of[name] = tuple(tensor.get_shape()), file
            missing = [name for name in listed if name not in self.shapes]
            if missing:
                raise UserError(f"{file}: lacks {missing[0]} ({len(missing)} tensors) that {INDEX} says it holds.")

    @contextmanager
    def opened(self) -> Iterator[Reader]:
        handles: dict[Path, Any] = {}

        def read(name: str) -> np.ndarray:
            file = self._file_of[name]
            if file not in handles:
                handles[file] = _open_safetensors(file)
            return handles[file].get_tensor(name)

        try:
            yield read
        finally:
            handles.clear()


class TorchSource:
    """A torch file of nested dicts of tensors; names are the keys joined by dots. No code in it is run."""

    def __init__(self, path: Path, root: str | None = None):
        """`root`: the key that holds the tensors. Raises UserError if the file cannot be used."""
        self.where, self._path, self._root = str(path), path, root
        import torch

        tensors = self._load()
        odd = [name for name, x in tensors.items() if x.dtype not in (torch.float32, torch.float16, torch.bfloat16)]
        if odd:
            raise UserError(
                f"{path}: {odd[0]} is of type {tensors[odd[0]].dtype}, expected float32, float16 or bfloat16."
            )
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}

    @contextmanager
    def opened(self) -> Iterator[Reader]:
        tensors = self._load()

        def read(name: str) -> np.ndarray:
            import torch

            tensor = tensors[name].detach()
            if tensor.dtype == torch.bfloat16:  # torch does not convert bfloat16 to numpy
                return tensor.contiguous().view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
            return tensor.numpy()

        try:
            yield read
        finally:
            tensors.clear()

    def _load(self) -> dict[str, Any]:
        import pickle

        import torch

        try:
            loaded = torch.load(self._path, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError as error:
            raise UserError(
                f"{self._path}: holds more than tensors ({_first_line(error)}); such a file could run code, and is "
                "not loaded."
            ) from error
        except (RuntimeError, EOFError, ValueError, OSError, KeyError) as error:
            raise UserError(f"{self._path}: no whole torch file ({_first_line(error)}).") from error
        if self._root is not None:
            if not isinstance(loaded, dict) or self._root not in loaded:
                raise UserError(f"{self._path}: expected a dict with the key {self._root!r}.")
            loaded = loaded[self._root]
        tensors = dict(_flatten(loaded))
        if not tensors:
            raise UserError(f"{self._path}: no tensors in it.")
        return tensors


class Renamed:
    """A source with renamed tensors: `name_of` maps a name in the file to the new name."""

    def __init__(self, source: TensorSource, name_of: Callable[[str], str]):
        self.where, self._source = source.where, source
        self._original: dict[str, str] = {}
        for name in source.shapes:
            new = name_of(name)
            if new in self._original:
                raise UserError(f"{source.where}: {name} and {self._original[new]} are two names of the same weight.")
            self._original[new] = name
        self.shapes = {new: source.shapes[name] for new, name in self._original.items()}

    @contextmanager
    def opened(self) -> Iterator[Reader]:
        with self._source.opened() as read:
            yield lambda name: read(self._original[name])


def open_source(path: Path) -> TensorSource:
    """Opens a torch file if the suffix says so, else a safetensors file or folder."""
    if path.suffix in TORCH_SUFFIXES and path.is_file():
        return TorchSource(path)
    return SafetensorsSource(path)


def _safetensors_files(path: Path) -> dict[Path, list[str]]:
    """Maps each file to the names that the index lists for it (an empty list without an index)."""
    if path.is_file():
        return {path: []}
    if (path / INDEX).is_file():
        try:
            listed = dict(json.loads((path / INDEX).read_text())["weight_map"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path / INDEX}: not a valid index ({type(error).__name__}: {error}).") from error
        files: dict[Path, list[str]] = {}
        for name, file in sorted(listed.items()):
            if Path(file).name != file:
                raise UserError(f"{path / INDEX}: {file!r} is no plain file name.")
            files.setdefault(path / file, []).append(name)
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise UserError(f"{path}: {', '.join(missing)} missing, of {len(files)} files that {INDEX} names.")
        return files
    if (path / SINGLE).is_file():
        return {path / SINGLE: []}
    raise UserError(f"{path}: no {SINGLE} and no {INDEX} there.")


def _open_safetensors(file: Path):
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, "np")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: no whole safetensors file ({_first_line(error)}); fetch it again.") from error


def _flatten(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _flatten(value, f"{prefix}.{key}" if prefix else str(key))
    elif hasattr(tree, "shape"):
        yield prefix, tree


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class SafetensorsWriter:
    """Writes tensors to one file, or to shards with an index. Holds one shard at a time if the tensors are added in the
    order of `sizes`."""

    def __init__(self, folder: Path, sizes: dict[str, int], max_shard_bytes: int):
        """sizes: name -> bytes."""
        from huggingface_hub import split_state_dict_into_shards_factory

        self._folder, self._pending, self._written = folder, {}, 0
        self._plan = split_state_dict_into_shards_factory(
            sizes,
            get_storage_size=lambda num_bytes: num_bytes,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=max_shard_bytes,
        )

    def add(self, name: str, tensor: np.ndarray) -> None:
        """Adds a tensor and writes its shard if that is complete."""
        self._pending[name] = tensor
        file = self._plan.tensor_to_filename[name]
        names = self._plan.filename_to_tensors[file]
        if all(other in self._pending for other in names):
            from safetensors.numpy import save_file

            shard = {other: self._pending.pop(other) for other in names}
            save_file(shard, self._folder / file, metadata={"format": "pt"})
            (self._folder / file).chmod(0o644)  # save_file makes files that only their owner can read
            self._written += len(shard)

    def close(self) -> None:
        """Writes the index. Every planned tensor must have been added."""
        assert self._written == len(self._plan.tensor_to_filename), (self._written, list(self._pending))
        if self._plan.is_sharded:
            index = {"metadata": self._plan.metadata, "weight_map": self._plan.tensor_to_filename}
            (self._folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
