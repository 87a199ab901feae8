import bz2
import gzip
import hashlib
import http.server
import io
import lzma
import random
import re
import tarfile
import threading

import pytest
from filelock import FileLock

from nst_det.data.download import RELEASES, VocRelease, download_voc, fetch, unpack
from nst_det.data.voc import VocDataset
from nst_det.errors import UserError
from tests.helpers.voc import obj, xml


class Server:
    """HTTP on this machine: files below ``/good``, and folders that misbehave each in a way of its own.

    /missing 404; /other another file of the same size; /long more bytes than there should be; /whole ignores ranges;
    /cut ends the connection after ``piece`` bytes; /dead closes it before the first byte; /shifted sends another range;
    /redirect leads to a file of this machine.
    """

    def __init__(self, files):
        self.files, self.piece, self.asked = files, 1000, []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                outer.answer(self)

            def log_message(self, *args):
                pass

        self.httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.httpd.server_port}"

    def answer(self, handler):
        _, kind, name = handler.path.split("/")
        start = int(re.fullmatch(r"bytes=(\d+)-", handler.headers["Range"])[1])
        self.asked.append((kind, start))
        content = self.files[name]
        if kind == "missing":
            return handler.send_error(404)
        if kind == "dead":
            handler.close_connection = True
            return None
        if kind == "redirect":
            handler.send_response(302)
            handler.send_header("Location", "file:///etc/hostname")
            return handler.end_headers()
        content = {"other": bytes(255 - byte for byte in content), "long": content + b"more"}.get(kind, content)
        start = 0 if kind == "whole" else start + 1 if kind == "shifted" and start else start
        handler.send_response(200 if kind == "whole" else 206)
        if kind not in ("whole", "long"):
            handler.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if kind != "long":
            handler.send_header("Content-Length", str(len(content) - start))
        handler.end_headers()
        return handler.wfile.write(content[start:][: self.piece if kind == "cut" else None])


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr("nst_det.data.download.PAUSE_SECONDS", 0.0)


CONTENT = bytes(range(256)) * 20


@pytest.fixture
def server():
    server = Server({"data.tar": CONTENT})
    threading.Thread(target=server.httpd.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.httpd.shutdown()
    server.httpd.server_close()


@pytest.fixture
def get(server, tmp_path):
    """Fetch CONTENT from folders of the server."""

    def get(*kinds, mirrors=()):
        mirrors = [*mirrors, *(f"{server.url}/{kind}" for kind in kinds)]
        return fetch(tmp_path / "data.tar", len(CONTENT), hashlib.sha256(CONTENT).hexdigest(), mirrors)

    return get


TABLE = {
    "once": (b"", ["good"], [("good", 0)]),
    "cut connection": (b"", ["cut"], [("cut", start) for start in range(0, len(CONTENT), 1000)]),
    "stopped call": (CONTENT[:3000], ["good"], [("good", 3000)]),
    "whole part": (CONTENT, ["good"], []),
    "part of something else": (b"x" * 3000, ["good"], [("good", 3000), ("good", 0)]),
    "part too long": (CONTENT + b"x", ["good"], [("good", 0)]),
    "no ranges": (CONTENT[:3000], ["whole"], [("whole", 3000)]),
    "another range": (CONTENT[:3000], ["shifted", "good"], [("shifted", 3000), ("good", 3000)]),
    "missing": (b"", ["missing", "good"], [("missing", 0), ("good", 0)]),
    "dead": (b"", ["dead", "good"], [("dead", 0)] * 3 + [("good", 0)]),
    "another file": (b"", ["other", "good"], [("other", 0), ("good", 0)]),
    "too many bytes": (b"", ["long", "good"], [("long", 0), ("good", 0)]),
    "redirect to a file": (b"", ["redirect", "good"], [("redirect", 0), ("good", 0)]),
}


@pytest.mark.parametrize("case", TABLE)
def test_what_is_asked_for(get, server, tmp_path, case):
    part, mirrors, asked = TABLE[case]
    if part:
        (tmp_path / "data.tar.part").write_bytes(part)
    for _ in range(2):
        assert get(*mirrors).read_bytes() == CONTENT
        assert server.asked == asked
    assert [p.name for p in tmp_path.iterdir()] == ["data.tar"]


def test_no_mirror_left_names_every_reason_and_keeps_the_part(get, server, tmp_path):
    (tmp_path / "data.tar.part").write_bytes(CONTENT[:3000])
    with pytest.raises(UserError) as caught:
        get("missing", "dead")
    for key in (f"{server.url}/missing/data.tar: HTTP 404", f"{server.url}/dead/data.tar: ", "--mirror"):
        assert key in str(caught.value)
    assert (tmp_path / "data.tar.part").read_bytes() == CONTENT[:3000]
    with pytest.raises(UserError, match="SHA-256"):
        get("other")
    assert not (tmp_path / "data.tar").exists()


def test_a_mirror_must_be_http(get):
    for bad in ("file:///etc", "ftp://x/y", "/etc", "http://"):
        with pytest.raises(UserError, match=f"--mirror {bad}"):
            get("good", mirrors=[bad])


def test_another_process_and_a_full_disk(get, tmp_path, monkeypatch):
    with FileLock(tmp_path / "data.tar.lock"), pytest.raises(UserError, match=r"data\.tar.*another process"):
        get("good")
    monkeypatch.setattr("nst_det.data.download.RESERVE", 1 << 60)
    with pytest.raises(UserError, match="MB are free"):
        get("good")


def tar_of(*members):
    """A tar file of (name, bytes), or (name, type, where it leads)."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, *rest in members:
            info = tarfile.TarInfo(name)
            if isinstance(rest[0], bytes) and len(rest) == 1:
                info.size = len(rest[0])
                tar.addfile(info, io.BytesIO(rest[0]))
            else:
                info.type, info.linkname = rest
                tar.addfile(info)
    return stream.getvalue()


@pytest.mark.parametrize(
    "member",
    [
        ("../outside", b"x"),
        ("VOCdevkit/../../outside", b"x"),
        ("/tmp/nst_det_outside", b"x"),
        ("link", tarfile.SYMTYPE, "/etc"),
        ("link", tarfile.LNKTYPE, "../outside"),
        ("pipe", tarfile.FIFOTYPE, ""),
        ("device", tarfile.CHRTYPE, ""),
        ("a\\..\\b", b"x"),
        (".", b"x"),
    ],
)
def test_nothing_is_written_outside(tmp_path, member):
    archive, inside = tmp_path / "a.tar", tmp_path / "inside"
    archive.write_bytes(tar_of(("first.txt", b"1"), member))
    inside.mkdir()
    with pytest.raises(UserError, match=r"a\.tar: .*(outside|a link or a device)"):
        unpack(archive, inside)
    assert [p.name for p in inside.iterdir()] == ["first.txt"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar", "inside"]


def test_what_is_no_archive_or_too_large(tmp_path, monkeypatch):
    archive = tmp_path / "a.tar"
    whole = tar_of(("a.txt", bytes(5000)))
    for content in (b"no archive at all" * 100, whole[:2000]):
        archive.write_bytes(content)
        with pytest.raises(UserError, match=r"a\.tar: a damaged archive"):
            unpack(archive, tmp_path)
    monkeypatch.setattr("nst_det.data.download.LARGEST_MEMBER", 4999)
    archive.write_bytes(whole)
    with pytest.raises(UserError, match=r"a\.txt has 5000 bytes"):
        unpack(archive, tmp_path)


def test_a_damaged_archive_gives_no_part_of_its_files(tmp_path):
    rng = random.Random(0)
    whole = tar_of(*((f"{number}.jpg", rng.randbytes(2000)) for number in range(8)))
    for name, pack in (("tar", bytes), ("gz", gzip.compress), ("xz", lzma.compress), ("bz2", bz2.compress)):
        packed, archive = pack(whole), tmp_path / f"a.{name}"
        archive.write_bytes(packed)
        unpack(archive, tmp_path / name)
        assert len(list((tmp_path / name).iterdir())) == 8
        # in the name of the third file, or near the beginning, in the middle and in the checksum
        for at in (packed.index(b"2.jpg"),) if name == "tar" else (20, len(packed) // 2, len(packed) - 6):
            archive.write_bytes(packed[:at] + bytes([packed[at] ^ 1]) + packed[at + 1 :])
            with pytest.raises(UserError, match=rf"a\.{name}: a damaged archive"):
                unpack(archive, tmp_path / "damaged")


def test_the_largest_file_of_cifar_100_is_taken(tmp_path):
    header = tarfile.TarInfo("cifar-100-python/train")
    header.size = 155_249_918
    (tmp_path / "a.tar").write_bytes(header.tobuf())
    # only that its content isn't there is wrong
    with pytest.raises(UserError, match=r"a\.tar: a damaged archive"):
        unpack(tmp_path / "a.tar", tmp_path)


def voc_tar(split, ids, leave_out=""):
    top = "VOCdevkit/VOC2007"
    members = [(f"{top}/ImageSets/Main/{split}.txt", "".join(f"{id_}\n" for id_ in ids).encode())]
    for id_ in ids:
        members.append((f"{top}/Annotations/{id_}.xml", xml(obj()).encode()))
        if id_ != leave_out:
            members.append((f"{top}/JPEGImages/{id_}.jpg", b"not read here"))
    return tar_of((top, tarfile.DIRTYPE, ""), *members)


@pytest.fixture
def release(server):
    def build(**archives):
        server.files = {f"{name}.tar": content for name, content in archives.items()}
        files = {name: (len(data), hashlib.sha256(data).hexdigest()) for name, data in server.files.items()}
        return VocRelease(2007, files, {"trainval": 2, "test": 1}, (f"{server.url}/good",))

    return build


def test_two_archives_become_one_voc_folder(release, server, tmp_path):
    voc = release(first=voc_tar("trainval", ["000001", "000002"]), second=voc_tar("test", ["000003"]))
    root = download_voc(voc, tmp_path / "data")
    assert root == tmp_path / "data" / "VOCdevkit" / "VOC2007"
    assert VocDataset(root, "trainval").ids == ("000001", "000002")
    assert VocDataset(root, "test").annotation("000003").names == ("cat",)
    assert [p.name for p in (tmp_path / "data").iterdir()] == ["VOCdevkit"]
    # once more asks for nothing
    asked = list(server.asked)
    assert download_voc(voc, tmp_path / "data") == root
    assert server.asked == asked
    (root / "JPEGImages" / "000002.jpg").unlink()
    with pytest.raises(UserError, match=r"not whole: its list trainval has 1 of them \(000002\) lost"):
        download_voc(voc, tmp_path / "data")


def test_a_release_that_is_not_whole_gets_no_name(release, tmp_path):
    voc = release(first=voc_tar("trainval", ["000001", "000002"], "000001"), second=voc_tar("test", ["000003"]))
    with pytest.raises(UserError, match="000001"):
        download_voc(voc, tmp_path, keep_archives=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["first.tar", "second.tar"]
    short = release(first=voc_tar("trainval", ["000001"]), second=voc_tar("test", ["000003"]))
    with pytest.raises(UserError, match="its list trainval has 1 of 2 images"):
        download_voc(short, tmp_path / "other")


def test_the_command(release, tmp_path, monkeypatch, cli, capsys):
    voc = release(first=voc_tar("trainval", ["000001", "000002"]), second=voc_tar("test", ["000003"]))
    monkeypatch.setitem(RELEASES, "voc2007", voc)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to("elsewhere")
    monkeypatch.chdir(tmp_path / "elsewhere")
    for output in ((), ("--output", tmp_path / "link")):
        assert cli("download", "voc2007", *output) == 0
    capsys.readouterr()
    assert cli("download", "voc2007", "--output", tmp_path / "new", "--keep-archives") == 0
    printed = capsys.readouterr().out
    assert f"VOC_ROOT={tmp_path / 'new' / 'VOCdevkit'}" in printed
    assert "images: trainval 2, test 1" in printed
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["VOCdevkit", "first.tar", "second.tar"]


def test_the_known_releases_are_well_formed():
    assert [release.year for release in RELEASES.values()] == [2007, 2012]
    sizes = []
    for release in RELEASES.values():
        assert len(release.mirrors) > 2
        for size, sha256 in release.archives.values():
            assert re.fullmatch(r"[0-9a-f]{64}", sha256)
            sizes.append(size)
    assert sizes == [460_032_000, 451_020_800, 1_999_639_040]
