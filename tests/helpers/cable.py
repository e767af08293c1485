"""A network cable between two `Machine`s: a plain one, and a bad one whose packets come late or never."""

import fcntl
import os
import random
import select
import socket
import struct
import subprocess
import sys
import time
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from helpers.machines import Machine

TUN = "/dev/net/tun"
INTERFACE = "eth0"
ADDRESSES = ("10.99.0.1", "10.99.0.2")


def join(machines: "tuple[Machine, Machine]") -> None:
    """A veth pair; the machines have `ADDRESSES`."""
    first, second = machines
    ends = [INTERFACE, "netns", str(first.pid), "type", "veth", "peer", "name", INTERFACE, "netns", str(second.pid)]
    subprocess.run(["ip", "link", "add", *ends], check=True)
    for machine, address in zip(machines, ADDRESSES, strict=True):
        _address(machine, address)


def join_badly(machines: "tuple[Machine, Machine]", delay: float, loss: float) -> list[subprocess.Popen]:
    """A cable of two processes, which end with the machines: every packet comes `delay` seconds late, some never."""
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    processes = []
    for number, (machine, mine) in enumerate(zip(machines, ends, strict=True)):
        words = machine.command([sys.executable, __file__, str(mine.fileno()), str(delay), str(loss), str(number)])
        processes.append(subprocess.Popen(words, pass_fds=[mine.fileno()], stdout=subprocess.PIPE))
    for process, machine, address in zip(processes, machines, ADDRESSES, strict=True):
        process.stdout.readline()
        _address(machine, address)
    for mine in ends:
        mine.close()
    return processes


def plug(machine: "Machine", state: str) -> None:
    """Pull the cable out of that machine ('down') or put it back ('up')."""
    machine.run("ip", "link", "set", INTERFACE, state)


def _address(machine: "Machine", address: str) -> None:
    machine.run("ip", "link", "set", "lo", "up")
    machine.run("ip", "address", "add", f"{address}/24", "dev", INTERFACE)
    plug(machine, "up")


def _carry(link: socket.socket, delay: float, loss: float, seed: int) -> None:
    """One end: packets of this machine go to the other end, those from there come out here, late."""
    device = os.open(TUN, os.O_RDWR)
    tunsetiff, packets_only = 0x400454CA, 0x1001  # IFF_TUN | IFF_NO_PI
    fcntl.ioctl(device, tunsetiff, struct.pack("16sH22x", INTERFACE.encode(), packets_only))
    sys.stdout.write("\n")  # it is there
    sys.stdout.flush()
    pick, due = random.Random(seed), deque()
    while True:
        patience = max(0.0, due[0][0] - time.monotonic()) if due else None
        for source in select.select([device, link], [], [], patience)[0]:
            if source is link:
                if not (packet := link.recv(65536)):
                    return
                if pick.random() >= loss:
                    due.append((time.monotonic() + delay, packet))
            else:
                with suppress(OSError):  # the other end is pulled
                    link.send(os.read(device, 65536))
        while due and due[0][0] <= time.monotonic():
            with suppress(OSError):  # this end is
                os.write(device, due.popleft()[1])


if __name__ == "__main__":
    descriptor, delay, loss, seed = sys.argv[1:]
    _carry(socket.socket(fileno=int(descriptor)), float(delay), float(loss), int(seed))
