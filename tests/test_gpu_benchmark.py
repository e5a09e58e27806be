"""The measurements for a GPU run from end to end on a CPU with tiny sizes, and go on where they were interrupted."""

import json
import sys

from benchmarks.gpu import __main__ as command


def test_every_part_runs_and_is_not_run_twice(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu", "--smoke", "--output", str(tmp_path)])
    command.main()
    results = {part: json.loads((tmp_path / f"gpu-{part}.json").read_text()) for part in ("laws", "speed", "decoding")}
    assert all(row["holds"] for row in results["laws"]["rows"].values())
    rows = [row for result in results.values() for row in result["rows"].values()]
    assert not [row["failed"] for row in rows if "failed" in row]
    assert results["speed"]["rows"]["MNIST, segments of 14: replay, engine"]["tokens_per_second"] > 0
    capsys.readouterr()
    command.main()
    assert capsys.readouterr().out == ""


def test_a_failed_measurement_costs_only_itself(tmp_path, monkeypatch):
    def part(options):
        yield "broken", lambda: 1 / 0
        yield "sound", lambda: {"holds": True}

    monkeypatch.setattr(command, "PARTS", {"laws": part})
    monkeypatch.setattr(sys, "argv", ["gpu", "--smoke", "--output", str(tmp_path), "--parts", "laws"])
    command.main()
    rows = json.loads((tmp_path / "gpu-laws.json").read_text())["rows"]
    assert "ZeroDivisionError" in rows["broken"]["failed"]
    assert rows["sound"]["holds"]
