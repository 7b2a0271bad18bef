"""A benchmark as it is published: rows with the hub's columns, in parquet or JSON files of a local folder.

The folder is a copy of the dataset repository, under its own name: DATA_ROOT/MMStar or DATA_ROOT/Lin-Chen/MMStar.
Nothing is downloaded.
"""

from __future__ import annotations

import ast
import base64
import binascii
import json
import re
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from step3vl.data.decode import open_image
from step3vl.evaluation.benchmark import Benchmark, Case
from step3vl.evaluation.extract import final_text
from step3vl.evaluation.judge import Judge
from step3vl.types import IMAGE_MARK, Message, Prompt

Row = dict[str, Any]
SUFFIXES = (".parquet", ".jsonl", ".json")


class HubBenchmark(Benchmark):
    """Reads rows, turns each into a case.

    Args:
        data_root: folder that holds copies of dataset repositories.
        num_cases: use the first `num_cases`; None: all.
    """

    repo: ClassVar[str]
    """The dataset's name on the hub."""
    config: ClassVar[str] = ""
    """Configuration of the dataset; "": it has one."""
    split: ClassVar[str]
    columns: ClassVar[tuple[str, ...]]
    """What a row must have."""

    def __init__(self, data_root: str, num_cases: int | None = None):
        self.data_root, self.num_cases = Path(data_root), num_cases

    @abstractmethod
    def read(self, row: Row, number: int) -> Case:
        """The case that a row describes; `number` counts rows from 0."""

    def keeps(self, row: Row) -> bool:
        """Whether a row belongs to the benchmark."""
        return True

    def cases(self, limit: int | None = None) -> list[Case]:
        return list(self.stream(limit))

    def stream(self, limit: int | None = None) -> Iterator[Case]:
        """The first cases in the files' order; images are decoded as they are reached.

        Raises:
            ValueError: the data are not there, a column is missing, or a row cannot be read; one sentence.
        """
        bound = min((n for n in (limit, self.num_cases) if n is not None), default=None)
        num = 0
        for number, (row, where) in enumerate(rows(self.files())):
            if bound is not None and num >= bound:
                break
            if absent := [name for name in self.columns if name not in row]:
                raise ValueError(
                    f"{where}: column {absent[0]!r} is missing; {type(self).__name__} reads {', '.join(self.columns)}"
                )
            if not self.keeps(row):
                continue
            try:
                case = self.read(row, number)
            except (ValueError, TypeError, KeyError, IndexError, SyntaxError) as error:
                raise ValueError(f"{where}: not a case of {type(self).__name__} ({error})") from error
            num += 1
            yield case
        if not num:
            raise ValueError(f"{self.folder()} has no row of {type(self).__name__}")

    def folder(self) -> Path:
        """Where the copy is."""
        places = [self.data_root / self.repo, self.data_root / self.repo.rpartition("/")[2]]
        for place in places:
            if place.is_dir():
                return place
        raise ValueError(
            f"{type(self).__name__}: there is no {places[0]} and no {places[1]}; copy the dataset {self.repo} there, "
            "or give another --data-root"
        )

    def files(self) -> list[Path]:
        """The files of config and split, in order."""
        folder = self.folder()
        found = sorted(path for path in folder.rglob("*") if path.suffix in SUFFIXES and path.is_file())
        here = [path.relative_to(folder) for path in found]
        if self.config:
            word = re.escape(self.config)
            named = [path for path in here if re.search(rf"(^|[/_.-]){word}([/_.-]|$)", path.as_posix())]
            here = named or here
        pattern = rf"(^|[/_.-]){re.escape(self.split)}([/_.-]|$)"
        chosen = [path for path in here if re.search(pattern, path.as_posix())] or ([] if len(here) > 1 else here)
        if not chosen:
            raise ValueError(
                f"{folder} has no file for split {self.split!r} of {type(self).__name__}; expected something like "
                f"data/{self.split}-00000-of-00001.parquet"
            )
        return [folder / path for path in chosen]


class Judged(HubBenchmark):
    """A benchmark that its authors score with a language model. Without one, rules decide, which is printed.

    Args:
        data_root, num_cases: as in HubBenchmark.
        judge: asked about every answer that the rules do not find right; None: the rules alone.
    """

    def __init__(self, data_root: str, num_cases: int | None = None, judge: Judge | None = None):
        super().__init__(data_root, num_cases)
        self.judge = judge

    def scores(self, pairs: Sequence[tuple[Case, str]]) -> list[float]:
        found = [self.score(case, text) for case, text in pairs]
        if self.judge is None:
            return found
        left = [i for i, (_, text) in enumerate(pairs) if found[i] < 1 and final_text(text)]
        asked_of = [
            (pairs[i][0].prompt.messages[-1].content, self.gold(pairs[i][0]), final_text(pairs[i][1])) for i in left
        ]
        for i, verdict in zip(left, self.judge.verify(asked_of) if left else []):
            found[i] = 1.0 if verdict else found[i]
        return found

    def gold(self, case: Case) -> str:
        """The right answer as a judge is told it."""
        return case.answer


# ------------------------------------------------------------------------------------------------ rows


def rows(files: Sequence[Path]) -> Iterator[tuple[Row, str]]:
    """(row, where it stands) of every file in turn."""
    for file in files:
        for number, row in enumerate(_parquet(file) if file.suffix == ".parquet" else _json(file)):
            row["__folder__"] = file.parent
            yield row, f"{file}, row {number}"


def _parquet(file: Path) -> Iterator[Row]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError:
        raise ValueError(f"{file} needs pyarrow: pip install 'step3vl[eval]'") from None
    try:
        with parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=16):
                yield from batch.to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"{file} cannot be read as parquet ({error})") from None


def _json(file: Path) -> Iterator[Row]:
    try:
        if file.suffix == ".json":
            content = json.loads(file.read_text(encoding="utf-8"))
            yield from content.values() if isinstance(content, dict) else content
            return
        with file.open(encoding="utf-8") as lines:  # some files are larger than memory
            for line in lines:
                if line.strip():
                    yield json.loads(line)
    except ValueError as error:
        raise ValueError(f"{file} cannot be read as JSON ({error})") from None


# ------------------------------------------------------------------------------------------------ values


def picture(value: Any, row: Row, name: str = "image") -> Image.Image:
    """An image column: {bytes, path} as `datasets` stores it, raw bytes, base64 text, or a path beside the file."""
    if isinstance(value, dict):
        if value.get("bytes"):
            return open_image(value["bytes"], name)
        value = value.get("path")
    if isinstance(value, bytes):
        return open_image(value, name)
    if isinstance(value, str) and value:
        if len(value) < 300 and (file := _beside(row["__folder__"], value)) is not None:
            return open_image(file, value)
        try:
            return open_image(base64.b64decode(value.partition("base64,")[2] or value, validate=True), name)
        except binascii.Error:
            raise ValueError(f"{name} is neither a file beside the rows nor base64: {value[:60]!r}") from None
    raise ValueError(f"{name} is empty")


def _beside(folder: Path, name: str) -> Path | None:
    """A file named in a row; names never lead out of the rows' folder."""
    file = (folder / name).resolve()
    return file if file.is_relative_to(folder.resolve()) and file.is_file() else None


def listed(value: Any) -> list[Any]:
    """A list, or the text of one: "['a', 'b']"."""
    if value is None:
        return []
    return list(ast.literal_eval(value)) if isinstance(value, str) else list(value)


def is_given(value: Any) -> bool:
    """Whether an optional text column says something; tables write nan for nothing."""
    return value is not None and value == value and str(value).strip().lower() not in ("", "nan", "none")


def letters(num: int) -> list[str]:
    """A, B, C, ..."""
    return [chr(ord("A") + i) for i in range(num)]


def lettered(options: Sequence[Any]) -> str:
    """Options one a line: "A. first"."""
    return "\n".join(f"{letter}. {option}" for letter, option in zip(letters(len(options)), options))


def asked(text: str, images: Sequence[Image.Image]) -> Prompt:
    """One user turn; images stand before the text, or where the text has marks for all of them."""
    if text.count(IMAGE_MARK) != len(images):
        text = IMAGE_MARK * len(images) + text.replace(IMAGE_MARK, "")
    return Prompt(messages=[Message(role="user", content=text)], images=list(images))


def interleaved(text: str, row: Row, token: str, column: str) -> Prompt:
    """A question whose numbered tokens, e.g. "<image 1>", stand for columns, e.g. "image_1".

    An image that is named twice is shown twice; one that no token names stands before the text.
    """
    pattern = re.compile(token)
    numbers = pattern.findall(text)
    named = [picture(row[column.format(n)], row, column.format(n)) for n in numbers]
    rest = [
        picture(row[column.format(n)], row, column.format(n))
        for n in range(1, 20)
        if str(n) not in numbers and row.get(column.format(n)) is not None
    ]
    return asked(IMAGE_MARK * len(rest) + pattern.sub(IMAGE_MARK, text.replace(IMAGE_MARK, "")), [*rest, *named])
