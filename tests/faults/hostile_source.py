"""A source whose ids and class names do all that ids and names from outside may do.

Used as --source=tests.faults.hostile_source.open_hostile:x.
"""

import numpy as np

IDS = [
    "../../escaped",
    "/etc/passwd",
    "..",
    ".",
    "a/b/../../../c",
    "~/x",
    "C:\\windows\\system32",
    "name.with.dots",
    "name with spaces",
    "tab\tand\nnewline",
    "<script>alert(1)</script>",
    "\"quoted\" & 'so' on",
    "ünïcødé-数字-😀",
    "%2e%2e%2f",
    "-rf",
    "x" * 400,
    "x" * 399 + "y",
    "ctrl\x01\x7f",
    "$\\frac{1}{2}$",
    "_hidden",
]
NAMES = ["<b>bold</b>", '$\\alpha$ & "co"', "_under\tscore"]


class HostileSource:
    image_shape = (12, 8, 1)
    class_names = NAMES
    split_sizes = {"test": len(IDS)}

    def fingerprint(self):
        return "hostile"

    def ids(self, indices):
        return [IDS[i].encode() for i in indices]

    def where(self, index):
        return f"place {index}"

    def read(self, indices):
        generator = np.random.default_rng(3)
        images = generator.integers(0, 256, (len(IDS), 12, 8, 1)).astype(np.uint8)
        return images[indices], np.array(indices) % len(NAMES)


def open_hostile(rest):
    return HostileSource()
