"""The benchmark of generation runs whole, and every way says the same tokens."""

import json

import pytest

from scripts.benchmarks.generate import main


def test_every_way_says_the_same_tokens(tmp_path, capsys):
    run = [
        "--depth",
        "1",
        "--vocab-size",
        "300",
        "--positions",
        "64",
        "--batch",
        "1",
        "--batch",
        "3",
        "--prompt",
        "5",
        "--tokens",
        "4",
    ]
    main([*run, "--repeats", "1", "--no-compile", "--json", str(tmp_path / "out.json")])
    rows = json.loads((tmp_path / "out.json").read_text())
    assert [(r["batch"], r["way"]) for r in rows] == [(b, w) for b in (1, 3) for w in ("generate", "engine, eager")]
    assert all(r["same tokens"] == 1 and r["prefill tok/s"] > 0 for r in rows)
    assert "decode tok/s" in capsys.readouterr().out


def test_one_token_is_no_decoding(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--tokens", "1"])
    assert stop.value.code == 2 and "--tokens 1" in capsys.readouterr().err
