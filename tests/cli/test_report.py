"""`memformer report` rewrites the HTML summary of a run."""

from tests.cli.calls import call_json


def test_report_is_written_again(copied):
    (copied / "summary.html").unlink()
    assert call_json("report", copied) == {"summary": str(copied / "summary.html")}
    assert "<svg" in (copied / "summary.html").read_text()
