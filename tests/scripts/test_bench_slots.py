"""The benchmark of refilled rows runs whole."""

import json

import pytest

from scripts.benchmarks.slots import main

SMALL = "--depth 1 --vocab-size 300 --positions 64 --rows 4 --samples 2 --prompt 5 --tokens 4 --repeats 1".split()


def test_every_way_is_measured_for_every_number_of_answers(tmp_path, capsys):
    main([*SMALL, "--answers", "4", "--answers", "6", "--json", str(tmp_path / "out.json")])
    rows = json.loads((tmp_path / "out.json").read_text())
    assert [(r["answers"], r["way"]) for r in rows] == [
        (n, w) for n in (4, 6) for w in ("full", "waiting", "refilling")
    ]
    assert all(r["tok/s"] > 0 for r in rows) and rows[0]["of full"] == 1
    assert "tok/s" in capsys.readouterr().out


def test_rows_must_hold_whole_prompts(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--rows", "10", "--samples", "4"])
    assert stop.value.code == 2 and "--rows 10 must be a multiple of --samples 4" in capsys.readouterr().err
