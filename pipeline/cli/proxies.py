"""Makes hosts reachable without the proxy of the environment."""

import os
from collections.abc import Iterable

# In upper or lower case; gRPC takes the first that is set, in lower case only.
_PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")
# Variables that list hosts without a proxy. gRPC reads the first, or else the second; urllib and
# libcurl read the second, or else the third; Go reads the third, or else the second, and never
# sends loopback through a proxy.
_DIRECT = ("no_grpc_proxy", "no_proxy", "NO_PROXY")
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


def reach_directly(hosts: Iterable[str] = _LOOPBACK) -> None:
    """Keeps this process and its children from reaching `hosts` through a proxy.

    gRPC sends even loopback through the proxy of the environment, and so to another machine.
    """
    if not any(value and name.lower() in _PROXIES for name, value in os.environ.items()):
        return
    default = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    for variable in _DIRECT:
        text = os.environ.get(variable) or default
        # A single asterisk means all hosts, but not to gRPC.
        if text.strip() != "*" or variable == _DIRECT[0]:
            names = [name.strip() for name in text.split(",")]
            os.environ[variable] = ",".join(dict.fromkeys(filter(None, [*names, *hosts])))
