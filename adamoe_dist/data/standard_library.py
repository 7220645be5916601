"""The default corpus: sources and help texts of the running interpreter's standard library."""

import logging
import sysconfig
from collections.abc import Iterator
from pathlib import Path

logger = logging.getLogger(__name__)

STANDARD_LIBRARY = "python:stdlib"

_SKIPPED_DIRECTORIES = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})
# Machine-specific build records, and the module whose contents are taken one topic at a time instead.
_SKIPPED_PREFIXES = ("config-", "_sysconfigdata")
_TOPICS_MODULE = "pydoc_data/topics.py"


def standard_library_root() -> Path:
    """Return the directory of the standard library, also from inside a virtual environment."""
    return Path(sysconfig.get_paths()["stdlib"])


def standard_library_files(root: Path | None = None) -> list[Path]:
    """List the library's Python sources without tests and installed packages.

    Args:
        root: the library's directory; the running interpreter's by default.

    Returns:
        Paths in an order that depends only on their names below ``root``.
    """
    root = root or standard_library_root()
    relative = (path.relative_to(root) for path in root.rglob("*.py"))
    kept = sorted(path.as_posix() for path in relative if _is_wanted(path))
    return [root / name for name in kept]


def _is_wanted(relative: Path) -> bool:
    if relative.as_posix() == _TOPICS_MODULE or relative.name.startswith(_SKIPPED_PREFIXES):
        return False
    return not any(part in _SKIPPED_DIRECTORIES or part.startswith(_SKIPPED_PREFIXES) for part in relative.parts[:-1])


def standard_library_documents(root: Path | None = None) -> Iterator[tuple[str, str]]:
    """Yield the sources, then the help topics of ``pydoc``.

    Sources that are not UTF-8 are left out and counted in the log: the library keeps a few on purpose.

    Yields:
        Pairs of text and a name such as ``python:stdlib/textwrap.py``.
    """
    root = root or standard_library_root()
    skipped = 0
    for path in standard_library_files(root):
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            skipped += 1
            logger.debug("%s is not UTF-8; left out", path)
            continue
        yield text, f"{STANDARD_LIBRARY}/{path.relative_to(root).as_posix()}"
    if skipped:
        logger.info("%s: left out %d sources that are not UTF-8", STANDARD_LIBRARY, skipped)
    for topic, text in _help_topics():
        yield text, f"{STANDARD_LIBRARY}/help/{topic}"


def _help_topics() -> list[tuple[str, str]]:
    from pydoc_data.topics import topics

    return sorted(topics.items())


def standard_library_bytes(root: Path | None = None) -> int:
    """Return the size of the corpus in bytes, from file sizes and the topics."""
    sources = sum(path.stat().st_size for path in standard_library_files(root))
    return sources + sum(len(text.encode("utf-8")) for _, text in _help_topics())
