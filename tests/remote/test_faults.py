"""Faults of remote file systems: what passes is waited for, the rest is one sentence at once."""

import errno
import io
import tarfile

import fsspec
import pytest

from oq2vl_jax.data.samples.tars import read_members
from oq2vl_jax.errors import UserError
from oq2vl_jax.remote import faults
from oq2vl_jax.remote.faults import PatientFile, patiently


class NoCredentialsError(Exception):
    """Has the name of botocore's."""


class ClientError(Exception):
    """Has the form of botocore's."""

    def __init__(self, status):
        super().__init__(f"answered {status}")
        self.response = {"ResponseMetadata": {"HTTPStatusCode": status}}


ClientError.__module__ = "botocore.exceptions"


class Failing:
    """Raises the errors one after the other, then returns "done"."""

    def __init__(self, *errors):
        self.errors, self.calls = list(errors), 0

    def __call__(self):
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return "done"


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(faults.time, "sleep", lambda seconds: None)


@pytest.mark.parametrize(
    "error",
    [ConnectionResetError("reset"), OSError(errno.EBUSY, "Please reduce your request rate"), TimeoutError(),
     ClientError(503), ClientError(429)],
)  # fmt: skip
def test_what_may_pass_is_asked_again_and_said(error, capsys):
    function = Failing(error, error, error)
    assert patiently("s3://bucket/x", function) == "done"
    assert function.calls == 4
    assert capsys.readouterr().err.count("s3://bucket/x: ") == 1


@pytest.mark.parametrize(
    ("error", "message"),
    [(NoCredentialsError("Unable to locate"), "no credentials .* set AWS_ACCESS_KEY_ID"),
     (PermissionError("Access Denied"), "no permission"),
     (FileNotFoundError("The specified bucket does not exist"), "no such bucket"),
     (ClientError(400), "answered 400"), (ClientError(403), "no permission")],
)  # fmt: skip
def test_what_cannot_pass_is_one_sentence_at_once(error, message):
    function = Failing(error)
    with pytest.raises(UserError, match=message):
        patiently("s3://bucket/x", function)
    assert function.calls == 1


@pytest.mark.parametrize("error", [FileNotFoundError("x"), OSError(errno.ENOSPC, "full"), ZeroDivisionError()])
def test_an_answer_the_own_disk_and_a_mistake_of_ours_go_through(error):
    with pytest.raises(type(error)):
        patiently("s3://bucket/x", Failing(error))


def test_what_stays_away_ends_in_a_sentence(monkeypatch):
    monkeypatch.setenv(faults.PATIENCE_VARIABLE, "0")
    with pytest.raises(UserError, match=r"no answer for 0 s .*same command again"):
        patiently("s3://bucket/x", Failing(ConnectionResetError("reset")))
    monkeypatch.setenv(faults.PATIENCE_VARIABLE, "soon")
    with pytest.raises(UserError, match="expected seconds"):
        patiently("s3://bucket/x", Failing())


class Flaky(io.BytesIO):
    """Drops the line at every other read, having moved on."""

    reads = 0

    def read(self, size=-1):
        content = super().read(size)
        Flaky.reads += 1
        if Flaky.reads % 2:
            raise ConnectionResetError("reset")
        return content


@pytest.fixture
def flaky_store(monkeypatch):
    """(a file system, its contents by name)."""
    memory, contents = fsspec.filesystem("memory"), {}
    monkeypatch.setattr(type(memory), "open", lambda self, name, mode: Flaky(contents[name]))
    return memory, contents


def test_a_stream_goes_on_at_the_same_byte_after_a_fault(flaky_store):
    content = bytes(range(256)) * 40
    store, contents = flaky_store
    contents["/flaky/x"] = content
    stream = io.BufferedReader(PatientFile("memory://flaky/x", store, "/flaky/x"), 100)
    assert stream.read(777) == content[:777]
    stream.seek(-1000, io.SEEK_END)
    stream.seek(500, io.SEEK_CUR)
    assert stream.tell() == len(content) - 500
    assert stream.read() == content[-500:]


def test_a_fault_of_the_line_is_no_damage_of_the_tar(flaky_store, monkeypatch):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for i in range(30):
            member = tarfile.TarInfo(f"{i:03d}.txt")
            member.size = 3
            tar.addfile(member, io.BytesIO(b"abc"))
    flaky_store[1]["/flaky/x.tar"] = buffer.getvalue()
    assert len(list(read_members("memory://flaky/x.tar"))) == 30
    monkeypatch.setenv(faults.PATIENCE_VARIABLE, "0")
    with pytest.raises(UserError, match="no answer") as raised:
        list(read_members("memory://flaky/x.tar"))
    assert "cut off" not in str(raised.value)
