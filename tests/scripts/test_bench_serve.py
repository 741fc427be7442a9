"""The benchmark of the server: its streams are counted whole, and failures are told."""

import asyncio

import pytest

pytest.importorskip("uvicorn", reason="uvicorn (the extra web) is not installed")

from scripts.benchmarks import serve
from tests.support.serving import running, small_engine


def test_streams_are_counted_and_failures_told(capsys):
    engine = small_engine()
    engine.table.ends = engine.table.ends[:0]
    engine.specials = (engine.specials[0], frozenset())
    with running(engine, name="it", waiting=0) as (address, _):
        port = int(address.rpartition(":")[2])
        rate, results, failed = asyncio.run(serve.together(port, 3, 7, 60))
        assert rate > 0 and failed == 0 and [r.tokens for r in results] == [7] * 3
        assert all(0 < r.first <= r.last for r in results)
        _, results, failed = asyncio.run(serve.together(port, 6, 100, 60))
        assert failed >= 1 and len(results) + failed == 6 and "429" in capsys.readouterr().err


def test_numbers_are_bounded(capsys):
    with pytest.raises(SystemExit) as stop:
        serve.main(["--streams", "1000"])
    assert stop.value.code == 2 and "--streams 1000" in capsys.readouterr().err
