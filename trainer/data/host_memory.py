"""The memory that this process may use: the machine's, or its container's if that is less."""

import contextlib
import os
import pathlib
from collections.abc import Iterator


def _limit_files(root: str, membership: str) -> Iterator[pathlib.Path]:
    """Yields the files that may hold a limit, for each control group of this process and parents.

    A container often sees its own group as the root, under another name than the path in
    `membership`. So a path may not exist; such a group sets no limit.
    """
    with contextlib.suppress(OSError), open(membership) as file:
        for line in file:
            number, controllers, path = [*line.rstrip("\n").split(":", 2), "", ""][:3]
            if number == "0":
                top, name = pathlib.Path(root), "memory.max"
            elif "memory" in controllers.split(","):
                top, name = pathlib.Path(root, "memory"), "memory.limit_in_bytes"
            else:
                continue
            parts = [part for part in path.split("/") if part not in ("", "..")]
            for depth in range(len(parts) + 1):
                yield pathlib.Path(top, *parts[:depth], name)


def usable_bytes(root: str = "/sys/fs/cgroup", membership: str = "/proc/self/cgroup") -> int:
    """The smallest of the machine's memory and the limits of this process's control groups.

    Args:
      root: where the control groups, of version 1 or 2, are mounted.
      membership: the file that lists the control groups of this process.
    """
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for path in _limit_files(root, membership):
        with contextlib.suppress(OSError):
            text = path.read_text().strip()
            if text.isdecimal():  # "max" means no limit.
                limits.append(int(text))
    return min(limits)
