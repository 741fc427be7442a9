"""Records: what is checked, what the pages show."""

import json
from pathlib import Path

import pytest

from nanochat_hf.cli import records
from nanochat_hf.cli.record_parts import Claim, Fault, claim_text, read_record, value_range
from nanochat_hf.tools.record import Table, dump_tables

ENVIRONMENT = {
    "date": "2026-05-01T10:00:00+00:00",
    "commit": "0123456789abcdef",
    "uncommitted_changes": False,
    "cpu": None,
    "cpu_cores": None,
    "accelerator": "NVIDIA H100 80GB",
    "num_accelerators": 2,
    "software": {"torch": "2.13.0"},
    "variables": {},
    "note": "",
}
STEPS = Table(
    "Steps",
    {"depth": None, "dtype": None, "speed": "tokens/s", "MFU": "%"},
    [[12, "bfloat16", 633000, 51.4], [12, "bfloat16", 641000, 52.0], [20, "float8", 218600, None]],
)
WORDS = """
claims:
- {claim: Speed at depth 12, topic: Speed, table: steps, where: {depth: 12}, show: [speed, MFU]}
negative:
- {tried: prefetching into L2, got: no gain}
"""
README = "# Steps on an H100\n\n**Asked.** How fast?\n\n**Found.** Fast.\n\n**Follows.** Go on.\n"


def make(docs: Path, name: str = "2026-05-01-steps", **changes: str | None) -> Path:
    """A whole record; `changes` gives other texts to files, None leaves one out."""
    parts = {
        "README.md": README,
        "command": "python -m scripts.bench train\n",
        "env.json": json.dumps(ENVIRONMENT | {"date": f"{name[:10]}T10:00:00+00:00"}),
        "table.json": dump_tables({"steps": STEPS}),
        "record.yaml": WORDS,
    } | changes
    folder = docs / "records" / name
    folder.mkdir(parents=True)
    for file, text in parts.items():
        if text is not None:
            (folder / file).write_text(text)
    return folder


def test_pages_of_a_small_example(tmp_path, capsys):
    folder = make(tmp_path)
    records.main(["--docs", str(tmp_path)])
    results = (tmp_path / "results.md").read_text()
    row = next(line for line in results.splitlines() if "Speed at depth 12" in line)
    assert row == (
        "| [Speed at depth 12](records/2026-05-01-steps/README.md) "
        "| speed 633,000 to 641,000 tokens/s, MFU 51.4 to 52.0 % "
        "| 2 × NVIDIA H100 80GB | 2026-05-01 | `0123456` | [command](records/2026-05-01-steps/command) |"
    )
    assert "| prefetching into L2 | no gain |" in (tmp_path / "negative_results.md").read_text()
    readme = (folder / "README.md").read_text()
    assert readme.startswith(README.rstrip())
    assert "| 20 | float8 | 218,600 | – |" in readme
    assert "1 records, all whole" in capsys.readouterr().out


def test_check_passes_on_what_was_written_and_fails_after_a_change(tmp_path, capsys):
    folder = make(tmp_path)
    records.main(["--docs", str(tmp_path)])
    before = {path: path.read_text() for path in tmp_path.rglob("*.md")}
    records.main(["--docs", str(tmp_path), "--check"])
    (folder / "table.json").write_text((folder / "table.json").read_text().replace("641000", "642000"))
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        records.main(["--docs", str(tmp_path), "--check"])
    assert stopped.value.code == 1
    said = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in said] == ["results.md", "records/2026-05-01-steps/README.md"]
    assert {path: path.read_text() for path in tmp_path.rglob("*.md")} == before  # a check writes nothing


def test_newest_record_of_a_claim_is_shown_whatever_the_folders_are_called(tmp_path):
    make(
        tmp_path,
        "2026-05-02-a",
        **{"table.json": dump_tables({"steps": Table("S", STEPS.columns, [[12, "x", 700000, 55]])})},
    )
    make(tmp_path, "2026-05-01-z")
    records.main(["--docs", str(tmp_path)])
    rows = [line for line in (tmp_path / "results.md").read_text().splitlines() if "Speed at depth 12" in line]
    assert len(rows) == 1 and "speed 700,000 tokens/s" in rows[0] and "2026-05-02-a" in rows[0]


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"README.md": None}, "README.md is missing; write a title"),
        ({"README.md": README.replace("**Found.** Fast.", "")}, "no line '**Found.** …'; write that sentence"),
        ({"README.md": README[2:]}, "does not begin with a title; write '# …'"),
        ({"command": "\n"}, "command is empty; write the command"),
        ({"env.json": None}, "env.json is missing; nanochat_hf.tools.record.write_record writes it"),
        ({"env.json": "{"}, "env.json cannot be read"),
        ({"env.json": json.dumps({k: v for k, v in ENVIRONMENT.items() if k != "note"})}, "env.json lacks note; add"),
        (
            {"env.json": json.dumps(ENVIRONMENT | {"date": "2026-05-03T00:00:00+00:00"})},
            "name the folder 2026-05-03-NAME",
        ),
        ({"env.json": json.dumps(ENVIRONMENT | {"date": "2026-05-01T00:00:00"})}, "has no time zone; end it in +00:00"),
        ({"table.json": None}, "table.json and metrics.jsonl are both missing; write one"),
        (
            {"table.json": '{"steps": {"about": "", "columns": {"a": null}, "rows": [[1, 2]]}}'},
            "has 2 values for 1 columns",
        ),
        ({"table.json": '{"steps": {"about": "", "columns": {"a": null}, "rows": []}}'}, "table steps has no rows"),
        ({"record.yaml": None}, "record.yaml is missing; write what the record claims"),
        ({"record.yaml": "claims: []"}, "neither claims nor negative"),
        ({"record.yaml": WORDS + "claim: x\n"}, "unknown keys ['claim']"),
        ({"record.yaml": WORDS.replace("table: steps", "table: parts")}, "takes table 'parts'; there are ['steps']"),
        ({"record.yaml": WORDS.replace("depth: 12}", "depth: 13}")}, "no row of table steps matches {'depth': 13}"),
        ({"record.yaml": WORDS.replace("speed, MFU", "pace")}, "names columns ['pace']; table steps has"),
        ({"record.yaml": WORDS.replace("depth: 12}", "depth: 20}")}, "column MFU is empty in the rows that match"),
    ],
)
def test_each_fault_is_one_line_with_record_and_remedy(tmp_path, capsys, changes, said):
    make(tmp_path, **changes)
    with pytest.raises(SystemExit) as stopped:
        records.main(["--docs", str(tmp_path)])
    assert stopped.value.code == 1
    lines = capsys.readouterr().err.splitlines()
    assert any(line.startswith("2026-05-01-steps: ") and said in line for line in lines), lines
    assert not (tmp_path / "results.md").exists()  # no page is made of records that are not whole


def test_several_faults_of_several_records_are_all_told(tmp_path, capsys):
    make(tmp_path, command=None, **{"record.yaml": None})
    make(tmp_path, "2026-05-02-more", **{"README.md": None})
    with pytest.raises(SystemExit):
        records.main(["--docs", str(tmp_path)])
    told = sorted(line.split(";")[0] for line in capsys.readouterr().err.splitlines())
    assert told == [
        "2026-05-01-steps: command is missing",
        "2026-05-01-steps: record.yaml is missing",
        "2026-05-02-more: README.md is missing",
    ]


def test_metrics_of_a_run_are_a_table(tmp_path):
    lines = [{"config": {}}, {"step": 1, "train/loss": 6.2}, {"step": 2, "val/bpb": 1.5}]
    words = "claims: [{claim: bpb, topic: T, table: metrics, where: {step: 2}, show: [val/bpb]}]"
    metrics = "".join(json.dumps(line) + "\n" for line in lines)
    folder = make(tmp_path, **{"table.json": None, "metrics.jsonl": metrics, "record.yaml": words})
    record = read_record(folder)
    assert claim_text(record.claims[0], record.tables) == "1.5"
    assert record.tables["metrics"].dicts()[0] == {"step": 1, "train/loss": 6.2, "val/bpb": None}


def test_claim_keeps_rows_apart_by_a_column():
    claim = Claim("Speed", "Speed", "steps", ["speed"], by="depth")
    assert claim_text(claim, {"steps": STEPS}) == "depth 12: 633,000 to 641,000 tokens/s; depth 20: 218,600 tokens/s"
    with pytest.raises(Fault, match="names columns"):
        claim_text(Claim("Speed", "Speed", "steps", ["speed"], by="width"), {"steps": STEPS})


def test_ranges_of_numbers_and_lists_of_words():
    assert value_range([2, 1, 3]) == "1 to 3"
    assert value_range(["b", "a", "b"]) == "b, a"
    assert value_range([0.5, 0.5]) == "0.5"
    assert value_range([True, False]) == "yes, no"


def test_the_projects_own_records_are_whole_and_its_pages_up_to_date(capsys):
    docs = Path(__file__).parents[2] / "docs"
    records.main(["--docs", str(docs), "--check"])
    assert "all whole" in capsys.readouterr().out
