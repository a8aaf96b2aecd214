"""Which hosts are reached without the proxy of the environment."""

import os
from collections.abc import Iterable

# In either case; gRPC takes the first that is set, in lower case alone.
_PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")
# Hosts without a proxy. gRPC reads the first, and the second only where that is not set; urllib
# and libcurl read the second and then the third; Go reads the third and then the second, and sends
# loopback through no proxy anyway.
_DIRECT = ("no_grpc_proxy", "no_proxy", "NO_PROXY")
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


def reach_directly(hosts: Iterable[str] = _LOOPBACK) -> None:
    """Keeps this process and its children from reaching `hosts` through a proxy.

    gRPC sends even loopback through the proxy of the environment, which leads to another machine
    or to nobody.
    """
    if not any(value and name.lower() in _PROXIES for name, value in os.environ.items()):
        return
    known = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    for variable in _DIRECT:
        listed = os.environ.get(variable) or known
        # An asterisk means all hosts if it stands alone, and to gRPC it means nothing.
        if listed.strip() != "*" or variable == _DIRECT[0]:
            there = [name.strip() for name in listed.split(",")]
            os.environ[variable] = ",".join(dict.fromkeys(filter(None, [*there, *hosts])))
