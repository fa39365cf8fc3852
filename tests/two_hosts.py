"""Two hosts on one machine: namespaces with a network, a name and processes of their own, and a link between them.

The first process of a host is this file, run as a script. It gives the test its end of the link and waits for the
test to end; when it ends, the system ends all other processes of the host, and its network is gone.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from relay import Relay

NAMES, ADDRESSES, DEVICE = ("host-a", "host-b"), ("10.77.0.1", "10.77.0.2"), "link0"
MTU = 9000
START_TIMEOUT_S, END_TIMEOUT_S = 10.0, 5.0

_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 0x1
_SIOCSIFADDR, _SIOCSIFDSTADDR, _SIOCSIFMTU = 0x8916, 0x8918, 0x8922


class NoHosts(Exception):
    """The system does not let us, and why."""


class TwoHosts:
    """Hosts 0 and 1, which reach each other by `ADDRESSES`; `with` ends all that runs on them.

    Args:
        settings: of the kernel, for each host's network: `{"net/ipv4/tcp_retries2": 5}`.

    Raises:
        NoHosts: the system does not let us.
    """

    def __init__(self, settings: Mapping[str, int] | None = None) -> None:
        self._holders: list[subprocess.Popen[bytes]] = []
        self._sockets: list[socket.socket] = []
        self._started: list[subprocess.Popen[bytes]] = []
        ends: list[int] = []
        try:
            for host in (0, 1):
                ends.append(self._start(host, settings or {}))
        except BaseException:
            self._end()
            for end in ends:
                os.close(end)
            raise
        self.link = Relay((ends[0], ends[1]))

    def _start(self, host: int, settings: Mapping[str, int]) -> int:
        """The end of its link."""
        ours, theirs = socket.socketpair()
        self._sockets.append(ours)
        pairs = [f"{key}={value}" for key, value in settings.items()]
        unshare = ["unshare", "--user", "--map-root-user", "--net", "--uts", "--pid", "--fork", "--kill-child"]
        try:
            with theirs:
                self._holders.append(
                    subprocess.Popen(
                        [*unshare, sys.executable, __file__, str(host), *pairs],
                        stdin=theirs,
                        stderr=subprocess.PIPE,
                    )
                )
        except FileNotFoundError:
            raise NoHosts("there is no unshare (util-linux)") from None
        ours.settimeout(START_TIMEOUT_S)
        descriptors = socket.recv_fds(ours, 1, 1)[1]
        if not descriptors:
            stderr = self._holders[-1].stderr
            assert stderr is not None
            said = stderr.read().decode().strip().splitlines()
            raise NoHosts(said[-1] if said else "no reason is known")
        return descriptors[0]

    def __enter__(self) -> TwoHosts:
        return self

    def __exit__(self, *exc: object) -> None:
        self._end()
        self.link.close()

    def start(
        self, host: int, command: Sequence[str], output: Path, environment: Mapping[str, str]
    ) -> subprocess.Popen[bytes]:
        """Start a command on a host.

        Args:
            host: 0 or 1.
            command: and its arguments.
            output: a file for what it prints.
            environment: instead of the test's own.

        Returns:
            What waits for it, and has its exit status; it can't be killed by it.
        """
        pid = self._holders[host].pid
        enter = ["nsenter", f"--target={pid}", "--user", "--net", "--uts", f"--pid=/proc/{pid}/ns/pid_for_children"]
        with output.open("wb") as file:
            self._started.append(
                subprocess.Popen(
                    [*enter, "--preserve-credentials", "--", *command], stdout=file, stderr=file, env=environment
                )
            )
        return self._started[-1]

    def _end(self) -> None:
        for ours in self._sockets:
            ours.close()
        for process in (*self._holders, *self._started):
            try:
                process.wait(END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for holder in self._holders:
            assert holder.stderr is not None
            holder.stderr.close()


def hold(host: int, *settings: str) -> None:
    """What the first process of a host does."""
    socket.sethostname(NAMES[host])
    for setting in settings:
        key, value = setting.split("=")
        Path("/proc/sys", key).write_text(value)
    end = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(end, _TUNSETIFF, struct.pack("16sH", DEVICE.encode(), _IFF_TUN | _IFF_NO_PI))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:

        def set_up(request: int, device: str, value: bytes) -> bytes:
            return fcntl.ioctl(any_socket, request, struct.pack("16s24s", device.encode(), value))

        for request, address in ((_SIOCSIFADDR, ADDRESSES[host]), (_SIOCSIFDSTADDR, ADDRESSES[1 - host])):
            set_up(request, DEVICE, struct.pack("HH4s", socket.AF_INET, 0, socket.inet_aton(address)))
        set_up(_SIOCSIFMTU, DEVICE, struct.pack("i", MTU))
        for device in ("lo", DEVICE):
            (flags,) = struct.unpack_from("h", set_up(_SIOCGIFFLAGS, device, b""), 16)
            set_up(_SIOCSIFFLAGS, device, struct.pack("h", flags | _IFF_UP))
    with socket.socket(fileno=0) as theirs:
        socket.send_fds(theirs, [b"x"], [end])
        os.close(end)
        theirs.recv(1)  # until the test closes it, or ends


if __name__ == "__main__":
    hold(int(sys.argv[1]), *sys.argv[2:])
