"""Where a report is written: checked before a model is opened, and written whole or not at all."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from adamoe_dist.errors import UserError
from adamoe_dist.files import check_output_files, refusing, write_files
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
        inputs = [("--text", Path(text)) for text in texts]
        check_output_files(self._files(), overwrite, inputs)
        if self.png_dir is None:
            return
        _check_directory(self.png_dir, overwrite)
        for option, path in [*inputs, *self._files()]:
            if path.resolve() == self.png_dir.resolve():
                raise UserError(f"--png-dir {self.png_dir} is {option} {path} as well; choose another place")
            if path.resolve().parent == self.png_dir.resolve() and is_figure(path):
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
        with _made(self.png_dir):
            write_files(contents)
        if self.png_dir is not None:
            for path in self.png_dir.iterdir():
                if is_figure(path) and path.stem not in pictures:
                    with refusing("--png-dir", path):
                        path.unlink()
        return [path for _, path, _ in contents]

    def _files(self) -> list[tuple[str, Path]]:
        return [("--output", self.page), *([] if self.json_file is None else [("--json", self.json_file)])]


def _check_directory(path: Path, overwrite: bool) -> None:
    if path.exists() and not path.is_dir():
        raise UserError(f"--png-dir {path} is a file; name a directory")
    if path.is_dir() and any(path.glob("*.png")) and not overwrite:
        raise UserError(f"--png-dir {path} has pictures already; choose another directory or add --overwrite")
    there = path.absolute() if path.is_dir() else next(parent for parent in path.absolute().parents if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"--png-dir {path}: {there} cannot be written; choose another directory")


@contextmanager
def _made(directory: Path | None) -> Iterator[None]:
    """Make ``directory``; when what follows fails, take away again what of it was not there."""
    made = [] if directory is None else [path for path in (directory, *directory.parents) if not path.exists()]
    try:
        if directory is not None:
            with refusing("--png-dir", directory):
                directory.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for path in made:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
        raise
