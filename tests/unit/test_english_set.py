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


def test_labels_are_what_people_agree_on(english_set, tmp_path, monkeypatch, capsys):
    path = Path(__file__).parents[2] / "scripts" / "sentiment_set.py"
    monkeypatch.setitem(sys.modules, "english_set", english_set)
    spec = importlib.util.spec_from_file_location("sentiment_set", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    films = [f"{line}\t{2.5 if line % 2 else -1.01}\tFilm {line}.\n" for line in range(1, 401)]
    films += ["401\t1.0\tUndecided.\n", "402\t-0.3\tUndecided too.\n", "403\t-3\tfilm  7.\n"]  # 403 is 7 again
    goods = [f"{text}_{line}\t-2\tPart {line} of {text}.\n" for text in range(60) for line in (1, 2)]
    names = {"movieReviewSnippets": films, "amazonReviewSnippets": goods, "tweets": ["1\t2.2\tYay.\n", "2\t0.1\tHm.\n"]}
    inner = _archive({f"hutto/{name}_GroundTruth.txt": "".join(lines).encode() for name, lines in names.items()})
    sdist = tmp_path / "v.tar.gz"
    sdist.write_bytes(_archive({f"vader/resources/{english_set.ARCHIVE}": inner}))
    monkeypatch.setattr(sys, "argv", ["sentiment_set.py", str(sdist), str(tmp_path / "set")])
    module.main()
    found = {name: [json.loads(line) for line in (tmp_path / "set" / f"{name}.jsonl").open()] for name in
             ("train", "test", "tweets")}  # fmt: skip
    assert found["tweets"] == [{"text": "Yay.", "label": "positive"}]
    train, test = ({row["text"]: row["label"] for row in found[name]} for name in ("train", "test"))
    assert len(train) + len(test) == 400 + 120
    assert not set(train) & set(test)
    assert {**train, **test}["Film 7."] == "positive"
    assert {**train, **test}["Film 8."] == "negative"
    for text in range(60):
        assert (f"Part 1 of {text}." in test) == (f"Part 2 of {text}." in test)
    for page in range(20):  # of film snippets, which may be of one review
        assert len({f"Film {20 * page + line}." in test for line in range(1, 21)}) == 1
    assert 0.1 < len(test) / 520 < 0.45
    assert f"train.jsonl: {len(train)} texts" in capsys.readouterr().out
