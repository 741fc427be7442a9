"""Pictures: drawn from records and from the code, the same bytes each time."""

import importlib.util
from pathlib import Path

import pytest

from nanochat_hf.cli import pictures
from nanochat_hf.cli.record_parts import read_record
from nanochat_hf.training import schedules

DOCS = Path(__file__).parents[2] / "docs"
RECORDS = DOCS / "records"


@pytest.mark.parametrize("name", pictures.PICTURES)
def test_the_same_records_give_the_same_bytes(name, tmp_path):
    first = pictures.write(name, RECORDS, tmp_path).read_bytes()
    assert first.startswith(b"<?xml") and pictures.write(name, RECORDS, tmp_path).read_bytes() == first
    assert (DOCS / "pictures" / f"{name}.svg").is_file()


def test_muon_against_adamw_shows_the_records_figures():
    rows = read_record(RECORDS / pictures.MUON).tables["curves"].dicts()
    lines = {line.get_label(): list(line.get_ydata()) for line in pictures.muon_vs_adamw(RECORDS).axes[0].lines}
    assert lines == {name: [row[name] for row in rows] for name in ("Muon", "AdamW")}


def test_loss_curve_leaves_out_entries_without_the_metric():
    left, right = pictures.loss_curve(RECORDS).axes
    assert list(right.lines[0].get_xdata()) == list(range(0, 201, 20))
    assert list(left.lines[0].get_xdata()) == list(range(10, 201, 10))


def test_schedules_are_those_of_training():
    line = next(x for x in pictures.schedules(RECORDS).axes[0].lines if x.get_label() == "Muon momentum")
    for step, value in zip(line.get_xdata(), line.get_ydata(), strict=True):
        assert value == schedules.muon_momentum(round(step))


def test_packing_draws_each_conversation_once_in_both_panels():
    lengths = [row["length"] for row in read_record(RECORDS / pictures.LENGTHS).tables["lengths"].dicts()]
    for axes in pictures.packing(RECORDS).axes:
        drawn = sorted(bar.get_width() for bar in axes.patches if bar.get_width() != pictures.ROW)
        assert drawn == sorted(lengths)


def test_speed_spans_the_cards_of_a_record():
    speeds = pictures._speeds(read_record(RECORDS / "2026-11-26-pieces-by-tma"))
    values = speeds["Training at depth 20, 32 rows, cuDNN's attention, bfloat16, one H100"]
    assert (min(values), max(values)) == (185400, 188600)


def test_every_stop_of_the_datas_way_is_a_module():
    for _, where in pictures.STOPS:
        assert importlib.util.find_spec(f"nanochat_hf.{where}"), where


def test_a_name_that_is_none_ends_in_one_line(capsys):
    with pytest.raises(SystemExit) as stopped:
        pictures.main(["loss"])
    assert stopped.value.code == 2
    assert "no picture 'loss'; choose from loss_curve" in capsys.readouterr().err
