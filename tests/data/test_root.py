"""The data root and downloads, against a web server on this machine."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from sparing.core.errors import DataError, InvalidValue, UnknownName
from sparing.data import catalogue
from sparing.data.root import RemoteFile, Source, data_root, download, fetch_files

CONTENT = bytes(range(256)) * 4000
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves CONTENT; ``breaks`` lists after how many bytes the coming answers stop."""

    breaks: list[int]
    ranges: bool
    asked: list[str | None]
    content: bytes
    status: int


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.server.asked.append(wanted)
        content, start = self.server.content, 0
        if self.server.status != 200:
            self.send_error(self.server.status)
            return
        if wanted and self.server.ranges:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        end = start + self.server.breaks.pop(0) if self.server.breaks else len(content)
        self.wfile.write(content[start:end])

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as made:
        made.breaks, made.ranges, made.asked, made.content, made.status = [], True, [], CONTENT, 200
        thread = threading.Thread(target=made.serve_forever, args=(0.01,))
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def get(server: Server, target: Path, **changes: object) -> None:
    options = {"sha256": DIGEST, "size": len(CONTENT), "attempts": 3, "pause": 0.0} | changes
    download(f"http://127.0.0.1:{server.server_port}/file", target, **options)  # type: ignore[arg-type]


def test_a_whole_file_arrives(server: Server, tmp_path: Path) -> None:
    get(server, tmp_path / "deep" / "file")
    assert (tmp_path / "deep" / "file").read_bytes() == CONTENT
    assert not (tmp_path / "deep" / "file.part").exists()
    get(server, tmp_path / "deep" / "file")
    assert len(server.asked) == 1


def test_a_broken_download_goes_on_where_it_ended(server: Server, tmp_path: Path) -> None:
    server.breaks = [100_000, 300_000]
    get(server, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert server.asked == [None, "bytes=100000-", "bytes=400000-"]


def test_a_later_call_goes_on_with_what_an_earlier_one_kept(server: Server, tmp_path: Path) -> None:
    server.breaks = [1000]
    with pytest.raises(DataError, match=rf"1000 of {len(CONTENT)} bytes are kept"):
        get(server, tmp_path / "file", attempts=1)
    assert not (tmp_path / "file").exists()
    get(server, tmp_path / "file", attempts=1)
    assert server.asked == [None, "bytes=1000-"]
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_a_server_without_ranges_sends_all_again(server: Server, tmp_path: Path) -> None:
    server.ranges, server.breaks = False, [5000]
    get(server, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_other_content_is_thrown_away(server: Server, tmp_path: Path) -> None:
    server.content = CONTENT[:-1] + b"x"
    with pytest.raises(DataError, match=f"{DIGEST} is expected. It was thrown away"):
        get(server, tmp_path / "file")
    server.content = CONTENT + b"more"
    with pytest.raises(DataError, match=f"more than the expected {len(CONTENT)} bytes"):
        get(server, tmp_path / "file")
    assert not list(tmp_path.glob("file*"))
    (tmp_path / "file.part").write_bytes(b"z" * 10)
    server.content = CONTENT
    with pytest.raises(DataError, match="thrown away"):
        get(server, tmp_path / "file")
    get(server, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_refusals_are_reported(server: Server, tmp_path: Path) -> None:
    server.status = 404
    with pytest.raises(DataError, match="404"):
        get(server, tmp_path / "file")
    assert len(server.asked) == 3
    for address in ("http://example.org/x", "ftp://127.0.0.1/x", "file:///etc/hostname"):
        with pytest.raises(InvalidValue, match="only https"):
            download(address, tmp_path / "x", DIGEST, 1)


def test_offline_it_says_what_to_place_where(tmp_path: Path) -> None:
    file = RemoteFile("a.bin", "http://127.0.0.1:9/a.bin", DIGEST, 7)
    source = Source("thing", "", "", "", (file,))
    with pytest.raises(DataError) as caught:
        download(file.url, tmp_path / "thing" / "a.bin", DIGEST, 7, attempts=1)
    assert "0 of 7 bytes" in str(caught.value)
    (tmp_path / "thing" / "a.bin").write_bytes(b"content")
    assert fetch_files(source, tmp_path) == [tmp_path / "thing" / "a.bin"]
    (tmp_path / "thing" / "a.bin").unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sparing.data.root.time.sleep", lambda seconds: None)
        with pytest.raises(DataError) as caught:
            fetch_files(source, tmp_path)
    for word in (file.url, "7 bytes", DIGEST, str(tmp_path / "thing" / "a.bin")):
        assert word in str(caught.value)


def test_the_root_is_argument_then_variable_then_user_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPARING_DATA", str(tmp_path / "b"))
    assert data_root(tmp_path / "a") == tmp_path / "a"
    assert data_root() == tmp_path / "b"
    monkeypatch.delenv("SPARING_DATA")
    assert data_root().parts[-2:] == ("sparing", "data")


def test_listing_and_check_of_what_is_missing(tmp_path: Path) -> None:
    assert [(line.name, line.present) for line in catalogue.listing(tmp_path)] == [
        ("fashion_mnist", False),
        ("cifar10", False),
        ("cifar100", False),
        ("cora", False),
        ("citeseer", False),
        ("mutag", False),
        ("nci1", False),
        ("proteins", False),
        ("dd", False),
        ("recidivism", False),
        ("credit_default", False),
        ("german_credit", False),
        ("sst2", False),
        ("ag_news", False),
        ("trec", False),
        ("hflights", False),
        ("squad", False),
        ("tiny_shakespeare", False),
        ("us_addresses", False),
    ]
    found = catalogue.check("cifar10", tmp_path)
    assert not found.ok
    assert "no CIFAR-10 in" in found.problem
    with pytest.raises(UnknownName, match="Did you mean 'cifar100'"):
        catalogue.check("cifar1000", tmp_path)


def test_flights_are_read_and_refused(data_root: Path, tmp_path: Path) -> None:
    found = catalogue.check("hflights", data_root)
    assert found.splits == {"train": 201_455, "test": 22_419}
    assert found.files["hflights_delay.parquet"].startswith("readable, SHA-256 ")
    (tmp_path / "hflights_delay").mkdir()
    (tmp_path / "hflights_delay" / "hflights_delay.parquet").write_bytes(b"PAR1")
    broken = catalogue.check("hflights", tmp_path)
    assert not broken.ok
    assert "hflights_delay.parquet: " in broken.problem
    assert "belongs at" in broken.problem


def test_check_reads_the_real_set(data_root: Path) -> None:
    found = catalogue.check("fashion_mnist", data_root)
    assert found.ok
    assert found.splits == {"train": 60_000, "test": 10_000}
    assert found.files["t10k-labels-idx1-ubyte.gz"] == "as published"
