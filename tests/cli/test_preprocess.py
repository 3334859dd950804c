"""tools/preprocess_data.py: megatron-core's reader finds the tokens of megatron-core's own tokenizers."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from transformers import AutoTokenizer

from megarlhf.cli.main import main

from megarlhf.engine.indexed_data import IndexedDataset, IndexedDatasetBuilder  # isort: skip
from megatron.core.tokenizers.text.libraries.sentencepiece_tokenizer import SentencePieceTokenizer  # isort: skip

ROOT = Path(__file__).parents[2]
TEXTS = [f"{i} = {i * i % 97} a{i}" for i in range(600)]


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    prefix = tmp_path_factory.mktemp("sentencepiece") / "tiny"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_prefix=str(prefix), vocab_size=60, hard_vocab_limit=False, minloglevel=2
    )
    return f"{prefix}.model"


def write_lines(path: Path, lines: list[str]) -> str:
    path.write_text("\n".join(lines))
    return str(path)


def corpus(tmp_path: Path) -> str:
    rows = [json.dumps({"text": text, "title": text[:3]}) for text in TEXTS]
    return write_lines(tmp_path / "corpus.jsonl", [rows[0], "", *rows[1:], ""])


def flags(tmp_path: Path, kind: str, model: str, *more: str) -> list[str]:
    named = ["--tokenizer-type", kind, "--tokenizer-model", model, "--output-prefix", str(tmp_path / "out" / "a")]
    return ["--input", corpus(tmp_path), *named, *more]


def documents(prefix: Path) -> list[list[int]]:
    read = IndexedDataset(str(prefix))
    assert read.document_indices.tolist() == list(range(len(read) + 1))
    return [read[i].tolist() for i in range(len(read))]


@pytest.mark.slow
def test_a_hugging_face_tokenizer_in_two_processes(assets: Path, tmp_path: Path) -> None:
    """The bytes are those that megatron-core's builder writes of the same tokens, in the order of the file."""
    words = flags(tmp_path, "HuggingFaceTokenizer", str(assets / "model"), "--append-eod", "--workers", "2")
    words += ["--log-interval", "100"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), *words, "--json-keys", "text", "title"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "a_text_document: 600 documents" in done.stdout and "documents/s" in done.stderr
    tokenizer = AutoTokenizer.from_pretrained(assets / "model")
    for key, texts in (("text", TEXTS), ("title", [text[:3] for text in TEXTS])):
        builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
        for text in texts:
            ids = [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
            builder.add_document(np.array(ids), [len(ids)])
        builder.finalize(str(tmp_path / "theirs.idx"))
        for suffix in (".bin", ".idx"):
            ours = tmp_path / "out" / f"a_{key}_document{suffix}"
            assert ours.read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()


@pytest.mark.parametrize("append_eod", [False, True])
def test_a_sentencepiece_tokenizer(sentencepiece_model: str, tmp_path: Path, append_eod: bool) -> None:
    more = ["--workers", "1", *(["--append-eod"] if append_eod else [])]
    assert main(["preprocess", *flags(tmp_path, "SentencePieceTokenizer", sentencepiece_model, *more)]) == 0
    theirs = SentencePieceTokenizer(sentencepiece_model)
    eod = [theirs.tokenizer.eos_id()] if append_eod else []
    found = documents(tmp_path / "out" / "a_text_document")
    assert found == [[*theirs.text_to_ids(text), *eod] for text in TEXTS]


GOOD = '{"text": "1 + 1"}'


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([GOOD, '{"txt": "1"}'], "line 2 of {}: json_keys: 'text' is not there; the keys are 'txt'"),
        ([GOOD, "", '{"text": ""}'], "line 3 of {}: json_keys: 'text' is empty"),
        ([GOOD, GOOD, '{"text": "1 +'], "line 3 of {}: it is not JSON"),
        (["[1]"], "line 1 of {}: it is a list"),
        (['{"text": 5}'], "line 1 of {}: json_keys: 'text' holds a int"),
        (['{"text": "\\ud83d"}'], "line 1 of {}: its text holds"),
        (["", ""], "input={} has no rows"),
    ],
)
def test_bad_rows_are_told_with_file_and_line(
    assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], lines: list[str], said: str
) -> None:
    words = flags(tmp_path, "HuggingFaceTokenizer", str(assets / "model"), "--workers", "1")
    path = write_lines(tmp_path / "bad.jsonl", lines)
    assert main(["preprocess", *words, "--input", path]) == 2
    assert said.replace("{}", path) in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == [], "nothing half made stays"


def test_all_bad_rows_up_to_five(assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = flags(tmp_path, "HuggingFaceTokenizer", str(assets / "model"), "--workers", "1")
    path = write_lines(tmp_path / "bad.jsonl", [*(["{}", GOOD] * 400)])
    assert main(["preprocess", *words, "--input", path]) == 2
    said = capsys.readouterr().err
    assert said.count("is not there") == 5 and "line 9 of" in said


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--input", "nowhere"], "input=nowhere is not a file"),
        (["--tokenizer-model", "nowhere"], "tokenizer_model=nowhere is not a local directory"),
        (["--workers", "0", "--log-interval", "0"], "workers=0 must be at least 1\nlog_interval=0 must be"),
        (["--split-sentences"], "--split-sentences is not an option here; documents are stored whole"),
        (["--tokenizer-type", "GPT2BPETokenizer"], "--tokenizer-type"),
    ],
)
def test_mistakes(
    assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], said: str
) -> None:
    words = ["preprocess", *flags(tmp_path, "HuggingFaceTokenizer", str(assets / "model")), *more]
    try:
        assert main(words) == 2
    except SystemExit as stop:
        assert stop.code == 2
    assert said in capsys.readouterr().err


def test_what_is_there_stays(assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["preprocess", *flags(tmp_path, "HuggingFaceTokenizer", str(assets / "model"), "--workers", "1")]
    assert main([*words, "--dry-run"]) == 0 and not (tmp_path / "out").exists()
    assert main(words) == 0 and main(words) == 2
    assert "a_text_document.bin" in capsys.readouterr().err
    assert main([*words, "--overwrite"]) == 0


def test_a_tokenizer_that_ends_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options: dict[str, Any] = {"vocab_size": 60, "hard_vocab_limit": False, "minloglevel": 2, "eos_id": -1}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_prefix=str(tmp_path / "tiny"), **options
    )
    words = flags(tmp_path, "SentencePieceTokenizer", str(tmp_path / "tiny.model"), "--append-eod")
    assert main(["preprocess", *words]) == 2 and "has no EOS" in capsys.readouterr().err
    (tmp_path / "broken.model").write_text("no model")
    words = flags(tmp_path, "SentencePieceTokenizer", str(tmp_path / "broken.model"))
    assert main(["preprocess", *words]) == 2 and "is not a sentencepiece" in capsys.readouterr().err
