"""What a program writes of a record."""

import json
import subprocess
import sys

import pytest

from nanochat_hf.tools.record import Environment, Table, dump_tables, load_tables, table_of, write_record

STEPS = Table("Steps", {"depth": None, "speed": "tokens/s"}, [[12, 638000], [20, None]])


def test_tables_come_back_as_they_were():
    parts = Table("µs, “quoted”", {"op": None, "time": "µs"}, [["a|b", 0.1], ["c", 1e-5], ["d", True]])
    assert load_tables(dump_tables({"steps": STEPS, "parts": parts})) == {"steps": STEPS, "parts": parts}


def test_a_table_of_mappings_has_none_where_a_row_lacks_a_column():
    table = table_of("Parts", [{"op": "rope", "time": 0.17}, {"op": "head", "rows": 8192}], units={"time": "ms"})
    assert table.columns == {"op": None, "time": "ms", "rows": None}
    assert table.rows == [["rope", 0.17, None], ["head", None, 8192]]


def test_numbers_of_a_column():
    assert STEPS.numbers("depth") == [12, 20]
    with pytest.raises(ValueError, match="column speed of table 'Steps' holds values that are no numbers"):
        STEPS.numbers("speed")


def test_a_row_of_another_length_is_refused():
    with pytest.raises(ValueError, match=r"row 1 .* has 1 values for 2 columns; give one value a column"):
        Table("Steps", {"a": None, "b": None}, [[1, 2], [3]])


def test_write_record_dates_the_folder_and_collects_command_and_environment(tmp_path):
    code = (
        "from nanochat_hf.tools.record import Table, write_record; "
        "print(write_record('steps', {'steps': Table('Steps', {'depth': None}, [[12]])}))"
    )
    subprocess.run(["git", "init", "-q", "."], cwd=tmp_path, check=True)
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    folder = tmp_path / run.stdout.strip()
    found = json.loads((folder / "env.json").read_text())
    assert folder.name == f"{found['date'][:10]}-steps"
    assert set(found) == set(Environment.__dataclass_fields__)
    assert found["commit"] is None  # a repository without a commit
    assert found["software"]["torch"].startswith("2.") and found["software"]["python"] == sys.version.split()[0]
    assert found["cpu"] and found["cpu_cores"] >= 1
    command = (folder / "command").read_text()
    assert command.startswith("python") and "write_record" in command and "/" not in command.split()[0]
    assert load_tables((folder / "table.json").read_text())["steps"].rows == [[12]]


def test_records_are_not_written_over_and_not_written_without_figures(tmp_path):
    folder = write_record(tmp_path / "steps", {"steps": STEPS}, command="python -m scripts.bench train")
    with pytest.raises(ValueError, match="is a record already"):
        write_record(tmp_path / "steps", {"steps": STEPS})
    with pytest.raises(ValueError, match="give tables or metrics"):
        write_record(tmp_path / "nothing")
    assert (folder / "command").read_text() == "python -m scripts.bench train\n"


def test_metrics_of_a_run_are_copied(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    folder = write_record(tmp_path / "2026-05-01-run", metrics=tmp_path / "metrics.jsonl")
    assert folder.name == "2026-05-01-run"
    assert (folder / "metrics.jsonl").read_text() == '{"step": 1}\n' and not (folder / "table.json").exists()


def test_importing_the_module_loads_nothing_heavy():
    code = """import importlib.util, sys
spec = importlib.util.spec_from_file_location("record", sys.argv[1])
sys.modules["record"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(sorted({"torch", "numpy", "transformers"} & set(sys.modules)))"""
    path = sys.modules["nanochat_hf.tools.record"].__file__
    run = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "known, words",
    [
        (dict(accelerator="NVIDIA H200", num_accelerators=2), "2 × NVIDIA H200"),
        (dict(accelerator="NVIDIA H200"), "1 × NVIDIA H200"),
        (dict(cpu_cores=2), "CPU, 2 cores"),
        (dict(cpu="AMD EPYC", cpu_cores=1), "AMD EPYC, 1 core"),
        ({}, "not recorded"),
    ],
)
def test_hardware_in_words(known, words):
    nothing = dict.fromkeys(("commit", "uncommitted_changes", "cpu", "cpu_cores", "accelerator", "num_accelerators"))
    assert Environment(date="2026-05-01T00:00:00+00:00", **(nothing | known)).hardware() == words
