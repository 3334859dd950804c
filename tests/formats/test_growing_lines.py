"""Files of lines: continued after a kill, whole or not there."""

import json
from pathlib import Path

import pytest

from megarlhf.formats.growing_lines import GrowingLines

IDENTITY = {"seed": 3, "name": "a"}


def rows(path: Path) -> list[dict[str, int]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_file_appears_whole_and_replaces_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "new" / "samples.jsonl"
    for turn in range(2):
        with GrowingLines(target, IDENTITY) as lines:
            assert lines.num_lines == 0
            lines.append([{"a": turn}])
            assert not target.exists() or rows(target)[0] == {"a": 0}
            lines.append([{"a": 5}, {"a": 6}])
        assert rows(target) == [{"a": turn}, {"a": 5}, {"a": 6}]
        assert [path.name for path in target.parent.iterdir()] == ["samples.jsonl"]


def test_what_a_killed_process_wrote_is_kept_up_to_its_last_whole_line(tmp_path: Path) -> None:
    target = tmp_path / "samples.jsonl"
    with pytest.raises(RuntimeError), GrowingLines(target, IDENTITY) as lines:
        lines.append([{"a": 1}, {"a": 2}, {"a": 3}])
        raise RuntimeError
    assert not target.exists()
    with (tmp_path / "samples.jsonl.partial").open("ab") as file:
        file.write(b'{"a": ')
    with GrowingLines(target, IDENTITY) as lines:
        assert lines.num_lines == 3
        lines.keep(2)
        lines.append([{"a": 7}])
        assert lines.num_lines == 3
    assert rows(target) == [{"a": 1}, {"a": 2}, {"a": 7}]


@pytest.mark.parametrize("left", [b'{"seed": 4, "name": "a"}\n{"a": 9}\n', b'{"name": "a", "se', b"\n"])
def test_lines_of_another_identity_are_thrown_away(
    tmp_path: Path, left: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    target = tmp_path / "samples.jsonl"
    (tmp_path / "samples.jsonl.partial").write_bytes(left)
    with GrowingLines(target, IDENTITY) as lines:
        assert lines.num_lines == 0
        lines.append([{"a": 1}])
    assert rows(target) == [{"a": 1}]
    assert "it begins anew" in caplog.text


def test_one_process_writes_at_a_time(tmp_path: Path) -> None:
    with GrowingLines(tmp_path / "s.jsonl", IDENTITY) as lines:
        lines.append([{"a": 1}])
        with pytest.raises(ValueError, match=r"s\.jsonl; another process is writing .*s\.jsonl\.partial"):
            GrowingLines(tmp_path / "s.jsonl", IDENTITY)
    assert rows(tmp_path / "s.jsonl") == [{"a": 1}]


def test_a_number_without_a_form_in_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"), GrowingLines(tmp_path / "s.jsonl", IDENTITY) as lines:
        lines.append([{"a": float("nan")}])
