"""What became of a machine: how it is noted, read from a block graph, and said again."""

from __future__ import annotations

import json
from typing import Any

import pytest

from segue.kept.changes import blocks, carried, devices, graph, hmp
from segue.kept.changes.record import Record
from segue.kept.changes.settings import actions
from segue.qemu.commandline import CommandLine, Option

NODE = {"ro": False, "cache": {"writeback": True, "direct": False, "no-flush": False}}


def made(
    nodes: dict[str, dict[str, Any]],
    drives: dict[str, str | None] | None = None,
    disks: dict[str, str] | None = None,
) -> graph.Graph:
    """A graph of nodes `{name: {drv, file, ro, below: {edge: name}}}`, drives and devices."""
    drives, disks = drives or {}, disks or {}
    ids = {name: number for number, name in enumerate([*nodes, *drives, *disks])}
    roots = [(name, root) for name, root in {**drives, **disks}.items() if root]
    edges = [{"parent": ids[name], "child": ids[root], "name": "root"} for name, root in roots]
    for name, node in nodes.items():
        edges += [
            {"parent": ids[name], "child": ids[child], "name": edge}
            for edge, child in node.get("below", {}).items()
        ]
    kinds = [(name, "block-driver") for name in nodes]
    kinds += [(name, "block-backend") for name in [*drives, *disks]]
    return graph.build(
        {
            "nodes": [{"id": ids[name], "name": name, "type": kind} for name, kind in kinds],
            "edges": edges,
        },
        [{"node-name": name, **NODE, **node} for name, node in nodes.items()],
        [{"device": name, "qdev": f"of-{name}"} for name in drives]
        + [{"device": "", "qdev": name} for name in disks],
    )


def image(name: str, file: str, **more: str) -> dict[str, dict[str, Any]]:
    """A qcow2 node with a file node of QEMU's naming."""
    inner = f"#file-{name}"
    return {
        name: {"drv": "qcow2", "file": file, "below": {"file": inner, **more}},
        inner: {"drv": "file", "file": file},
    }


def options(*words: str) -> list[tuple[int, Option]]:
    return list(enumerate(CommandLine.parse(["qemu", *words]).options))


def noted(before: graph.Graph, *commands: tuple[str, dict[str, Any]]) -> Record:
    record = Record(baseline={"blocks": blocks.baseline(before)})
    for command, arguments in commands:
        record.note(command, arguments)
    return record


DRIVE = ("-drive", "if=none,id=d,file=/a,format=qcow2,cache=none")
NODES = ("-blockdev", "qcow2,node-name=n,file.driver=file,file.filename=/n,file.aio=native")


def test_what_was_not_changed_stays_as_the_user_wrote_it() -> None:
    before = made({**image("#1", "/a"), **image("n", "/n")}, {"d": "#1"}, {"disk": "n"})
    # The same in another instance, where QEMU draws other names.
    now = made({**image("#7", "/a"), **image("n", "/n")}, {"d": "#7"}, {"disk": "n"})
    found = blocks.survey(now, options(*DRIVE, *NODES), noted(before))
    assert (found.dropped, found.altered, found.added, found.blockers) == (set(), {}, [], [])


def test_snapshots_of_a_drive_lie_inside_of_it() -> None:
    before = made(image("#1", "/a"), {"d": "#1"})
    now = made({**image("#2", "/b", backing="#1"), **image("#1", "/a")}, {"d": "#2"})
    found = blocks.survey(now, options(*DRIVE), noted(before))
    params = found.altered[0].params
    assert (params.get("id"), params.get("cache"), params.get("if")) == ("d", "none", "none")
    assert params.get("driver") == "qcow2" and params.get("file.filename") == "/b"
    assert params.get("backing.driver") == "qcow2"
    assert params.get("backing.file.filename") == "/a"
    assert "format" not in params and "file" not in params


def test_snapshots_of_a_node_are_nodes_of_their_own() -> None:
    before = made(image("n", "/n"), {}, {"disk": "n"})
    now = made({**image("#2", "/b", backing="n"), **image("n", "/n")}, {}, {"disk": "#2"})
    now = graph.Graph(**{**vars(now), "facts": {**now.facts, "n": {**now.facts["n"], "ro": True}}})
    found = blocks.survey(now, options(*NODES), noted(before))
    assert found.dropped == {0}
    base, top = found.added
    # The user's own words, in the form in which they were given; a base is only read.
    assert base.params.json is None
    assert base.params.get("file.aio") == "native" and base.params.get("read-only") == "on"
    tree = json.loads(top.value or "")
    assert tree["backing"] == "n" and tree["file"]["filename"] == "/b"
    # A device must name it, so it is given a name; its file is opened as the base's was.
    assert found.renamed == {"#2": tree["node-name"]}
    assert tree["file"]["aio"] == "native"


def test_another_medium_and_none() -> None:
    line = ("-drive", "if=none,id=d,file=/a,format=raw,media=cdrom,readonly=on")
    raw = {"#1": {"drv": "raw", "file": "/a", "below": {"file": "#2"}}}
    before = made({**raw, "#2": {"drv": "file", "file": "/a"}}, {"d": "#1"})
    other = made({**raw, "#2": {"drv": "file", "file": "/b"}}, {"d": "#1"})
    found = blocks.survey(other, options(*line), noted(before))
    assert found.altered[0].params.get("file.filename") == "/b"
    empty = blocks.survey(made({}, {"d": None}), options(*line), noted(before))
    assert str(empty.altered[0]) == "-drive if=none,id=d,media=cdrom"
    gone = blocks.survey(made({}), options(*line), noted(before))
    assert gone.dropped == {0}


def test_a_node_within_another_goes_with_it() -> None:
    before = made({})
    tree = {
        "driver": "qcow2",
        "node-name": "n",
        "file": {"driver": "file", "filename": "/n", "node-name": "f", "locking": "off"},
        "backing": None,
    }
    now = made(
        {
            "n": {"drv": "qcow2", "file": "/n", "below": {"file": "f"}},
            "f": {"drv": "file", "file": "/n"},
        }
    )
    found = blocks.survey(now, [], noted(before, ("blockdev-add", tree)))
    assert [json.loads(o.value or "") for o in found.added] == [tree]


def test_a_node_whose_options_nobody_knows_is_a_blocker() -> None:
    before = made(image("n", "/n"), {}, {"disk": "n"})
    now = made({"m": {"drv": "nbd", "file": "nbd://host/x"}}, {}, {"disk": "m"})
    found = blocks.survey(now, options(*NODES), noted(before))
    assert [b.what for b in found.blockers] == ["block node m (nbd, nbd://host/x)"]


def test_a_drive_that_some_releases_make_for_nothing() -> None:
    now = made({}, {"sd0": None})
    now = graph.Graph(**{**vars(now), "backends": {"sd0": {"device": "sd0"}}})
    assert blocks.survey(now, [], noted(made({}))).added == []


def test_a_drive_with_a_file_and_options_of_it() -> None:
    line = ("-drive", "if=none,id=d,file=/a,file.locking=off")
    before = made(image("#1", "/a"), {"d": "#1"})
    assert blocks.survey(before, options(*line), noted(before)).altered == {}


def test_only_devices_without_an_id_whose_place_is_certain() -> None:
    line = options("-device", "virtio-net,netdev=a", "-device", "edu", "-device", "edu,id=e")
    assert devices._anonymous_options(line, ["virtio-net-pci", "edu"]) == {0: 0, 1: 1}
    assert devices._anonymous_options(line, ["virtio-net-pci", "edu", "virtio-blk-pci"]) == {
        0: 0,
        1: 1,
    }
    # A -virtfs between the two made one as well.
    assert devices._anonymous_options(line, ["virtio-net-pci", "virtio-9p-pci", "edu"]) == {}


def test_lines_tell_graphs_apart() -> None:
    one = made({**image("#2", "/b", backing="#1"), **image("#1", "/a")}, {"d": "#2"})
    same = made({**image("#9", "/b", backing="#8"), **image("#8", "/a")}, {"d": "#9"})
    other = made(image("#2", "/b"), {"d": "#2"})
    assert sorted(one.lines()) == sorted(same.lines())
    assert sorted(one.lines()) != sorted(other.lines())


def test_the_record_forgets_what_is_gone_and_goes_through_json() -> None:
    record = Record()
    record.device_deleted("/machine/peripheral/cold", "cold")
    record.note("device_add", {"driver": "x", "id": "cold"})
    record.note("device_add", {"driver": "x", "id": "hot"})
    record.note("set_link", {"name": "hot", "up": False})
    record.device_deleted("/machine/peripheral/hot", "hot")
    record.note("object-add", {"qom-type": "iothread", "id": "io"})
    record.note("object-add", {"qom-type": "iothread", "id": "io2"})
    record.note("object-del", {"id": "io"})
    record.note("set_password", {"protocol": "vnc", "password": "a"})
    record.note("set_password", {"protocol": "vnc", "password": "b"})
    record.note("qom-set", {"path": "/objects/io2", "property": "poll-max-ns", "value": 1})
    record.note("qom-set", {"path": "/objects/io2", "property": "poll-max-ns", "value": 2})
    record.note("qom-set", {"path": "vm0", "property": "requested-size", "value": 2})
    record.note("qom-set", {"path": "/objects/io", "property": "poll-max-ns", "value": 2})
    record.note("object-del", {"id": "io"})
    record.note("query-status", {})
    again = Record.from_json(json.loads(json.dumps(record.to_json())))
    assert again == record
    assert list(record.devices) == ["cold"] and record.unplugged == ["cold"]
    assert list(record.objects) == ["io2"] and record.links == {}
    assert record.passwords == [["set_password", {"protocol": "vnc", "password": "b"}]]
    assert record.properties == [["/objects/io2", "poll-max-ns", 2]]


def test_a_password_that_expires_in_a_while_does_so_on_every_instance() -> None:
    record = Record()
    record.note("expire_password", {"protocol": "vnc", "time": "+60"})
    assert record.passwords[0][1]["time"].isdecimal()


@pytest.mark.parametrize(
    ("line", "meaning"),
    [
        ("device_add e1000,id=a", ("device_add", {"driver": "e1000", "id": "a"})),
        ("  object_add rng-builtin,id=r ", ("object-add", {"qom-type": "rng-builtin", "id": "r"})),
        ("netdev_add user,id=n", ("netdev_add", {"type": "user", "id": "n"})),
        ("set_link nic off", ("set_link", {"name": "nic", "up": False})),
        ("watchdog_action none", ("watchdog-set-action", {"action": "none"})),
        ("device_add", None),
        ("info block", None),
        ("", None),
    ],
)
def test_lines_of_the_human_monitor(line: str, meaning: Any) -> None:
    assert hmp.translate(line) == meaning


def test_a_chardev_in_the_words_of_a_command_line() -> None:
    unix = {"type": "unix", "data": {"path": "/s"}}
    found = carried.chardev(
        {"id": "c", "backend": {"type": "socket", "data": {"addr": unix, "wait": True}}}
    )
    assert found is not None
    assert (found.params.get("path"), found.params.get("server")) == ("/s", "on")
    # Nobody is waited for: the guest runs.
    assert found.params.get("wait") == "off"
    fd = {"type": "fd", "data": {"str": "lent"}}
    lent = carried.chardev({"id": "c", "backend": {"type": "socket", "data": {"addr": fd}}})
    assert carried.broker(lent, lambda line: None) is None
    assert carried.why_not(lent) == "its descriptor was lent to one QEMU"
    assert carried.why_not(carried.chardev({"id": "c", "backend": "nonsense"})) is not None


def test_a_device_comes_after_the_one_that_has_its_bus() -> None:
    disk = ("/machine/peripheral/scsi/virtio-backend/scsi.0", {"driver": "scsi-hd", "id": "disk"})
    scsi = ("/machine/peripheral/port/port", {"driver": "virtio-scsi-pci", "id": "scsi"})
    nic = ("/machine/q35/pcie.0", {"driver": "e1000", "id": "nic"})
    assert [d["id"] for d in devices._in_order([disk, scsi, nic])] == ["scsi", "nic", "disk"]


def test_the_end_of_the_guest_is_told_to_the_supervisor_first() -> None:
    given = {"shutdown": "poweroff", "panic": "exit-failure", "watchdog": "none"}
    assert actions(given) == {"shutdown": "pause", "panic": "pause", "watchdog": "none"}
    assert actions({"panic": "none"}) == {"panic": "none"}
