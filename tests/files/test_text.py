"""Text files give what was written: cells of a CSV stay text, lines of JSON stay lines, packed or not."""

import bz2
import gzip
import json
import lzma

import pyarrow as pa
import pytest

from nanochat_hf.files.data_file import DataFile
from nanochat_hf.files.endings import kind_of

ROWS = [{"a": "1"}, [{"role": "user", "content": "line\u2028separator\u0085"}], 7, None, {"a": {"b": None}}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def zstd(content):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as packed:
        packed.write(content)
    return sink.getvalue().to_pybytes()


def read(path):
    file = DataFile(str(path), *kind_of(path.name))
    rows = [raw.parsed() for raw in file.rows()]
    assert file.count() == len(rows) and file.count(2) == min(2, len(rows))
    assert [raw.parsed() for raw in file.rows(2)] == rows[2:]
    return rows


@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("a.jsonl", bytes),
        ("a.NDJSON", bytes),
        ("a.jsonl.gz", gzip.compress),
        ("A.JSONL.GZ", gzip.compress),
        ("a.jsonl.zst", zstd),
        ("two frames.jsonl.zst", lambda content: zstd(content[:20]) + zstd(content[20:])),
        ("a.ndjson.bz2", bz2.compress),
        ("a.json.xz", lzma.compress),
        ("a.json", bytes),
        ("a.gz", gzip.compress),
    ],
)
def test_lines_of_json_by_any_ending(tmp_path, name, pack):
    (tmp_path / name).write_bytes(pack(LINES))
    assert read(tmp_path / name) == ROWS


def test_a_json_file_is_its_list_or_one_conversation(tmp_path):
    path = tmp_path / "a.json"
    rows = [{"prompt": "when?", "completion": "2020-01-01"}, {"prompt": "x", "completion": "12:30"}]
    path.write_text(json.dumps(rows, indent=2))
    assert read(path) == rows
    conversation = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    path.write_text(json.dumps(conversation))
    assert read(path) == [conversation]
    path.write_text(json.dumps(rows[0], indent=2))
    assert read(path) == rows[:1]
    path.write_text(" \n")
    assert read(path) == []


CELLS = [
    "007",
    "NA",
    "null",
    "None",
    "1e5",
    "2020-01-01",
    "True",
    "",
    " x ",
    "é",
    'say "hi", you',
    "two\nlines",
    "0x1F",
    "inf",
]


@pytest.mark.parametrize(("name", "delimiter"), [("a.csv", ","), ("a.tsv", "\t"), ("A.CSV.gz", ",")])
def test_a_csvs_cells_are_text_as_written(tmp_path, name, delimiter):
    quoted = [f'"{cell.replace(chr(34), 2 * chr(34))}"' for cell in CELLS]
    text = f"prompt{delimiter}completion\r\n" + "".join(f"q{delimiter}{cell}\r\n" for cell in quoted)
    content = b"\xef\xbb\xbf" + text.encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert read(tmp_path / name) == [{"prompt": "q", "completion": cell} for cell in CELLS]


def test_a_csv_without_quotes_keeps_its_words(tmp_path):
    (tmp_path / "a.csv").write_text("p,c\n" + "".join(f"{i},007\n" for i in range(10_010)))
    assert {row["c"] for row in read(tmp_path / "a.csv")} == {"007"}


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.csv", b"a,b\n1\n", "a.csv line 2: 1 cells under 2 columns"),
        ("a.csv", b"a,a\n1,2\n", "a.csv: line 1, the column 'a' is there twice"),
        ("a.csv", b"a\n\xff\n", "a.csv: not UTF-8"),
        ("a.jsonl", b'{"a": 1}\n{"a": \n', "a.jsonl line 2: not JSON"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl line 1: not JSON .nested too deeply"),
        ("a.jsonl", b'{"a": ' + b"9" * 5000 + b"}", "a.jsonl line 1: not JSON"),
        ("a.json", b'{"a": \n', "a.json: not JSON"),
        ("a.jsonl.gz", b"no gzip", "a.jsonl.gz: cannot be read"),
        ("a.jsonl.gz", gzip.compress(LINES, mtime=0)[:-12], "a.jsonl.gz: cannot be read"),
        ("a.jsonl.zst", zstd(LINES)[:-5], "a.jsonl.zst"),
        ("a.jsonl.xz", b"no xz", "a.jsonl.xz: cannot be read"),
    ],
)
def test_what_cannot_be_read_is_one_line_with_the_file(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=reason) as caught:
        list(read(tmp_path / name))
    assert "\n" not in str(caught.value)
