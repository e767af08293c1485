"""scripts/english_set.py: texts put together again from their sentences, parted as a whole."""

import importlib.util
import io
import json
import sys
import tarfile
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def english_set():
    path = Path(__file__).parents[2] / "scripts" / "english_set.py"
    spec = importlib.util.spec_from_file_location("english_set", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _archive(files):
    """The bytes of a .tar.gz."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def _sdist(path, english_set):
    essays = "".join(
        f"{text}_{line}\t0.5\tSentence {line} of text {text}.\r\n" for text in range(40) for line in (1, 2)
    )
    films = "".join(f"{line}\t-1.0\tFilm {line}.\n" for line in range(1, 46))
    names = dict.fromkeys(english_set.FILES, essays.encode()) | {"movieReviewSnippets": films.encode()}
    inner = _archive({f"hutto/{name}_GroundTruth.txt": content for name, content in names.items()})
    path.write_bytes(_archive({f"vader/resources/{english_set.ARCHIVE}": inner}))
    return path


def test_documents_are_whole_and_in_one_file(english_set, tmp_path, monkeypatch, capsys):
    sdist = _sdist(tmp_path / "v.tar.gz", english_set)
    monkeypatch.setattr(sys, "argv", ["english_set.py", str(sdist), str(tmp_path / "set")])
    english_set.main()
    splits = {name: [json.loads(line)["text"] for line in (tmp_path / "set" / name).open()] for name in
              ("train.jsonl", "valid.jsonl")}  # fmt: skip
    texts = [text for texts in splits.values() for text in texts]
    assert texts.count("Sentence 1 of text 7. Sentence 2 of text 7.") == 2  # of two of the files
    assert sum(text.startswith("Film ") for text in texts) == 3
    assert "Film 20. Film 21." not in "\n".join(texts)
    assert len(texts) == 2 * 40 + 3
    assert 0.1 < len(splits["valid.jsonl"]) / len(texts) < 0.4
    assert f"{len(splits['train.jsonl'])} documents" in capsys.readouterr().out


def test_another_archive_is_refused(english_set, tmp_path, monkeypatch):
    other = tmp_path / "other.tar.gz"
    other.write_bytes(_archive({"a/b.txt": b"text"}))
    monkeypatch.setattr(sys, "argv", ["english_set.py", str(other), str(tmp_path / "set")])
    with pytest.raises(SystemExit, match="not the sdist of vaderSentiment"):
        english_set.main()
    assert not (tmp_path / "set").exists()
