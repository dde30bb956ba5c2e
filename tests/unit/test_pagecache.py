"""Which disks are opened so that the host's page cache outlives an upgrade."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from segue.kept import pagecache
from segue.qemu.commandline import CommandLine


def word(*option: str) -> str:
    (parsed,) = CommandLine.parse(["qemu-system-x86_64", *option]).options
    return pagecache.kept(parsed).argv()[-1]


@pytest.fixture
def image(tmp_path: Path) -> str:
    path = tmp_path / "disk, with a comma"
    path.touch()
    return str(path).replace(",", ",,")


def test_a_drive_that_is_a_file(image: str) -> None:
    given = f"file={image},if=virtio,format=raw"
    assert word("-drive", given) == f"{given},file.drop-cache=off"


@pytest.mark.parametrize(
    "more", ["media=cdrom", "readonly=on", "file.locking=off", "file.drop-cache=on"]
)
def test_drives_that_are_left_as_they_are(image: str, more: str) -> None:
    given = f"file={image},{more}"
    assert word("-drive", given) == given


@pytest.mark.parametrize("given", ["file=nbd://host/disk", "file=fat:rw:/tmp", "if=none,id=x"])
def test_what_is_no_file(given: str) -> None:
    assert word("-drive", given) == given


@pytest.mark.parametrize(
    ("given", "made"),
    [
        ("driver=file,node-name=a,filename=x", ",drop-cache=off"),
        ("driver=qcow2,node-name=a,file.driver=file,file.filename=x", ",file.drop-cache=off"),
        ("driver=qcow2,node-name=a,file=b", ""),
        ("driver=file,node-name=a,filename=x,drop-cache=on", ""),
    ],
)
def test_blockdevs(given: str, made: str) -> None:
    assert word("-blockdev", given) == given + made


def test_blockdev_in_json_at_every_depth() -> None:
    file = {"driver": "file", "filename": "x"}
    given = {"driver": "qcow2", "file": file, "backing": {"driver": "raw", "file": file}}
    found = json.loads(word("-blockdev", json.dumps(given)))
    assert found["file"]["drop-cache"] is False
    assert found["backing"]["file"]["drop-cache"] is False


def test_other_options_are_none_of_its_business() -> None:
    assert word("-append", "file=x") == "file=x"
