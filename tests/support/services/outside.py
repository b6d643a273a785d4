"""A network outside the cluster, with addresses for pods to try, and some servers."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from devcluster.processes import run

# RFC 5737: for examples, so that no machine has them.
STORE, ELSEWHERE = "198.51.100.10", "198.51.100.20"
NETWORK = "198.51.100.0/24"
# The address where clouds serve credentials to any client.
METADATA = "169.254.169.254"
STORE_PORT, OTHER_PORT = 9000, 2222
_ROUTER = "198.51.100.1"
_LINK = "qlora-outside"
_SERVER = """
import socket, sys, threading
def answer(port):
    server = socket.create_server(("", port))
    while True:
        server.accept()[0].close()
for port in map(int, sys.argv[1:]):
    threading.Thread(target=answer, args=(port,)).start()
print("serving", flush=True)
"""


@contextmanager
def outside() -> Iterator[None]:
    """A network namespace behind this machine, as the internet is; each of its addresses accepts connections.

    Its addresses are STORE and ELSEWHERE, and METADATA, on ports 80, STORE_PORT and OTHER_PORT. It belongs to the
    process that serves them, so that the kernel removes it, and the link to it, however the process ends.
    """
    ports = ("80", str(STORE_PORT), str(OTHER_PORT))
    command = ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", sys.executable, "-c", _SERVER, *ports]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as server:
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == b"serving\n"
            _connect(server.pid)
            yield
        finally:
            server.kill()


def _connect(pid: int) -> None:
    inside = ["nsenter", f"--net=/proc/{pid}/ns/net", "ip"]
    run(["ip", "link", "add", _LINK, "type", "veth", "peer", "name", "eth0", "netns", str(pid)])
    run(["ip", "address", "add", f"{_ROUTER}/24", "dev", _LINK])
    run(["ip", "link", "set", _LINK, "up"])
    for address in (f"{STORE}/24", f"{ELSEWHERE}/24", f"{METADATA}/32"):
        run([*inside, "address", "add", address, "dev", "eth0"])
    run([*inside, "link", "set", "eth0", "up"])
    run([*inside, "route", "add", "default", "via", _ROUTER])
    run(["ip", "route", "add", METADATA, "via", STORE, "dev", _LINK])
