"""Output streams of any encoding take all that a run prints."""

import io

import pytest

from drep_jax.cli.app import write_any_text


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [
        ("ascii", "+-0.3 x 10 -> alpha = \\u2713 caf\\xe9 \\udcf6"),
        ("latin-1", "±0.3 × 10 -> alpha = \\u2713 café \\udcf6"),
        ("utf-8", "±0.3 × 10 → α ≡ ✓ café \\udcf6"),
    ],
)
def test_what_an_encoding_lacks_is_written_in_another_way(encoding, expected, monkeypatch):
    for name in ("stdout", "stderr"):
        written = io.BytesIO()
        monkeypatch.setattr(f"sys.{name}", stream := io.TextIOWrapper(written, encoding=encoding))
        write_any_text()
        stream.write("±0.3 × 10 → α ≡ ✓ café \udcf6")
        stream.flush()
        assert written.getvalue().decode(encoding) == expected


def test_streams_that_are_closed_or_of_a_test_are_left_alone(monkeypatch):
    monkeypatch.setattr("sys.stdout", None)
    monkeypatch.setattr("sys.stderr", io.StringIO())
    write_any_text()
