"""Run folders mirrored to S3 (moto's server), with killed processes and outages of the store."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import socket
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import pytest

from advtrain.errors import UserError
from advtrain.runs import mirror as mirrors
from advtrain.runs import object_store as objectstore
from advtrain.runs.folder import RunFolder, idempotent_start
from advtrain.runs.mirror import Mirror
from advtrain.runs.object_store import connect, is_uri, leased
from advtrain.runs.storage import attach, detach, mirror_of, opened, shared_place
from advtrain.training.on_ray import _NEEDED
from tests.servers import s3


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    before = dict(os.environ)
    with s3(tmp_path_factory.mktemp("s3")) as env:
        os.environ.update(env)
        yield "s3://advtrain"
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def uri(bucket, request) -> str:
    return f"{bucket}/{request.node.name[:40].replace('[', '-').strip(']')}"


def mirror(tmp_path, uri, name="here") -> Mirror:
    """Return a mirror without its thread, so that a test decides when files are synced."""
    (tmp_path / name).mkdir()
    return Mirror(tmp_path / name, uri)


def write(mirror: Mirror, name: str, text: str) -> None:
    path = mirror.folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def files(mirror: Mirror) -> dict[str, str]:
    return {
        str(p.relative_to(mirror.folder)): p.read_text()
        for p in sorted(mirror.folder.rglob("*"))
        if p.is_file()
    }


def test_mirror_syncs_changes_and_deletions_both_ways(tmp_path, uri):
    one, other = mirror(tmp_path, uri, "one"), mirror(tmp_path, uri, "other")
    write(one, "run/run.json", "1")
    write(one, "run/checkpoints/step-1/state.json", "s")
    write(one, "run/checkpoints/step-1/model.safetensors", "m")
    one.flush()
    other.fetch()
    assert files(other) == files(one)
    write(other, "run/stop", "")
    write(other, "run/run.json", "22")
    other.flush()
    one.fetch(below="run")
    assert files(one) == files(other)
    (one.folder / "run/stop").unlink()
    write(one, "run/metrics.jsonl", "line")
    one.flush()
    other.fetch()
    assert files(other) == files(one)
    assert "run/stop" not in files(other)


def test_fetch_keeps_local_changes(tmp_path, uri):
    one, other = mirror(tmp_path, uri, "one"), mirror(tmp_path, uri, "other")
    write(one, "a", "first")
    one.flush()
    other.fetch()
    write(one, "a", "second")
    one.flush()
    write(other, "a", "mine, not sent yet")
    other.fetch()
    assert files(other) == {"a": "mine, not sent yet"}


def test_fetch_matches_pattern_and_private_files_are_not_sent(tmp_path, uri):
    one, other = mirror(tmp_path, uri, "one"), mirror(tmp_path, uri, "other")
    for name in ("a/run.json", "a/big.bin", "b/run.json", "a/.half", "a/lock", "a/ray/attempt-1/x"):
        write(one, name, name)
    one.flush()
    other.fetch("*/run.json")
    assert set(files(other)) == {"a/run.json", "b/run.json"}
    other.fetch(below="a")
    assert set(files(other)) == {"a/run.json", "a/big.bin", "b/run.json"}


def test_fetch_skips_checkpoint_without_state_file(tmp_path, uri):
    """A kill during upload leaves only tensors, which are sent first. They are not fetched."""
    one, other = mirror(tmp_path, uri, "one"), mirror(tmp_path, uri, "other")
    order = []
    send = one._send

    def killed(name: str, content: bytes) -> None:
        order.append(name)
        if name.endswith("state.json"):
            raise KeyboardInterrupt
        send(name, content)

    one._send = killed  # type: ignore[method-assign]
    for name in ("state.json", "optimizer.safetensors", "model.safetensors"):
        write(one, f"checkpoints/step-2/{name}", name)
    write(one, "metrics.jsonl", "line")
    with pytest.raises(KeyboardInterrupt):
        one.flush()
    assert [name.rpartition("/")[2] for name in order][-1] == "state.json"
    other.fetch()
    assert files(other) == {}


def test_workers_fetch_the_start_weights_of_a_run(tmp_path, uri):
    """No state.json marks them as complete: run.json is sent after them, and they have a digest."""
    one, other = mirror(tmp_path, uri, "one"), mirror(tmp_path, uri, "other")
    for name in ("run.json", "start/model.safetensors", "start/start.json", "start/teacher.safetensors"):
        write(one, name, name)
    one.flush()
    other.fetch(*_NEEDED)
    assert list(files(other)) == ["start/model.safetensors", "start/start.json", "start/teacher.safetensors"]


def test_opened_uri_gives_local_copy_and_uploads_changes(tmp_path, uri):
    with opened(f"{uri}/run-1") as path:
        assert path.name == "run-1"
        assert shared_place(path / "report") == f"{uri}/run-1/report"
        (path / "run.json").write_text("{}")
    assert not path.exists()
    assert mirror_of(path) is None
    with opened(f"{uri}/run-1") as path:
        assert (path / "run.json").read_text() == "{}"
    assert shared_place(tmp_path) == str(tmp_path)
    with opened(str(tmp_path)) as path:
        assert path == tmp_path


def test_attached_mirror_sends_and_fetches_watched_files(tmp_path, uri, monkeypatch):
    monkeypatch.setattr(mirrors, "PERIOD_S", 0.05)
    one, other = attach(f"{uri}/runs"), attach(f"{uri}/runs")
    try:
        other.watch("r", "progress.json")
        write(one, "r/progress.json", "1")
        write(one, "r/other.json", "1")
        deadline = time.monotonic() + 20
        while "r/progress.json" not in files(other) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert files(other) == {"r/progress.json": "1"}
    finally:
        detach(one)
        detach(other)


def test_mirror_reports_outage_once_and_retries_without_loss(tmp_path, monkeypatch):
    before = dict(os.environ)
    monkeypatch.setattr(mirrors, "RETRY_S", 0.2)
    messages: list[str] = []
    with s3(tmp_path) as env:
        os.environ.update(env)
        away = Mirror(tmp_path / "m", "s3://advtrain/away", messages.append)
        away.folder.mkdir()
        write(away, "a", "1")
        away.flush()
        really, outage = away.store.open_output_stream, time.monotonic() + 1.5

        class Flaky:
            def __getattr__(self, name: str):
                return getattr(store, name)

            def open_output_stream(self, path: str, **options):
                if time.monotonic() < outage:
                    raise OSError("connection refused")
                return really(path, **options)

        store, away.store = away.store, Flaky()
        write(away, "a", "2")
        away.flush()
        assert [line.split("(")[0] for line in messages][0].endswith("is unreachable ")
        assert len(messages) == 2
        assert "is reachable again after" in messages[1]
        with store.open_input_stream("advtrain/away/a") as stream:
            assert stream.read() == b"2"
        away.patience_s = 0.3
        outage = time.monotonic() + 60
        write(away, "a", "3")
        with pytest.raises(UserError, match=r"still unreachable.*unsent files"):
            away.flush()
    os.environ.clear()
    os.environ.update(before)


def test_attach_rejects_missing_bucket_without_retrying(bucket):
    started = time.monotonic()
    with pytest.raises(UserError, match="s3://no-such-bucket/runs cannot be used"):
        attach("s3://no-such-bucket/runs")
    assert time.monotonic() - started < 20
    for wrong in ("ftp://host/runs", "file:///tmp/x"):
        with pytest.raises(UserError, match="cannot use"):
            connect(wrong)
    assert is_uri("s3://a/b")
    assert not is_uri("/mnt/runs")


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(objectstore, "RENEW_S", 0.2)
    monkeypatch.setattr(objectstore, "LEASE_S", 3.0)


def left(store, path: str, host: str, pid: int, space: str) -> None:
    with store.open_output_stream(path) as out:
        out.write(json.dumps({"holder": f"{host} {pid} {space} 1", "time": 0}).encode())


@pytest.mark.slow
def test_lease_is_exclusive_and_expires_when_process_dies(uri, quick):
    store, root = connect(uri)
    path, mine = f"{root}/run/lease", (socket.gethostname(), objectstore.process_space())
    with (
        leased(store, path, "run 'x' is in use"),
        pytest.raises(UserError, match=rf"in use \(process {os.getpid()} on"),
        leased(store, path, "run 'x' is in use"),
    ):
        pass
    with leased(store, path, "free again"):
        pass
    left(store, path, mine[0], 999999999, mine[1])  # the process does not exist any more
    started = time.monotonic()
    with leased(store, path, "busy"):
        assert time.monotonic() - started < 2.5
    for host, space in (("another-host", mine[1]), (mine[0], "pid:[1]")):
        left(store, path, host, 999999999, space)  # not renewed: wait for expiry, whatever its clock says
        started = time.monotonic()
        with leased(store, path, "busy"):
            assert time.monotonic() - started > 2.9


def test_lease_read_is_retried_when_torn_by_renewal(uri):
    store, root = connect(uri)
    path = f"{root}/run/lease"
    left(store, path, "host", 1, "-")
    whole, reads = objectstore._holder(store, path), []

    class Torn:
        def open_input_stream(self, path):
            with store.open_input_stream(path) as source:
                content = source.read()
            reads.append(path)
            return io.BytesIO(content[:-1] if len(reads) < 3 else content)

    assert objectstore._holder(Torn(), path) == whole
    assert len(reads) == 3
    with store.open_output_stream(path) as out:
        out.write(b"no lease")
    with pytest.raises(OSError, match=r"lease.*damaged"):
        objectstore._holder(store, path)


def test_fetch_retries_file_that_grows_during_download(tmp_path, uri):
    one, other = mirror(tmp_path, uri, "one"), mirror(tmp_path, uri, "other")
    write(one, "run/metrics.jsonl", "a line\n")
    write(one, "run/table.csv.gz", "not compressed")
    one.flush()
    real = other.store

    class Torn:
        """Store whose first read returns the old bytes of an object that has grown."""

        cut = True

        def __getattr__(self, name):
            return getattr(real, name)

        def open_input_stream(self, path, **options):
            if not self.cut:
                return real.open_input_stream(path, **options)
            self.cut = False
            write(one, "run/metrics.jsonl", "a line\nanother\n")
            one.flush()
            return io.BytesIO(b"a line\n")

    other.store = Torn()
    other.fetch()
    assert files(other) == {"run/metrics.jsonl": "a line\nanother\n", "run/table.csv.gz": "not compressed"}


def test_lease_is_rewritten_when_renewal_was_truncated(uri, quick):
    store, root = connect(uri)
    path, messages = f"{root}/run/lease", []
    with leased(store, path, "busy", lost=lambda: messages.append("lost")):
        mine = objectstore._holder(store, path)[0]
        for torn in (b"", b"[]", b'{"time": 1}'):
            with store.open_output_stream(path) as out:
                out.write(torn)
            deadline, found = time.monotonic() + 20, None
            while found != mine and time.monotonic() < deadline:
                with suppress(OSError):
                    found = objectstore._holder(store, path)[0]
            assert found == mine
    assert messages == []
    assert objectstore._holder(store, path) is None


def test_lost_lease_runs_callback_and_keeps_new_holder(uri, quick):
    store, root = connect(uri)
    path, messages = f"{root}/run/lease", []
    with leased(store, path, "busy", lost=lambda: messages.append("lost")):
        left(store, path, "another-host", 1, "-")
        deadline = time.monotonic() + 10
        while not messages and time.monotonic() < deadline:
            time.sleep(0.05)
    assert messages == ["lost"]
    assert objectstore._holder(store, path)[0].startswith("another-host")


def test_mirror_sends_nothing_after_give_up(tmp_path, uri):
    one = mirror(tmp_path, uri)
    one.tell = lambda line: None
    write(one, "run.json", "old")
    one.flush()
    one.give_up()
    write(one, "run.json", "newer, of who was cut off")
    one.flush()
    with one.store.open_input_stream(f"{one.root}/run.json") as stream:
        assert stream.read() == b"old"


def test_mirror_propagates_deletion_only_for_removable_files(tmp_path, uri):
    """A cleaner of temporary folders must not delete files in the store."""
    one, other = mirror(tmp_path, uri, "one"), mirror(tmp_path, uri, "other")
    for name in ("r/run.json", "r/report/report.json", "r/checkpoints/step-1/state.json", "r/stop"):
        write(one, name, name)
    one.flush()
    shutil.rmtree(one.folder)
    one.flush()
    other.fetch()
    assert len(files(other)) == 4
    (other.folder / "r/run.json").unlink()
    (other.folder / "r/stop").unlink()
    other.flush()
    third = mirror(tmp_path, uri, "third")
    third.fetch()
    assert set(files(third)) == {"r/run.json", "r/report/report.json", "r/checkpoints/step-1/state.json"}


def test_mirror_deletes_checkpoint_only_after_replacement_is_uploaded(tmp_path, uri):
    """The listing is not a snapshot: checkpoints may appear and vanish between two listings."""
    one = mirror(tmp_path, uri)
    write(one, "checkpoints/step-1/state.json", "1")
    one.flush()
    shutil.rmtree(one.folder / "checkpoints/step-1")
    listed = one._files

    def racing() -> list[str]:
        found = listed()
        if not (one.folder / "checkpoints/step-2").exists():  # right after the first listing
            write(one, "checkpoints/step-2/state.json", "2")
        return found

    one._files = racing  # type: ignore[method-assign]
    one.flush()
    there = one._list("", recursive=True)
    assert there.keys() & {"checkpoints/step-1/state.json", "checkpoints/step-2/state.json"}
    one.flush()
    assert set(one._list("", recursive=True)) == {"checkpoints/step-2/state.json"}


def test_metrics_line_is_sent_after_its_checkpoint(tmp_path, uri):
    one = mirror(tmp_path, uri)
    write(one, "checkpoints/step-1/state.json", "1")
    write(one, "metrics.jsonl", "1")
    send = one._send

    def meanwhile(name: str, content: bytes) -> None:
        if "step-1" in name:  # an epoch ends while the first checkpoint is uploaded
            write(one, "checkpoints/step-2/state.json", "2")
            write(one, "metrics.jsonl", "1\n2")
        send(name, content)

    one._send = meanwhile  # type: ignore[method-assign]
    one._push()
    with one.store.open_input_stream(f"{one.root}/metrics.jsonl") as stream:
        assert stream.read() == b"1"
    one._push()
    with one.store.open_input_stream(f"{one.root}/metrics.jsonl") as stream:
        assert stream.read() == b"1\n2"


def test_run_name_is_never_treated_as_private(tmp_path, uri):
    one, other = mirror(tmp_path, uri, "one"), mirror(tmp_path, uri, "other")
    write(one, "attempt-lr3-abc-1/run.json", "{}")
    write(one, "attempt-lr3-abc-1/ray/attempt-7/x", "of Ray")
    one.flush()
    other.fetch()
    assert set(files(other)) == {"attempt-lr3-abc-1/run.json"}


def test_connect_rejects_credentials_in_uri_without_printing_them():
    with pytest.raises(UserError, match="must not contain credentials") as error:
        connect("s3://KEY:SECRET@bucket/runs")
    assert "SECRET" not in str(error.value)


def test_two_machines_get_separate_run_folders(tmp_path, uri):
    one, other = attach(f"{uri}/runs"), attach(f"{uri}/runs")
    try:
        first = RunFolder.create(one.folder, "digits", "abcdef", "", {"status": "running", "data_digest": ""})
        one.flush()
        second = RunFolder.create(
            other.folder, "digits", "abcdef", "", {"status": "running", "data_digest": ""}
        )
        assert (first.name, second.name) == ("digits-abcdef-1", "digits-abcdef-2")
        with idempotent_start(one.folder, "key", "run.json") as begun:
            assert begun is None
            first.update(once="key")
        with idempotent_start(other.folder, "key", "run.json") as begun:
            assert begun == first.name
    finally:
        detach(one)
        detach(other)


def test_attach_removes_copies_left_by_killed_processes(uri):
    """Only copies of this container's processes: pids of other containers are unrelated."""
    here = re.sub("[^0-9]", "", objectstore.process_space())
    left_over = Path(tempfile.mkdtemp(prefix=f"advtrain-store-{here}-999999999-"))
    of_others = Path(tempfile.mkdtemp(prefix=f"advtrain-store-1{here}-999999999-"))
    detach(attach(f"{uri}/runs"))
    assert not left_over.exists()
    assert of_others.exists()
    of_others.rmdir()
