"""Data in object stores: pushing, staging, converting from addresses; lost connections, damaged objects, kills."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, SECRET, Digits, ObjectStore, run_program
from PIL import Image
from servers import ENDLESS, Proxy, point_hub_at, serve

from fastdcd.remote import address, staging
from fastdcd.remote.address import open_address, without_secrets
from fastdcd.remote.listing import MANIFEST, list_files
from fastdcd.remote.pushing import push
from fastdcd.remote.staging import stage

KB = 1000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A dozen files in two folders, 900 kB; one of them large, one empty."""
    rng = np.random.default_rng(0)
    root = tmp_path / "folder"
    for number in range(12):
        path = root / ("index" if number % 3 else ".") / f"file-{number:02d}.tar"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(rng.bytes([0, 500 * KB][number] if number < 2 else 40 * KB))
    return root


def content(root: Path) -> dict[str, bytes]:
    found = (path for path in root.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {str(path.relative_to(root)): path.read_bytes() for path in found}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many requests for little data, and no long pauses between tries."""
    monkeypatch.setattr(staging, "CHUNK", 64 * KB)
    monkeypatch.setattr(address, "PAUSE", 0.01)


@pytest.fixture
def proxy(object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A line to the store that tests can cut."""
    proxy = Proxy(object_store.url)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    yield proxy
    proxy.close()


def test_what_is_pushed_is_staged_and_only_once(object_store: ObjectStore, folder: Path, tmp_path: Path) -> None:
    url = f"s3://{object_store.bucket}/some/folder"
    assert push(folder, url).sent == 12
    assert push(folder, url).sent == 0
    staged = stage(url, tmp_path / "copy")
    assert content(tmp_path / "copy") == content(folder)
    assert (staged.files, staged.fetched, staged.checksums, staged.path) == (12, 12, True, tmp_path / "copy")
    assert stage(url, tmp_path / "copy").fetched == 0
    parts = [stage(url, tmp_path / "parts", part=part, of=3) for part in range(3)]
    assert [part.fetched for part in parts] == [4, 4, 4] and content(tmp_path / "parts") == content(folder)


def test_a_new_version_replaces_what_differs_and_removes_what_is_gone(
    object_store: ObjectStore, folder: Path, tmp_path: Path
) -> None:
    url = f"s3://{object_store.bucket}/x"
    push(folder, url)
    stage(url, tmp_path / "copy")
    (tmp_path / "copy" / "notes.txt").write_text("mine")
    changed = folder / "index" / "file-04.tar"
    changed.write_bytes(changed.read_bytes()[::-1])  # of the same size
    (folder / "file-03.tar").unlink()
    assert push(folder, url).sent == 1
    assert stage(url, tmp_path / "copy").fetched == 1
    assert content(tmp_path / "copy") == {**content(folder), "notes.txt": b"mine"}
    with pytest.raises(ValueError, match=r"holds what was staged from s3://.*/x, not from .*/y"):
        push(folder, f"s3://{object_store.bucket}/y")
        stage(f"s3://{object_store.bucket}/y", tmp_path / "copy")
    own = tmp_path / "own" / "file-03.tar"
    own.parent.mkdir()
    own.write_bytes(b"of somebody")
    (folder / "file-03.tar").write_bytes(b"another")
    push(folder, url)
    with pytest.raises(ValueError, match=r"file-03.tar: another file is there"):
        stage(url, own.parent)
    assert own.read_bytes() == b"of somebody"


def test_a_damaged_object_is_named_and_the_others_are_kept(
    object_store: ObjectStore, folder: Path, tmp_path: Path
) -> None:
    url = f"s3://{object_store.bucket}/x"
    push(folder, url)
    data = bytearray(object_store.get("x/index/file-05.tar"))
    data[1234] ^= 1
    object_store.put("x/index/file-05.tar", bytes(data))
    ran = run_program("tools/stage.py", url, tmp_path / "copy")
    assert ran.code == 2 and ran.err.count("\n") == 1, ran.err
    assert f"{url}/index/file-05.tar: not as it was pushed" in ran.err and "(1 such file)" in ran.err
    there = content(folder)
    del there["index/file-05.tar"]
    assert content(tmp_path / "copy") == there
    object_store.put("x/index/file-05.tar", bytes(data[:-1]))  # cut off
    ran = run_program("tools/stage.py", url, tmp_path / "copy")
    assert ran.code in (1, 2) and "index/file-05.tar" in ran.err and ran.err.count("\n") == 1, ran.err
    object_store.put("x/index/file-05.tar", (folder / "index/file-05.tar").read_bytes())
    assert stage(url, tmp_path / "copy").fetched == 1 and content(tmp_path / "copy") == content(folder)


def test_a_connection_that_is_cut_once_is_nobodys_loss(
    object_store: ObjectStore, proxy: Proxy, folder: Path, tmp_path: Path
) -> None:
    url = f"s3://{object_store.bucket}/x"
    push(folder, url)
    proxy.cut_after(200 * KB, times=1)
    stage(url, tmp_path / "copy", workers=2)
    assert proxy.outages == 0 and content(tmp_path / "copy") == content(folder)


def test_a_lost_connection_is_one_line_and_what_was_there_is_not_fetched_again(
    object_store: ObjectStore, proxy: Proxy, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"s3://{object_store.bucket}/x"
    push(folder, url)
    monkeypatch.setattr(address, "ATTEMPTS", 1)
    proxy.cut_after(350 * KB)
    ran = run_program("tools/stage.py", url, tmp_path / "copy", "--workers", 1)
    assert ran.code == 1 and ran.err.count("\n") == 1 and "the same command continues" in ran.err, ran.err
    (partial,) = (tmp_path / "copy").rglob(".*.partial")
    assert 64 * KB <= partial.stat().st_size < 500 * KB and partial.name == ".file-01.tar.partial"
    kept = sum(path.stat().st_size for path in (tmp_path / "copy").rglob("*.*") if path.is_file())
    proxy.cut_after(ENDLESS)
    stage(url, tmp_path / "copy")
    assert content(tmp_path / "copy") == content(folder)
    assert proxy.passed < 900 * KB - kept + 60 * KB, "all of it was fetched again"


def test_a_killed_staging_continues(object_store: ObjectStore, proxy: Proxy, folder: Path, tmp_path: Path) -> None:
    url = f"s3://{object_store.bucket}/x"
    push(folder, url)
    proxy.silent = True
    proxy.cut_after(300 * KB)
    script = (
        "import sys; from pathlib import Path; from fastdcd.remote import staging; staging.CHUNK = 64000\n"
        "staging.stage(sys.argv[1], Path(sys.argv[2]), workers=1)"
    )
    process = subprocess.Popen([sys.executable, "-c", script, url, tmp_path / "copy"], cwd=ROOT)
    deadline = time.monotonic() + 60
    while proxy.passed < 300 * KB and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert any((tmp_path / "copy").rglob(".*.partial"))
    proxy.silent = False
    proxy.cut_after(ENDLESS)
    stage(url, tmp_path / "copy")
    assert content(tmp_path / "copy") == content(folder) and not [*(tmp_path / "copy").rglob(".*.partial")]


def test_an_interrupted_push_continues_and_is_not_staged_before(
    object_store: ObjectStore, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"s3://{object_store.bucket}/x"
    real, sent = open_address(url).fs.__class__.put_file, []

    def put_file(self: object, local: str, remote: str, **options: object) -> object:
        sent.append(remote)
        if len(sent) == 5:
            raise ConnectionError("lost")
        return real(self, local, remote, **options)

    monkeypatch.setattr(open_address(url).fs.__class__, "put_file", put_file)
    with pytest.raises(OSError, match=r"lost; the same command continues"):
        push(folder, url, workers=1)
    with pytest.raises(ValueError, match="its push is not finished"):
        stage(url, tmp_path / "copy")
    assert push(folder, url, workers=1).sent == 12 - 4
    assert stage(url, tmp_path / "copy").files == 12


def test_a_teacher_cache_serves_a_run_on_another_machine(
    digits: Digits, object_store: ObjectStore, tmp_path: Path
) -> None:
    bucket = f"s3://{object_store.bucket}"
    settings = {"teacher": {"mode": "cached"}, "views": {"count": 2}, "train": {"epochs": 2}}
    here = digits.file(tmp_path / "x.yaml", **settings, cache={"path": str(tmp_path / "cache")})
    ran = run_program("tools/cache_teacher.py", "fill", "--config", here)
    assert ran.code == 0, ran.err
    for source, name in ((tmp_path / "cache", "cache"), (digits.resident, "data")):
        assert run_program("tools/push.py", source, f"{bucket}/{name}").code == 0
        assert run_program("tools/stage.py", f"{bucket}/{name}", tmp_path / "there" / name).code == 0
    data = {"train": str(tmp_path / "there/data/train"), "val": str(tmp_path / "there/data/val")}
    there = digits.file(
        tmp_path / "there" / "x.yaml", **settings, data=data, cache={"path": str(tmp_path / "there/cache")}
    )
    ran = run_program("fastdcd/train.py", "--config", there)
    assert ran.code == 0, ran.err
    assert json.loads((tmp_path / "there/run/summary.json").read_text())["teacher_images"] == 0


# ---- addresses as sources of a conversion


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for number in range(8):
        path = tmp_path / "pictures" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 8), (number, 0, 0)).save(path)
    return tmp_path / "pictures"


def test_addresses_of_folders_archives_patterns_and_files(
    object_store: ObjectStore, pictures: Path, tmp_path: Path
) -> None:
    import tarfile
    import zipfile

    bucket = f"s3://{object_store.bucket}"
    object_store.upload(pictures, "pictures")
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        for path in pictures.rglob("*.png"):
            archive.write(path, f"train/{path.relative_to(pictures)}")
    object_store.put("z.zip", (tmp_path / "z.zip").read_bytes())
    for part in range(2):
        with tarfile.open(tmp_path / f"set-{part}.tar", "w") as tar:
            for path in sorted(pictures.rglob("*.png"))[part::2]:
                tar.add(path, path.relative_to(pictures))
        object_store.put(f"tars/set-{part}.tar", (tmp_path / f"set-{part}.tar").read_bytes())
    object_store.put("tars/notes.txt", b"not wanted")
    expected = None
    sources = ("pictures", "z.zip", "z.zip/train", "tars/*.tar", "tars/set-{0..1}.tar")
    for number, source in enumerate(sources):
        out = tmp_path / f"out{number}"
        ran = run_program("tools/convert.py", "resident", f"{bucket}/{source}", out, "--workers", 0)
        assert ran.code == 0, (source, ran.err)
        assert f"{out}.source: " in ran.err and "no checksums to compare" in ran.err
        found = (out / "images.npy").read_bytes()
        expected = expected or found
        assert found == expected, source
    assert not (tmp_path / "out3.source" / "notes.txt").exists()


def test_files_of_a_web_server(object_store: ObjectStore, pictures: Path, tmp_path: Path) -> None:
    """The store's own web addresses: single files, several in braces, and a folder that was pushed."""
    object_store.client.put_bucket_policy(
        Bucket=object_store.bucket,
        Policy=json.dumps(
            {"Statement": [{"Effect": "Allow", "Principal": "*", "Action": "s3:*", "Resource": "*"}]}
        ),
    )
    web = f"{object_store.url}/{object_store.bucket}"
    push(pictures, f"s3://{object_store.bucket}/pictures")
    staged = stage(f"{web}/pictures", tmp_path / "pushed")
    assert staged.checksums and content(tmp_path / "pushed") == content(pictures)
    staged = stage(f"{web}/pictures/a/{{0,2}}.png", tmp_path / "some")
    assert sorted(content(tmp_path / "some")) == ["0.png", "2.png"]
    signed = object_store.client.generate_presigned_url(
        "get_object", Params={"Bucket": object_store.bucket, "Key": "pictures/b/1.png"}
    )
    staged = stage(signed, tmp_path / "signed")
    assert staged.path == tmp_path / "signed" / "1.png" and staged.path.is_file()
    manifest = (tmp_path / "signed" / MANIFEST).read_text()
    assert "Signature" not in manifest and "access" not in manifest.lower()
    ran = run_program("tools/stage.py", f"{web}/pictures/none.tar?X-Amz-Signature=abcdef0123", tmp_path / "none")
    assert ran.code == 2 and "abcdef0123" not in ran.err and ran.err.count("\n") == 1, ran.err


def test_a_data_set_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a server of ours that answers as the Hub does: listing, SHA-256 of large files, parts of files."""
    data = np.random.default_rng(0).bytes(200 * KB)
    root = tmp_path / "hub"
    (root / "data").mkdir(parents=True)
    (root / "README.md").write_text("# photographs")
    for name in ("train-0.parquet", "train-1.parquet", "validation-0.parquet"):
        (root / "data" / name).write_bytes(data)
    with serve(root, hub=True) as url:
        point_hub_at(url, monkeypatch)
        staged = stage("hf://datasets/me/photographs", tmp_path / "all")
        assert content(tmp_path / "all") == content(root) and not staged.checksums  # small files have none
        staged = stage("hf://datasets/me/photographs/data/{train,validation}-*.parquet", tmp_path / "some")
        assert staged.checksums and len(content(tmp_path / "some")) == 3
        for wrong in ("hf://datasets/me/nothing", "hf://datasets/me/photographs/none", "hf://datasets/me"):
            ran = run_program("tools/stage.py", wrong, tmp_path / "none")
            assert ran.code == 2 and ran.err.count("\n") == 1, ran.err
        sums = list_files("hf://datasets/me/photographs/data").files
        assert {len(entry.sha256) for entry in sums.values()} == {64}


WRONG = {
    "an unknown kind": ("ftp://host/x", "ftp:// are not known; expected hf://datasets/OWNER/NAME, s3://"),
    "nothing": ("s3://", "not an address; expected one like s3://BUCKET/FOLDER"),
    "no bucket": ("s3:///x", "not an address"),
    "a way out": ("s3://bucket/a/../b", "not an address"),
    "a line break": ("s3://bucket/a\nb", "not an address"),
    "credentials": ("https://me:hunter22@host/x.tar", "***@host/x.tar: an address with credentials"),
    "a model of the Hub": ("hf://timm/resnet18", "not a dataset of the Hub"),
    "no range": ("s3://bucket/x-{9..1}.tar", "is no range"),
    "a bucket that is not there": ("s3://no-such-bucket/x", "no-such-bucket/x: "),
}


@pytest.mark.parametrize("what", WRONG)
def test_addresses_that_cannot_be_right_are_one_line(
    what: str, object_store: ObjectStore, folder: Path, tmp_path: Path
) -> None:
    url, says = WRONG[what]
    commands = [("tools/stage.py", url, tmp_path / "x"), ("tools/convert.py", "resident", url, tmp_path / "y")]
    if what != "no range":
        commands.append(("tools/push.py", folder, url))
    for command in commands:
        ran = run_program(str(command[0]), *command[1:])
        assert ran.code == 2 and ran.err.count("\n") == 1 and says in ran.err, (command, ran)
        assert "hunter22" not in ran.err and SECRET not in ran.err


def test_what_cannot_be_pushed(object_store: ObjectStore, folder: Path, tmp_path: Path) -> None:
    url = f"s3://{object_store.bucket}/x"
    for place, instead in (("https://host/x", "your server's own upload"), ("hf://datasets/me/x", "upload-large")):
        with pytest.raises(ValueError, match=f"cannot be pushed to; use .*{instead}"):
            push(folder, place)
    (tmp_path / "empty").mkdir()
    for path, says in ((tmp_path / "none", "no such folder"), (tmp_path / "empty", "no files in it")):
        with pytest.raises(ValueError, match=says):
            push(path, url)
    (folder / ".images.npy.journal").write_text("")
    with pytest.raises(ValueError, match="not finished; finish it first"):
        push(folder, url)
    assert object_store.keys() == []


def test_credentials_are_not_printed(
    object_store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh12345")
    text = f"403 of https://me:pw@host/x?X-Amz-Signature=12&a=b, key {SECRET}, hf_abcdefgh12345"
    assert without_secrets(text) == "403 of https://***@host/x?... key ***, ***"
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    ran = run_program("tools/stage.py", f"s3://{object_store.bucket}/x", tmp_path / "copy")
    assert ran.code == 2 and "AWS_PROFILE" in ran.err and ran.err.count("\n") == 1, ran.err


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for url, module, says in (
        ("s3://bucket/x", "s3fs", "pip install 'fastdcd[remote]'"),
        ("https://host/x.tar", "aiohttp", "pip install 'fastdcd[remote]'"),
        ("gs://bucket/x", "gcsfs", "pip install 'fastdcd[gcs]'"),
    ):
        monkeypatch.setitem(sys.modules, module, None)
        ran = run_program("tools/convert.py", "shards", url, tmp_path / "out")
        assert ran.code == 2 and says in ran.err and ran.err.count("\n") == 1, ran.err


def test_names_that_lead_outside_are_refused(object_store: ObjectStore, tmp_path: Path) -> None:
    entry = {"bytes": 1, "sha256": "0" * 64}
    for name in ("../x", "/x", "a/../../x"):
        tree = {"format": "fastdcd-files-1", "complete": True, "files": {name: entry}}
        object_store.put(f"x/{MANIFEST}", json.dumps(tree).encode())
        with pytest.raises(ValueError, match="leads outside"):
            stage(f"s3://{object_store.bucket}/x", tmp_path / "copy")
    for text in ("{", "[]", '{"format": "fastdcd-files-9", "complete": true, "files": {}}'):
        object_store.put(f"x/{MANIFEST}", text.encode())
        with pytest.raises(ValueError, match="push again"):
            list_files(f"s3://{object_store.bucket}/x")
    assert not (tmp_path / "x").exists() and not os.path.lexists(tmp_path.parent / "x")
