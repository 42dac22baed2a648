"""Give every distribution a new version, in lock-step: ``python tools/bump.py 0.2.0``.

Rewrites the version of each pyproject.toml, the pins between them and ``monoquant_core.__version__``.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

VERSION = re.compile(r"(\d+)\.(\d+)\.(\d+)((a|b|rc)\d+)?")


def main(args: list[str]) -> int:
    """Rewrite the files and name them; returns the exit status."""
    if len(args) != 1 or not VERSION.fullmatch(args[0]):
        print(
            "usage: python tools/bump.py MAJOR.MINOR.PATCH, with a1, b1 or rc1 behind for pre-releases", file=sys.stderr
        )
        return 2
    for path, text in bumped(ROOT, args[0]):
        path.write_text(text, encoding="utf-8")
        print(path.relative_to(ROOT))
    print("Now write the CHANGELOG's heading, and run: make test")
    return 0


def bumped(root: Path, version: str) -> Iterator[tuple[Path, str]]:
    """Every file that names the version, with its new text.

    :raises ValueError: when a file does not name it where it should.
    """
    for path in pyprojects(root):
        text = _replace(path, path.read_text(encoding="utf-8"), r'(?m)^version = "[^"]*"$', f'version = "{version}"')
        text = re.sub(r'"(monoquant-[a-z0-9-]+(?:\[[a-z0-9,-]+\])?)==[^"]*"', rf'"\1=={version}"', text)
        text = re.sub(r'"monoquant>=[^"]*"', f'"monoquant>={version},<{next_breaking(version)}"', text)
        yield path, text
    path = root / "monoquant_core" / "__init__.py"
    text = path.read_text(encoding="utf-8")
    yield path, _replace(path, text, r'(?m)^__version__ = "[^"]*"$', f'__version__ = "{version}"')


def pyprojects(root: Path) -> list[Path]:
    """The root's and every plugin's."""
    return [root / "pyproject.toml", *sorted(root.glob("plugins/*/pyproject.toml"))]


def next_breaking(version: str) -> str:
    """The first version that may break a plugin: the next minor one before 1.0, the next major one after."""
    major, minor, *_ = version.split(".")
    return f"0.{int(minor) + 1}" if major == "0" else str(int(major) + 1)


def _replace(path: Path, text: str, pattern: str, replacement: str) -> str:
    text, count = re.subn(pattern, replacement, text)
    if count != 1:
        raise ValueError(f"{path}: {pattern!r} found {count} times, expected once")
    return text


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
