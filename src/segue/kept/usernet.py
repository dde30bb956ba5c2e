"""What `-netdev user` says, for passt: net/slirp.c's words and defaults."""

from __future__ import annotations

import re
import socket
import struct

from segue.qemu.options import Params

# What slirp shows the guest where nothing else is said.
_NET, _MASK = "10.0.2.0", 24
_HOST, _DNS, _DHCP = 0x0202, 0x0203, 0x020F
# slirp's own, so that the guest's DHCP client is told what it was told before: it tells none.
_MTU = "1500"

_KNOWN = frozenset(
    "type id name netdev model mac macaddr vectors addr net host hostname dns dhcpstart hostfwd "
    "restrict ipv4 ipv6 dnssearch domainname".split()
)
_REASONS = {
    "guestfwd": "passt has no guestfwd",
    "tftp": "passt has no TFTP server",
    "bootfile": "passt tells no boot file",
    "tftp-server-name": "passt tells no boot server",
    "smb": "passt starts no SMB server",
    "smbserver": "passt starts no SMB server",
}
_FORWARD = re.compile(r"(tcp|udp|):([^:]*):(\d+)-([^:]*):(\d+)")


class Untranslatable(Exception):
    """Says what passt cannot do."""


def values(params: Params, key: str) -> list[str]:
    """All values of a list, in either form: `hostfwd=...`, or JSON's `[{"str": ...}]`."""
    return [v for k, v in params.items() if re.fullmatch(rf"{key}(\.\d+)?(\.str)?", k)]


def translate(params: Params) -> list[str]:
    """passt's words for a user network. Raises Untranslatable."""
    for key in params:
        key = key.split(".")[0]
        if key in _REASONS:
            raise Untranslatable(_REASONS[key])
        if key not in _KNOWN:
            raise Untranslatable(f"'{key}' has no counterpart in passt")
    words = ["--quiet", "--mtu", _MTU]
    ipv4 = params.boolean("ipv4", True)
    ipv6 = params.boolean("ipv6", True)
    if not ipv4 and not ipv6:
        raise Untranslatable("it has neither IPv4 nor IPv6")
    if not ipv6:
        words.append("--ipv4-only")
    if not ipv4:
        words.append("--ipv6-only")
    else:
        words += _addresses(params)
    if (hostname := params.get("hostname")) is not None:
        words += ["--hostname", hostname]
    search = [*values(params, "domainname"), *values(params, "dnssearch")]
    if search:
        words += ["--search", " ".join(search)]
    guest = words[words.index("--address") + 1] if ipv4 else None
    forwards = values(params, "hostfwd")
    if restricted(params) and any(forward.startswith("udp") for forward in forwards):
        # Only passt knows which datagrams are answers.
        raise Untranslatable("the guest cannot be shut in with a port forwarded by UDP")
    return [*words, *_forwards(forwards, guest)]


def restricted(params: Params) -> bool:
    """Whether the guest is shut in: passt does not do that, the relay does (restrict.py)."""
    return params.boolean("restrict", False)


def _addresses(params: Params) -> list[str]:
    text, _, bits_text = (params.get("net") or f"{_NET}/{_MASK}").partition("/")
    if not bits_text:
        raise Untranslatable("'net' has no mask")
    bits = int(bits_text) if bits_text.isdecimal() else _number(bits_text).bit_count()
    if not 4 <= bits <= 30:
        raise Untranslatable(f"'net' has a mask of {bits} bits")
    mask = (0xFFFFFFFF << (32 - bits)) & 0xFFFFFFFF
    net = _number(text) & mask

    def address(key: str, default: int) -> str:
        given = params.get(key)
        number = _number(given) if given is not None else net | (default & ~mask)
        return socket.inet_ntoa(struct.pack("!I", number))

    host, dns = address("host", _HOST), address("dns", _DNS)
    mac = "52:55:" + ":".join(f"{byte:02x}" for byte in socket.inet_aton(host))
    return [
        *("--address", address("dhcpstart", _DHCP), "--netmask", str(bits)),
        *("--gateway", host, "--map-host-loopback", host, "--mac-addr", mac),
        *("--dns", dns, "--dns-forward", dns),
    ]


def _number(text: str) -> int:
    try:
        number: int = struct.unpack("!I", socket.inet_aton(text))[0]
    except OSError:
        raise Untranslatable(f"'{text}' is no IPv4 address") from None
    return number


def _forwards(forwards: list[str], guest: str | None) -> list[str]:
    """Ports of the host that lead to the guest: `[tcp|udp]:[address]:port-[guest]:port`."""
    words: dict[str, list[str]] = {"--tcp-ports": [], "--udp-ports": []}
    for forward in forwards:
        match = _FORWARD.fullmatch(forward)
        if match is None:
            raise Untranslatable(f"passt has no counterpart of hostfwd={forward}")
        protocol, address, port, to, to_port = match.groups()
        if not int(port):
            raise Untranslatable("passt chooses no port itself")
        if guest is None or to not in ("", "0.0.0.0", guest):  # noqa: S104
            raise Untranslatable(f"passt forwards to one address of the guest, not to {to}")
        option = "--udp-ports" if protocol == "udp" else "--tcp-ports"
        words[option].append(f"{address or '0.0.0.0'}/{port}:{to_port}")  # noqa: S104
    # With none of its own, UDP would follow TCP's ports.
    return [
        word
        for option, ports in words.items()
        for port in ports or ["none"]
        for word in (option, port)
    ]
