"""Sizes as users write them."""

from __future__ import annotations

import re

from monoquant_core.errors import OptionError

UNITS = {"": 1, "B": 1} | {
    f"{prefix}{infix}B": base**power
    for power, prefix in enumerate("KMGT", 1)
    for infix, base in (("", 1000), ("I", 1024))
}


def parse_size(text: str, *, owner: str) -> int:
    """Bytes that ``5GB`` (decimal) or ``2GiB`` (binary) means.

    :raises OptionError: naming ``owner`` and what is expected.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if found is None or found[2].upper() not in UNITS or not float(found[1]):
        raise OptionError(f"{owner}: {text!r} is not a size", hint="write a number and a unit: 5GB, 900MB, 2GiB")
    whole, _, fraction = found[1].partition(".")
    nbytes: int = int(whole + fraction) * UNITS[found[2].upper()] // 10 ** len(fraction)
    return max(1, nbytes)
