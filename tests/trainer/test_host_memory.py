"""Limits of containers, in directories laid out as /sys/fs/cgroup is."""

import os

import pytest

from trainer.data import host_memory

MACHINE = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
NONE_OF_VERSION_1 = str(2**63 - 4096)  # What the kernel says there.


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        ("0::/pod/box\n", {"pod/box/memory.max": "900000\n", "pod/memory.max": "max\n"}, 900_000),
        ("0::/pod/box\n", {"pod/box/memory.max": "max\n", "pod/memory.max": "800000\n"}, 800_000),
        # In a container: the root is its own group, whatever the host calls it.
        ("0::/\n", {"memory.max": "700000\n"}, 700_000),
        ("0::/../elsewhere\n", {"memory.max": "700000\n"}, 700_000),
        (
            "9:name=systemd:/\n4:cpu,memory:/docker/a:b\n0::/\n",
            {
                "memory/docker/a:b/memory.limit_in_bytes": NONE_OF_VERSION_1,
                "memory/docker/memory.limit_in_bytes": "600000\n",
                "memory/memory.limit_in_bytes": NONE_OF_VERSION_1,
            },
            600_000,
        ),
        ("4:memory:/docker/unknown\n", {"memory/memory.limit_in_bytes": "500000\n"}, 500_000),
        # Of another controller.
        ("4:cpuset:/a\n", {"memory/a/memory.limit_in_bytes": "500000\n"}, MACHINE),
        ("0::/a\n", {"a/memory.max": "max\n"}, MACHINE),
        ("0::/a\n", {"a/memory.max": f"{2 * MACHINE}\n"}, MACHINE),
        ("no control group\n", {}, MACHINE),
    ],
)
def test_the_smallest_limit_counts(tmp_path, membership, files, expected):
    root = tmp_path / "cgroup"
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "membership").write_text(membership)
    limit = host_memory.usable_bytes(str(root), str(tmp_path / "membership"))
    assert limit == expected


def test_a_system_without_control_groups_has_its_memory(tmp_path):
    assert host_memory.usable_bytes(str(tmp_path), str(tmp_path / "none")) == MACHINE
