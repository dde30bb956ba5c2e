"""What an upgrade cannot keep, each with its reason and the one change that would help.

Said when the machine starts and by `segue check`; the machine itself runs all the same.
"""

from __future__ import annotations

from segue.kept.draft import Draft

# option -> (why, remedy)
_OPTIONS = {
    "s": ("the debugger's connection lives inside QEMU", "start without -s"),
    "gdb": ("the debugger's connection lives inside QEMU", "start without -gdb"),
    "qtest": ("the test protocol's clock cannot be handed over", "start without -qtest"),
    "plugin": ("a TCG plugin keeps state of its own", "start without -plugin"),
    "xen-attach": ("Xen guests belong to the hypervisor", "not possible"),
    "xen-domid": ("Xen guests belong to the hypervisor", "not possible"),
    "snapshot": (
        "each instance would make a temporary overlay of its own, and the disks would be corrupt",
        "make overlays with qemu-img create -b, and name those",
    ),
}

# device -> (why, remedy)
_DEVICES = {
    "ivshmem-doorbell": ("its server's connection cannot be kept", "use ivshmem-plain"),
    "usb-host": ("a host USB device belongs to one process", "unplug it before the upgrade"),
    "usb-redir": ("usbredir's state belongs to its connection", "unplug it before the upgrade"),
}


class UnkeepableRule:
    def apply(self, draft: Draft) -> None:
        for option in draft.command_line.options:
            said = f"-{option.name} {option.value or ''}".rstrip()
            if not option.known:
                draft.block(
                    said, "Segue does not know this option", "leave it out, or report it to Segue"
                )
            elif option.name in _OPTIONS:
                draft.block(said, *_OPTIONS[option.name])
            elif option.name == "drive" and option.params.boolean("snapshot", False):
                draft.block(said, *_OPTIONS["snapshot"])
            elif option.name == "icount" and option.params.get("rr") in ("record", "replay"):
                draft.block(said, "record and replay follow one process", "start without rr=")
            elif option.name == "device":
                self._device(draft, option.params.get("driver") or "", said)
            elif option.name == "object" and option.params.get("qom-type") == "sev-guest":
                draft.block(said, "SEV memory is bound to its process", "start without SEV")

    def _device(self, draft: Draft, driver: str, said: str) -> None:
        if driver in _DEVICES:
            draft.block(said, *_DEVICES[driver])
        elif driver == "loader" and ",data=" in said:
            draft.block(
                said, "it is written into guest RAM at every start", "use -device loader,file="
            )
        elif driver.startswith("vhost-"):
            draft.block(
                said, "a vhost back end serves one process", f"use virtio instead of {driver}"
            )
