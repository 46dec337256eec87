"""Prompts to draw, from the files that evaluation sets are published in."""

import csv
import functools
import io
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from flax_pref.config import shipped
from flax_pref.files import files_of_kind, unique_keys

TEXTS = ("prompt", "Prompt", "caption", "text", "TEXT")
GROUPS = ("Category", "category", "style", "tag")
# Of T2I-CompBench++: there is a file of prompts to draw for each, named such as color_val.txt.
T2I_COMPBENCH = ("color", "shape", "texture", "spatial", "3d_spatial", "numeracy", "non_spatial", "complex")
# Of dpg_bench.csv of DPG-Bench, which has a row for each question about a prompt.
DPG = ("item_id", "text", "proposition_id", "dependency", "tuple", "question_natural_language")
# A row with these columns compares images, and a prompt has many: Pick-a-Pic, and HPDv2's test.json and train.json.
PAIRS = ({"caption", "image_0_uid", "image_1_uid"}, {"prompt", "image_path", "rank"}, {"prompt", "human_preference"})


class Prompt(NamedTuple):
    """One prompt of a set.

    Attributes:
        id: position in the set, 0 .. N-1; with the seed it determines the noise of an image.
        text: as it is in the file, with any spaces around it.
        group: its style or category; "" if it has none.
        record: the row of the file, to be handed on; json.dumps takes it.
    """

    id: int
    text: str
    group: str
    record: Mapping[str, Any]


def read_prompts(file: str | os.PathLike, *, column: str | None = None) -> list[Prompt]:
    """Reads a set of prompts: PartiPrompts, HPDv2, Pick-a-Pic, a benchmark, or a file of your own.

    - .txt has a prompt in each line, .csv and .tsv have a header, .jsonl has a text or an object in each line; blank
      lines are skipped. Quotes of a .tsv belong to the prompts (PartiPrompts), unless all of them enclose whole fields.
    - .json is a list of texts or objects, or an object whose values are texts, objects or such lists.
    - Of .parquet the columns of text, numbers and truth values are read, images are not.
    - A folder is all its *.json, or all its *.parquet, in the order of their names; or all its *.txt, each of which is
      one prompt (DPG-Bench), unless it has files of T2I-CompBench++.

    Of benchmarks, more is read than texts:

    - GenEval's `evaluation_metadata.jsonl` and GenEval 2's `geneval2_data.jsonl`: records are their lines.
    - DPG-Bench's `dpg_bench.csv`, or the folder `prompts` beside it: records have the "item_id" and, where the CSV file
      is there, "questions", a list of objects with "id", "dependency", "tuple" and "question". The first question of
      the file is left out, as the benchmark's own program does.
    - T2I-CompBench++'s `color_val.txt` and so on (see `T2I_COMPBENCH`), or the folder that has them: the group is the
      category. In records of complex prompts "relations" is "spatial", "action" or "spatial and action", where
      `complex_val_spatial.txt` and `complex_val_action.txt` are in the folder.

    The text of a row is in the first column there is of `TEXTS`, its group in the first of `GROUPS` that holds a text.
    Without one, the group is the key of a list in a JSON object, and for a list of texts the name of the file without
    .json, as in the benchmark of HPDv2. Where a row is only a text, its record is `{"prompt": text}`; values of a JSON
    object have their key as "key" in the record.

    A repeated prompt is kept, but rows that compare images (with the columns of Pick-a-Pic or of HPDv2's test.json or
    train.json, see `PAIRS`) yield each prompt once, at its first place.

    Args:
        file: file or folder, local or `gs://...`; a shipped one (`configs/animals.txt`) is found from any folder.
        column: where the text is; None: see above.

    Raises:
        FileNotFoundError: there is no such file, or none in the folder.
        ValueError: the file is of another kind, damaged, not UTF-8 or without prompts, a column or key is there twice,
            or a row has no column of prompts, or a prompt that is blank, no text, or has a zero or half a character (a
            lone surrogate). In a folder, a file is unfinished or compressed.
    """
    path = epath.Path(shipped(file))
    prompts, seen = [], set()
    for part, read in _parts(path):
        for where, row, group in read(part):
            record = {"prompt": row} if isinstance(row, str) else row
            if not isinstance(record, dict):
                raise ValueError(f"{where}: {_quote(row)} is no prompt; expected a text, or an object with one")
            text = _text(record, column, where)
            if text in seen and any(columns <= record.keys() for columns in PAIRS):
                continue
            seen.add(text)
            group = next((record[name] for name in GROUPS if isinstance(record.get(name), str)), group)
            prompts.append(Prompt(len(prompts), text, group, record))
    if not prompts:
        raise ValueError(f"{path}: no prompts in it; expected at least one")
    return prompts


def natural(name: str) -> list[tuple[int, int | str]]:
    """To sort names so that 2.png comes before 10.png."""
    return [(0, int(part)) if i % 2 else (1, part) for i, part in enumerate(re.split(r"(\d+)", name))]


def _parts(path: epath.Path) -> Iterator[tuple[epath.Path, Callable[[epath.Path], "_Rows"]]]:
    """The files, each with what reads it."""
    files = _files(path)
    if path.is_dir() and files[0].suffix.lower() == ".txt" and not _t2i_category(files[0]):
        table = path.parent / "dpg_bench.csv"
        questions = {row["item_id"]: row["questions"] for _, row, _ in _read_csv(table)} if table.exists() else {}
        yield from ((file, functools.partial(_read_dpg_prompt, questions=questions)) for file in files)
    else:
        yield from ((file, _READERS[file.suffix.lower()]) for file in files)


def _files(path: epath.Path) -> list[epath.Path]:
    if path.is_dir():
        kinds = [files for suffix in (".json", ".parquet") if (files := files_of_kind(path.glob("*"), suffix))]
        if len(kinds) == 1:
            return kinds[0]
        texts = [] if kinds else sorted(path.glob("*.txt"), key=lambda file: natural(file.name))
        if texts:
            categories = [path / f"{category}_val.txt" for category in T2I_COMPBENCH]
            return [file for file in categories if file in texts] or texts
        found = "both in this folder; name one file" if kinds else "neither in this folder"
        raise FileNotFoundError(f"{path}: expected *.json or *.parquet, but there are {found}")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; expected a file or folder of prompts")
    if path.suffix.lower() not in _READERS:
        raise ValueError(f"{path}: unknown kind of file {path.suffix!r}; expected one of {', '.join(_READERS)}")
    return [path]


def _text(record: dict[str, Any], column: str | None, where: str) -> str:
    names = TEXTS if column is None else (column,)
    name = next((name for name in names if name in record), None)
    if name is None:
        wanted, there = (", ".join(map(repr, some)) for some in (names, record))
        raise ValueError(
            f"{where}: no column of texts named {wanted}; there are {there or 'none'}: choose with --column"
        )
    text = record[name]
    if not isinstance(text, str) or not text.strip() or "\0" in text or text.encode(errors="ignore").decode() != text:
        raise ValueError(f"{where}: {name!r} is {_quote(text)}; expected a text: correct the row or remove it")
    return text


def _quote(value: Any) -> str:
    quoted = json.dumps(value)
    return quoted if len(quoted) <= 60 else f"{quoted[:60]}..."


# Of each row: where it is, for messages; what it holds; the group that it has from its place in the file.
_Rows = Iterator[tuple[str, Any, str]]


def _read_txt(path: epath.Path) -> _Rows:
    category = _t2i_category(path)
    relations = _complex_relations(path) if category == "complex" else None
    for number, line in _lines(path):
        row: Any = {"prompt": line, "category": category} if category else line
        if relations is not None:
            row["relations"] = relations.get(_relations_key(line), "spatial and action")
        yield f"{path}, line {number}", row, category


def _t2i_category(path: epath.Path) -> str:
    """The category of T2I-CompBench++ that a file has the prompts of; "": none."""
    category = path.name.removesuffix("_val.txt")
    return category if category in T2I_COMPBENCH and category != path.name else ""


def _complex_relations(path: epath.Path) -> dict[str, str] | None:
    """Relations by the keys of complex prompts, of all that have not both; None: the files that tell are not there."""
    files = {relation: path.parent / f"complex_val_{relation}.txt" for relation in ("action", "spatial")}
    if not all(file.exists() for file in files.values()):
        return None
    # Of prompts in both files, the benchmark's program looks into that of spatial ones first.
    return {_relations_key(line): relation for relation, file in files.items() for _, line in _lines(file)}


def _relations_key(line: str) -> str:
    return line.split(".")[0].lower()


def _read_dpg_prompt(path: epath.Path, questions: Mapping[str, list[dict[str, Any]]]) -> _Rows:
    """The prompt that a whole file is."""
    lines = list(_lines(path))
    if len(lines) != 1:
        raise ValueError(
            f"{path}: has {len(lines)} lines with text; expected one prompt in each *.txt of a folder, or one file; "
            "name the file itself for a prompt in each line"
        )
    row: dict[str, Any] = {"item_id": path.stem, "prompt": lines[0][1]}
    if path.stem in questions:
        row["questions"] = questions[path.stem]
    yield f"{path}", row, ""


def _read_csv(path: epath.Path) -> _Rows:
    rows = _rows(path, _decoded(path), delimiter=",")
    for first in rows:
        every = itertools.chain([first], rows)
        yield from _dpg_rows(every) if first[1].keys() >= set(DPG) else every


def _dpg_rows(rows: Iterable[tuple[str, dict[str, str], str]]) -> list[tuple[str, Any, str]]:
    """A row for each prompt, with its questions.

    As the benchmark's program, it does not take the first question of all, and of a prompt whose questions are at
    several places it takes the last ones.
    """
    prompts: dict[str, tuple[str, Any, str]] = {}
    before = None
    for number, (where, row, group) in enumerate(rows):
        item = row["item_id"]
        try:
            question = {
                "id": int(row["proposition_id"]),
                "dependency": [int(part) for part in row["dependency"].split(",")],
                "tuple": row["tuple"],
                "question": row["question_natural_language"],
            }
        except ValueError as error:
            raise ValueError(
                f"{where}: proposition_id or dependency is no whole number ({error}); correct the row"
            ) from error
        if item not in prompts or (item != before and number > 1):
            prompts[item] = (where, {"item_id": item, "text": row["text"], "questions": []}, group)
        if number:
            prompts[item][1]["questions"].append(question)
        before = item
    return list(prompts.values())


def _read_tsv(path: epath.Path) -> _Rows:
    text = _decoded(path)
    other = re.sub(r'(?<![^\t\r\n])"(?:[^"]|"")*+"(?![^\t\r\n])', "", text)  # all but the quoted fields
    return _rows(path, text, delimiter="\t", quoting=csv.QUOTE_NONE if '"' in other else csv.QUOTE_MINIMAL)


def _rows(path: epath.Path, text: str, **dialect) -> _Rows:
    # Without `strict`, an open quote swallows the rest of the file.
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, **dialect)
    rows = filter(None, reader)
    try:
        header = next(rows, [])
        _check_once(path, header)
        for row in rows:
            if len(row) > len(header):
                raise csv.Error(f"{len(row)} fields, but the header has {len(header)}")
            row += [""] * (len(header) - len(row))
            yield f"{path}, line {reader.line_num}", dict(zip(header, row, strict=True)), ""
    except csv.Error as error:
        where = f"{path}, line {reader.line_num}"
        raise ValueError(f'{where}: {error}; quote fields as in "a ""red"" cat, sitting"') from error


def _check_once(path: epath.Path, columns: Sequence[str]) -> None:
    if twice := [name for name in columns if name and columns.count(name) > 1]:
        raise ValueError(f"{path}: column {twice[0]!r} is there twice; expected each once")


def _read_json(path: epath.Path) -> _Rows:
    values = _parsed(_decoded(path), path, 1)
    if isinstance(values, list):
        for number, row in enumerate(values):
            yield f"{path}, row {number}", row, path.stem if isinstance(row, str) else ""
    elif isinstance(values, dict):
        for key, value in values.items():
            if isinstance(value, list):
                for number, row in enumerate(value):
                    yield f"{path}, {_quote(key)}, row {number}", row, key
            else:
                row = value if isinstance(value, dict) else {"prompt": value}
                yield f"{path}, {_quote(key)}", {"key": key} | row, ""
    else:
        raise ValueError(f"{path}: holds {_quote(values)}; expected a list of prompts, or an object")


def _read_jsonl(path: epath.Path) -> _Rows:
    for number, line in _lines(path):
        yield f"{path}, line {number}", _parsed(line, path, number), ""


def _read_parquet(path: epath.Path) -> _Rows:
    number = 0
    with path.open("rb") as opened:
        try:
            parquet = pq.ParquetFile(opened, page_checksum_verification=True)
            _check_once(path, parquet.schema_arrow.names)
            columns = [field.name for field in parquet.schema_arrow if _is_plain(field.type)]
            for rows in parquet.iter_batches(columns=columns):
                for row in rows.to_pylist():
                    yield f"{path}, row {number}", row, ""
                    number += 1
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{path}: damaged, or not a parquet file ({reason}); download it again") from error


def _is_plain(kind: pa.DataType) -> bool:
    """Whether it is text, number or truth value; an image is bytes, or a struct with bytes."""
    of = pa.types
    kind = kind.value_type if of.is_dictionary(kind) else kind
    text = of.is_string(kind) or of.is_large_string(kind) or of.is_string_view(kind)
    return text or of.is_integer(kind) or of.is_floating(kind) or of.is_boolean(kind) or of.is_null(kind)


def _decoded(path: epath.Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: not UTF-8 ({error.reason}); save the file as UTF-8") from error


def _lines(path: epath.Path) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, numbered from 1; str.splitlines would also split at U+2028 and other characters."""
    for number, line in enumerate(io.StringIO(_decoded(path), newline=None), 1):
        if line.strip():
            yield number, line.removesuffix("\n")


def _parsed(text: str, path: epath.Path, line: int) -> Any:
    """The JSON value that begins in this line."""
    try:
        return json.loads(text, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        where = f"{path}, line {line + getattr(error, 'lineno', 1) - 1}"
        reason = getattr(error, "msg", error)
        raise ValueError(f"{where}: not JSON ({reason}); .json is one value, .jsonl has one in each line") from error


_READERS = {
    ".txt": _read_txt,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
