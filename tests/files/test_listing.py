"""Which files a path names: existing ones first, patterns, folders by split; and what is said of the unreadable."""

import pytest

from nanochat_hf.files.endings import kind_of
from nanochat_hf.files.listing import is_local, list_local


def make(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}\n")
    return str(folder)


def splits(path, name=None):
    listing = list_local(path, name)
    root = path.split("*")[0].rstrip("/")
    return {split: [f.path.removeprefix(f"{root}/") for f in files] for split, files in listing.splits.items()}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.jsonl.parquet", ("parquet", None)),
        ("a.jsonl_export", None),
        ("A.JSONL", ("lines", None)),
        ("a.tsv.zst", ("tsv", "zstd")),
        ("a.parquet.gz", None),
        ("a.txt.gz", None),
        ("a", None),
    ],
)
def test_the_last_ending_says_how_a_file_is_read(name, kind):
    assert kind_of(name) == kind


def test_a_folder_is_read_by_split_whatever_its_formats(tmp_path):
    root = make(
        tmp_path, "a.jsonl", "b.PARQUET", "deep/er/c.csv", "test.json", "notes.txt", "README.md", ".hidden.jsonl"
    )
    assert splits(root) == {"train": ["a.jsonl", "b.PARQUET", "deep/er/c.csv"], "test": ["test.json"]}
    assert list_local(root).unread == ["notes.txt"]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("data/auxiliary_train-00000-of-00001.parquet", "auxiliary_train"),
        ("validation/x.jsonl", "validation"),
        ("my-dev_2.jsonl", "validation"),
        ("latest.jsonl", "train"),
        ("contest/x.jsonl", "train"),
        ("eval.jsonl", "test"),
    ],
)
def test_a_files_name_tells_its_split(tmp_path, name, split):
    assert splits(make(tmp_path, name)) == {split: [name]}


def test_a_card_says_configurations_and_their_files(tmp_path):
    root = make(tmp_path, "x/one.jsonl", "x/two.jsonl", "y/a.jsonl")
    head = (
        "---\nconfigs:\n- config_name: x\n  data_files:\n  - {split: train, path: x/one*}\n"
        "  - {split: held, path: [x/two.jsonl]}\n"
        "- config_name: y\n  data_dir: y\n---\n"
    )
    (tmp_path / "README.md").write_text(head)
    assert splits(root, "x") == {"train": ["x/one.jsonl"], "held": ["x/two.jsonl"]}
    assert splits(root, "y") == {"train": ["y/a.jsonl"]}
    for name, reason in ((None, "several configurations; give name: one of x, y"), ("z", "no configuration 'z'")):
        with pytest.raises(ValueError, match=reason):
            list_local(root, name)


def test_patterns_and_names_with_brackets(tmp_path):
    root = make(tmp_path, "chats[1].jsonl", "chats1.jsonl", "a/b/c.jsonl", "a/README.md")
    assert splits(f"{root}/chats[1].jsonl") == {"train": [f"{root}/chats[1].jsonl"]}  # the file, not the pattern
    assert splits(f"{root}/**/*.jsonl")["train"] == ["a/b/c.jsonl", "chats1.jsonl", "chats[1].jsonl"]
    assert list_local(f"{root}/a/**").unread == [f"{root}/a/README.md"]


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("notes.txt", "its ending cannot be read; give a file that ends in .jsonl, .ndjson"),
        ("none.jsonl", "no such file"),
        ("*.parquet", "no such file"),
        ("empty", "no file there can be read"),
    ],
)
def test_what_cannot_be_read_is_one_line_with_the_remedy(tmp_path, monkeypatch, path, reason):
    make(tmp_path, "notes.txt")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    assert is_local(path)
    with pytest.raises(ValueError, match=reason):
        list_local(path)


def test_nothing_that_lies_here_is_looked_for_on_the_hub(tmp_path, monkeypatch):
    make(tmp_path, "squad", "org/name")
    monkeypatch.chdir(tmp_path)
    assert is_local("squad") and is_local("org/name") and not is_local("imdb") and not is_local("org/other")
    assert is_local("a/b/c") and is_local("./x") and is_local("/x") and is_local("gone.csv")
