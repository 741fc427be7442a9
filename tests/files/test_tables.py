"""Tables give rows without the keys that Arrow had to fill in; files that fit together are read together."""

import pyarrow as pa
import pytest
from datasets import Dataset, Features, Json, List, Value
from pyarrow import parquet

from nanochat_hf.files.data_file import DataFile
from nanochat_hf.files.listing import list_local
from nanochat_hf.files.rows import load_files

CALLS = [
    {"city": "Oslo"},
    {"stock": {"name": "X", "days": [{"from": 1}, {"to": 2}]}},
    {"stock": {"unit": "kr"}, "none": []},
    {"list": [None, 1]},
]
ROWS = [{"id": i, "note": None, "messages": [{"role": "assistant", "call": call}]} for i, call in enumerate(CALLS)]


@pytest.fixture(params=["parquet", "arrow"])
def table(request, tmp_path):
    data = Dataset.from_list(ROWS)
    if request.param == "parquet":
        data.to_parquet(tmp_path / "t.parquet")
        return DataFile(str(tmp_path / "t.parquet"), "parquet")
    data.save_to_disk(tmp_path / "saved")
    return list_local(str(tmp_path / "saved" / "*.arrow")).files[0]


def test_filled_in_keys_are_taken_out_at_any_depth(table):
    assert [raw.value for raw in table.rows()] == ROWS  # a column of the table itself stays, though it be null
    assert list(load_files([table], "t")) == ROWS


def test_places_name_file_and_row(table):
    assert [str(raw.place) for raw in table.rows(2)] == [f"{table.path} row 3", f"{table.path} row 4"]
    rows = load_files([table, table], "t").select([(1, 3), (5, None)])
    assert [rows.where(i) for i in range(len(rows))] == [f"{table.path} row {n}" for n in (2, 3, 2, 3, 4)]
    assert [row["id"] for row in rows] == [1, 2, 1, 2, 3] and table.count() == 4 and table.count(3) == 3


def test_nulls_within_json_were_written_and_stay(tmp_path):
    rows = [{"args": {"day": None}}, {"args": {"city": "Oslo"}}]
    Dataset.from_list(rows, features=Features({"args": Json()})).to_parquet(tmp_path / "t.parquet")
    file = DataFile(str(tmp_path / "t.parquet"), "parquet")
    assert [raw.value for raw in file.rows()] == list(load_files([file], "t")) == rows
    mixed = Features({"m": List({"role": Value("string"), "content": Json()})})
    rows = [{"m": [{"role": "a", "content": "x"}, {"role": "b", "content": [{"y": None}]}]}]
    Dataset.from_list(rows, features=mixed).to_parquet(tmp_path / "t.parquet")
    assert [raw.value for raw in file.rows()] == rows


def write(folder, **columns):
    for name, values in columns.items():
        parquet.write_table(pa.table(values), folder / f"{name}.parquet")
    return list_local(str(folder / "*.parquet")).files


def test_tables_with_more_or_fewer_columns_are_read_together(tmp_path):
    rows = load_files(write(tmp_path, a={"t": ["x"]}, b={"t": ["y"], "more": [1]}), "t")
    assert [row["t"] for row in rows] == ["x", "y"] and rows[1]["more"] == 1


def test_a_column_of_another_kind_is_named_with_its_file(tmp_path):
    with pytest.raises(ValueError, match=r"b\.parquet: the column 't' is list<.*>, and string in .*a\.parquet"):
        load_files(write(tmp_path, a={"t": ["x"]}, b={"t": [["y"]]}), "t")


def test_tables_and_lines_in_one_folder_are_all_read(tmp_path):
    write(tmp_path, a={"t": ["x"]})
    (tmp_path / "b.jsonl").write_text('{"t": "y"}\n')
    (tmp_path / "c.csv").write_text("t\nz\n")
    assert [row["t"] for row in load_files(list_local(str(tmp_path)).files, "t")] == ["x", "y", "z"]
