"""The cache of remote files: whole or absent, bounded, and safe when several processes fill it."""

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from oq2vl_jax.errors import UserError
from oq2vl_jax.remote.cache import Cache, Wanted

KIB = 1024


def store(folder, **files):
    """Writes files to a folder, and returns what to fetch: a file:// address stands for a bucket."""
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return [Wanted(f"key-{name}", f"file://{folder}/{name}", len(content)) for name, content in files.items()]


def test_a_file_is_fetched_once_and_is_the_file(tmp_path):
    wanted = store(tmp_path / "store", a=b"a" * 100, b=b"b" * 200)
    cache = Cache(tmp_path / "cache")
    found = cache.files(wanted)
    assert [found[one.key].read_bytes() for one in wanted] == [b"a" * 100, b"b" * 200]
    (tmp_path / "store" / "a").unlink()
    assert Cache(tmp_path / "cache").files(wanted) == found  # nothing is asked of the store again


def test_a_missing_or_other_file_leaves_nothing_that_looks_whole(tmp_path):
    def refuse(copy):
        raise UserError(f"{copy.stat().st_size} bytes are not what was packed")

    cache = Cache(tmp_path / "cache")
    (wanted,) = store(tmp_path / "store", a=b"other")
    with pytest.raises(UserError, match="5 bytes are not"):
        cache.files([wanted._replace(check=refuse)])
    with pytest.raises(UserError, match="no such file"):
        cache.files([wanted._replace(key="key-c", url=f"{wanted.url}-none")])
    assert not [path for path in (tmp_path / "cache" / "files").iterdir() if path.suffix != ".partial"]


def test_what_was_used_least_recently_goes_first_and_what_is_used_stays(tmp_path):
    a, b, c, d = store(tmp_path / "store", **{name: name.encode() * 10 * KIB for name in "abcd"})
    for i, one in enumerate((a, b, c)):  # of an ended process
        earlier = Cache(tmp_path / "cache", 30 * KIB)
        path = earlier.files([one])[one.key]
        earlier._open.close()
        os.utime(path, (1000 + i, 1000 + i))
    now = Cache(tmp_path / "cache", 30 * KIB)
    now.files([a])  # the oldest, and now in use
    now.files([d])
    assert {path.name for path in (tmp_path / "cache" / "files").iterdir()} == {"key-a", "key-c", "key-d"}
    with pytest.raises(UserError, match=r"cache-gib"):
        now.files([b, c, a, d])
    assert {"key-a", "key-d"} <= {path.name for path in (tmp_path / "cache" / "files").iterdir()}


def test_a_cache_without_a_bound_leaves_some_of_the_disk(tmp_path):
    (wanted,) = store(tmp_path / "store", a=b"a")
    with pytest.raises(UserError, match="the disk holds"):
        Cache(tmp_path / "cache").files([wanted._replace(num_bytes=2**60)])


def fetch(folder, wanted, barrier):
    barrier.wait()
    found = Cache(Path(folder)).files(wanted)
    sizes = [path.stat().st_size for path in found.values()]
    assert sizes == [one.num_bytes for one in wanted]


def test_processes_that_fill_it_at_once_all_find_every_file(tmp_path):
    wanted = store(tmp_path / "store", **{f"f{i}": bytes([i]) * (1000 + i) for i in range(20)})
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(3)
    processes = [context.Process(target=fetch, args=(str(tmp_path / "cache"), wanted, barrier)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    names = {path.name for path in (tmp_path / "cache" / "files").iterdir()}
    assert names == {one.key for one in wanted}
    assert not list((tmp_path / "cache" / "leases").glob("*.json"))


def hold(folder, wanted, held):
    Cache(Path(folder), 15 * KIB).files(wanted)
    held.set()
    time.sleep(60)


def test_a_living_process_keeps_its_files_and_a_killed_one_does_not(tmp_path):
    a, b = store(tmp_path / "store", a=b"a" * 10 * KIB, b=b"b" * 10 * KIB)
    context = multiprocessing.get_context("spawn")
    held = context.Event()
    process = context.Process(target=hold, args=(str(tmp_path / "cache"), [a], held))
    process.start()
    assert held.wait(60)
    cache = Cache(tmp_path / "cache", 15 * KIB)
    with pytest.raises(UserError, match="runs use the rest"):
        cache.files([b])
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    cache.files([b])
    assert {path.name for path in (tmp_path / "cache" / "files").iterdir()} == {"key-b"}
    assert len(list((tmp_path / "cache" / "leases").glob("*.json"))) == 1
    assert json.loads(next((tmp_path / "cache" / "leases").glob("*.json")).read_text())


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    cache = Cache(tmp_path / "cache")

    def half(folder):
        (folder / "a").write_text("a")
        raise UserError("the store went away")

    with pytest.raises(UserError, match="went away"):
        cache.place("k", 1, half)
    assert not (tmp_path / "cache" / "folders" / "k").exists()
    found = cache.place("k", 1, lambda folder: (folder / "b").write_text("b"))
    assert [path.name for path in found.iterdir()] == ["b"]
    assert cache.place("k", 1, half) == found
