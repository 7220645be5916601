"""Where a report is written: checked before a model is opened, and written whole or not at all."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from adamoe_dist.errors import UserError
from adamoe_dist.inspection.figures import is_figure


@dataclass(frozen=True)
class Outputs:
    """The files of a report.

    Attributes:
        page: the page.
        json_file: the numbers; None: not written.
        png_dir: the directory of the pictures; None: none are written.
    """

    page: Path
    json_file: Path | None = None
    png_dir: Path | None = None

    def check(self, texts: Sequence[str], overwrite: bool) -> None:
        """Refuse places that cannot be written, are there already, or are one another's or a text's.

        Raises:
            UserError: one is.
        """
        for option, path in self._files():
            _check_file(option, path, overwrite)
        if self.png_dir is not None:
            _check_directory(self.png_dir, overwrite)
        taken = [("--text", Path(text)) for text in texts]
        for option, path in [*self._files(), *([] if self.png_dir is None else [("--png-dir", self.png_dir)])]:
            for other, place in taken:
                if path.resolve() == place.resolve():
                    raise UserError(f"{option} {path} is {other} {place} as well; choose another place")
            taken.append((option, path))
            if self.png_dir is not None and path.resolve().parent == self.png_dir.resolve() and is_figure(path):
                raise UserError(f"{option} {path} has the name of a picture of --png-dir; choose another")

    def write(self, page: str, numbers: str, pictures: dict[str, bytes]) -> list[Path]:
        """Write all files, or none where one cannot be written, and take away pictures of an earlier report.

        Args:
            page: the page.
            numbers: the numbers as JSON.
            pictures: PNG files by name, without the ending.

        Returns:
            The files.

        Raises:
            UserError: one cannot be written.
        """
        contents = [("--output", self.page, page.encode())]
        if self.json_file is not None:
            # What is no character, as in a file's name that is not UTF-8, becomes an escape of JSON.
            contents.append(("--json", self.json_file, numbers.encode("utf-8", "backslashreplace")))
        if self.png_dir is not None:
            contents += [("--png-dir", self.png_dir / f"{name}.png", data) for name, data in pictures.items()]
        with _all_or_nothing(self.png_dir) as unfinished:
            for option, path, content in contents:
                with _refusing(option, path):
                    target = path.resolve()
                    unfinished[target] = target.with_name(f".{target.name}.unfinished")
                    unfinished[target].write_bytes(content)
            for option, path, _ in contents:
                with _refusing(option, path):
                    unfinished[path.resolve()].replace(path.resolve())
        if self.png_dir is not None:
            for path in self.png_dir.iterdir():
                if is_figure(path) and path.stem not in pictures:
                    with _refusing("--png-dir", path):
                        path.unlink()
        return [path for _, path, _ in contents]

    def _files(self) -> list[tuple[str, Path]]:
        return [("--output", self.page), *([] if self.json_file is None else [("--json", self.json_file)])]


def _check_file(option: str, path: Path, overwrite: bool) -> None:
    if path.is_dir():
        raise UserError(f"{option} {path} is a directory; name a file in it")
    if path.exists() and not path.is_file():
        raise UserError(f"{option} {path} is a device or a pipe; name a file")
    if not path.absolute().parent.is_dir():
        raise UserError(f"{option} {path}: its directory does not exist; make it first")
    if not os.access(path.resolve().parent, os.W_OK):
        raise UserError(f"{option} {path} cannot be written; choose another place")
    if path.exists() and not overwrite:
        raise UserError(f"{option} {path} exists already; choose another name or add --overwrite")


def _check_directory(path: Path, overwrite: bool) -> None:
    if path.exists() and not path.is_dir():
        raise UserError(f"--png-dir {path} is a file; name a directory")
    if path.is_dir() and any(path.glob("*.png")) and not overwrite:
        raise UserError(f"--png-dir {path} has pictures already; choose another directory or add --overwrite")
    there = path.absolute() if path.is_dir() else next(parent for parent in path.absolute().parents if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"--png-dir {path}: {there} cannot be written; choose another directory")


@contextmanager
def _all_or_nothing(directory: Path | None) -> Iterator[dict[Path, Path]]:
    """Make ``directory``; when what follows fails, take it away again, and the unfinished files by their targets."""
    made = [] if directory is None else [path for path in (directory, *directory.parents) if not path.exists()]
    unfinished: dict[Path, Path] = {}
    try:
        if directory is not None:
            with _refusing("--png-dir", directory):
                directory.mkdir(parents=True, exist_ok=True)
        yield unfinished
    except BaseException:
        for path in unfinished.values():
            path.unlink(missing_ok=True)
        for path in made:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
        raise


@contextmanager
def _refusing(option: str, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{option} {path} cannot be written ({error.strerror}); choose another place") from error
