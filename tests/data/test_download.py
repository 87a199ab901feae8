import hashlib
import http.server
import io
import re
import tarfile
import threading

import pytest
from filelock import FileLock

from nst_det.cli import main
from nst_det.data.download import RELEASES, RemoteFile, VocRelease, download_voc, fetch, unpack
from nst_det.data.voc import VocDataset
from nst_det.errors import UserError


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
        wanted = handler.headers.get("Range")
        start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted else 0
        self.asked.append((kind, start))
        content = self.files[name]
        if kind == "missing":
            handler.send_error(404)
            return
        if kind == "dead":
            handler.close_connection = True
            return
        if kind == "redirect":
            handler.send_response(302)
            handler.send_header("Location", "file:///etc/hostname")
            handler.end_headers()
            return
        if kind == "other":
            content = bytes(255 - byte for byte in content)
        if kind == "long":
            content += b"more"
        if kind == "whole":
            start = 0
        total = len(content)
        if kind == "shifted" and start:
            start += 1
        handler.send_response(206 if wanted and kind != "whole" else 200)
        if wanted and kind != "whole":
            handler.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        if kind != "long":
            handler.send_header("Content-Length", str(total - start))
        handler.end_headers()
        body = content[start:]
        handler.wfile.write(body[: self.piece] if kind == "cut" else body)


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
def remote(server):
    def build(*kinds):
        mirrors = tuple(f"{server.url}/{kind}" for kind in kinds)
        return RemoteFile("data.tar", len(CONTENT), hashlib.sha256(CONTENT).hexdigest(), mirrors)

    return build


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
def test_what_is_asked_for(remote, server, tmp_path, case):
    part, mirrors, asked = TABLE[case]
    if part:
        (tmp_path / "data.tar.part").write_bytes(part)
    for _ in range(2):
        assert fetch(remote(*mirrors), tmp_path).read_bytes() == CONTENT
        assert server.asked == asked
    assert [p.name for p in tmp_path.iterdir()] == ["data.tar"]


def test_no_mirror_left_names_every_reason_and_keeps_the_part(remote, server, tmp_path):
    (tmp_path / "data.tar.part").write_bytes(CONTENT[:3000])
    with pytest.raises(UserError) as caught:
        fetch(remote("missing", "dead"), tmp_path)
    said = str(caught.value)
    assert f"{server.url}/missing/data.tar: HTTP 404" in said
    assert f"{server.url}/dead/data.tar: " in said
    assert "--mirror" in said
    assert (tmp_path / "data.tar.part").read_bytes() == CONTENT[:3000]
    with pytest.raises(UserError, match=r"another file \(SHA-256"):
        fetch(remote("other"), tmp_path)
    assert not (tmp_path / "data.tar").exists()


def test_a_named_mirror_comes_first_and_must_be_http(remote, server, tmp_path):
    fetch(remote("dead"), tmp_path, [f"{server.url}/good/"])
    assert server.asked == [("good", 0)]
    for bad in ("file:///etc", "ftp://x/y", "/etc", "http://"):
        with pytest.raises(UserError, match="not an http or https URL"):
            fetch(remote("good"), tmp_path, [bad])


def test_another_process_and_a_full_disk(remote, tmp_path, monkeypatch):
    with FileLock(tmp_path / "data.tar.lock"), pytest.raises(UserError, match=r"data\.tar.*another process"):
        fetch(remote("good"), tmp_path)
    monkeypatch.setattr("nst_det.data.download.RESERVE", 1 << 60)
    with pytest.raises(UserError, match="MB are free"):
        fetch(remote("good"), tmp_path)


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
@pytest.mark.parametrize("filters", [True, False])
def test_nothing_is_written_outside(tmp_path, monkeypatch, member, filters):
    if not filters:  # as in Python 3.10.11 and older
        monkeypatch.delattr(tarfile, "data_filter", raising=False)
    archive, inside = tmp_path / "a.tar", tmp_path / "inside"
    archive.write_bytes(tar_of(("first.txt", b"1"), member))
    inside.mkdir()
    with pytest.raises(UserError, match="leads outside|is a link or a device"):
        unpack(archive, inside)
    assert [p.name for p in inside.iterdir()] == ["first.txt"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar", "inside"]


def test_what_is_no_archive_or_too_large(tmp_path, monkeypatch):
    archive = tmp_path / "a.tar"
    archive.write_bytes(b"no archive at all" * 100)
    with pytest.raises(UserError, match="damaged archive"):
        unpack(archive, tmp_path)
    whole = tar_of(("a.txt", bytes(5000)))
    archive.write_bytes(whole[:2000])
    with pytest.raises(UserError, match="damaged archive"):
        unpack(archive, tmp_path)
    monkeypatch.setattr("nst_det.data.download.LARGEST_MEMBER", 4999)
    archive.write_bytes(whole)
    with pytest.raises(UserError, match="a.txt has 5000 bytes"):
        unpack(archive, tmp_path)


XML = (
    "<annotation><size><width>4</width><height>3</height></size><object><name>cat</name><bndbox>"
    "<xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></object></annotation>"
)


def voc_tar(split, ids, leave_out=""):
    top = "VOCdevkit/VOC2007"
    members = [(f"{top}/ImageSets/Main/{split}.txt", "".join(f"{id_}\n" for id_ in ids).encode())]
    for id_ in ids:
        members.append((f"{top}/Annotations/{id_}.xml", XML.encode()))
        if id_ != leave_out:
            members.append((f"{top}/JPEGImages/{id_}.jpg", b"not read here"))
    return tar_of((top, tarfile.DIRTYPE, ""), *members)


@pytest.fixture
def release(server):
    def build(**archives):
        server.files = {f"{name}.tar": content for name, content in archives.items()}
        files = tuple(
            RemoteFile(name, len(content), hashlib.sha256(content).hexdigest(), (f"{server.url}/good",))
            for name, content in server.files.items()
        )
        return VocRelease(2007, files, {"trainval": 2, "test": 1})

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


def test_the_command_line(release, server, tmp_path, monkeypatch, capsys):
    voc = release(first=voc_tar("trainval", ["000001", "000002"]), second=voc_tar("test", ["000003"]))
    monkeypatch.setitem(RELEASES, "voc2007", voc)
    with pytest.raises(SystemExit) as ended:
        main(["download", "voc2007", "--output", str(tmp_path), "--keep-archives"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert f"VOC_ROOT={tmp_path / 'VOCdevkit'}" in said
    assert "images: trainval 2, test 1" in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["VOCdevkit", "first.tar", "second.tar"]


def test_the_known_releases_are_well_formed():
    assert set(RELEASES) == {"voc2007", "voc2012"}
    for name, release in RELEASES.items():
        assert name == f"voc{release.year}"
        for file in release.archives:
            assert re.fullmatch(r"[0-9a-f]{64}", file.sha256)
            assert len(file.mirrors) > 2
            assert all(mirror.startswith("http") and "{" not in mirror for mirror in file.mirrors)
            # tar archives come in blocks of 512 bytes
            assert file.size % 512 == 0
    sizes = [file.size for release in RELEASES.values() for file in release.archives]
    assert sizes == [460_032_000, 451_020_800, 1_999_639_040]
