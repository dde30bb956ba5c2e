"""`restrict=on` of a user network: what a guest that is shut in may send to passt.

passt itself shuts nobody in. As with slirp the guest gets an address (ARP, DHCP, router and
neighbour discovery), and answers whoever comes by a forwarded port, and that is all. A connection
is what TCP says it is: passt begins one of the guest's by a SYN without ACK, and to no other
segment outside of a connection that it knows (passt's tcp.c, tcp_tap_handler). What is not
understood (fragments, extension headers, VLANs) does not pass.
"""

from __future__ import annotations

_ARP, _IPV4, _IPV6 = 0x0806, 0x0800, 0x86DD
_TCP, _UDP, _ICMPV6 = 6, 17, 58
_SYN, _ACK = 0x02, 0x10
_DHCP, _DHCPV6 = 67, 547
# RFC 4861: router solicitation, neighbour solicitation and advertisement.
_DISCOVERY = (133, 135, 136)


def admits(frame: memoryview) -> bool:
    """Whether an Ethernet frame of the guest's may pass."""
    kind = _u16(frame, 12)
    if kind == _ARP:
        return True
    if kind == _IPV4:
        return _ipv4(frame[14:])
    if kind == _IPV6:
        return _ipv6(frame[14:])
    return False


def _ipv4(packet: memoryview) -> bool:
    # More fragments, or not the first.
    if len(packet) < 20 or packet[0] >> 4 != 4 or _u16(packet, 6) & 0x3FFF:
        return False
    header = 4 * (packet[0] & 0x0F)
    return header >= 20 and _segment(packet[9], packet[header:], _DHCP)


def _ipv6(packet: memoryview) -> bool:
    if len(packet) < 40 or packet[0] >> 4 != 6:
        return False
    inner = packet[40:]
    if packet[6] == _ICMPV6:
        return len(inner) > 0 and inner[0] in _DISCOVERY
    return _segment(packet[6], inner, _DHCPV6)


def _segment(protocol: int, segment: memoryview, dhcp: int) -> bool:
    if protocol == _TCP:
        return len(segment) >= 20 and segment[13] & (_SYN | _ACK) != _SYN
    return protocol == _UDP and _u16(segment, 2) == dhcp


def _u16(data: memoryview, at: int) -> int:
    return int.from_bytes(data[at : at + 2], "big")
