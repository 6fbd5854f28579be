import gzip
import json
import lzma
import shutil
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsellm import text

ROSES = "a rose is a rose is a rose\n"


@pytest.fixture(scope="module")
def tokenizer() -> text.Tokenizer:
    return text.train_bpe([ROSES * 20, "Ünïcödé 日本語 🙂 </s> <pad>\n" * 3], 280)


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_survives_and_none_makes_a_special_token(tokenizer, written):
    ids = tokenizer.encode(written)
    assert ids[0] == text.END_OF_TEXT
    assert min(ids[1:], default=4) >= 4
    assert tokenizer.decode(ids) == written


@pytest.mark.parametrize("written", ["</s>", "<s><pad><unk></s>", "\0\r\n\t ", "é", "\u200b\ufeff", ""])
def test_awkward_texts_survive(tokenizer, written):
    assert tokenizer.decode(tokenizer.encode(written)) == written


def test_merges_are_applied_in_their_order(tmp_path):
    """By hand: with the merges a+b, ab+c, Ġ+ab, the text "abc ab c" is [abc][Ġab][Ġ][c]."""
    tokens = [*text.SPECIAL_TOKENS, "a", "b", "c", "Ġ", "ab", "abc", "Ġab"]
    (tmp_path / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\nab c\nĠ ab\n")
    tokenizer = text.load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == 11
    assert tokenizer.encode("abc ab c") == [2, 9, 10, 7, 6]
    assert tokenizer.decode([2, 9, 10, 7, 6, 2, 1, 5000]) == "abc ab c"


def test_a_bpe_learns_the_commonest_pair_first():
    tokenizer = text.train_bpe(["aab " * 9 + "cb"], 261)
    assert len(tokenizer.encode("aab")) - 1 == 2  # aa+b or a+ab: one merge was learnt
    assert len(tokenizer.encode("cb")) - 1 == 2


def test_training_again_gives_the_same_tokenizer(tmp_path, tokenizer):
    again = text.train_bpe([ROSES * 20, "Ünïcödé 日本語 🙂 </s> <pad>\n" * 3], 280)
    for name, made in (("one", tokenizer), ("two", again)):
        made.save(tmp_path / name)
    assert (tmp_path / "one" / "merges.txt").read_bytes() == (tmp_path / "two" / "merges.txt").read_bytes()


def test_save_and_load(tmp_path, tokenizer):
    tokenizer.save(tmp_path)
    loaded = text.load_tokenizer(tmp_path)
    assert loaded.vocab_size == tokenizer.vocab_size == 280
    assert loaded.encode(ROSES) == tokenizer.encode(ROSES)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings["bos_token"] == "</s>" and settings["pad_token"] == "<pad>"


@pytest.mark.parametrize("join", [" ".join, list], ids=["old", "new"])
def test_tokenizer_json_reads_the_same(tmp_path, tokenizer, join):
    tokenizer.save(tmp_path)
    vocab = json.loads((tmp_path / "vocab.json").read_text())
    merges = [join(line.split(" ")) for line in (tmp_path / "merges.txt").read_text().splitlines()[1:]]
    model = {"type": "BPE", "vocab": vocab, "merges": merges}
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "tokenizer.json").write_text(json.dumps({"model": model}))
    assert text.load_tokenizer(tmp_path / "new").encode(ROSES) == tokenizer.encode(ROSES)


def test_encode_documents_is_encode_one_after_the_other(tokenizer):
    documents = [ROSES, "", "a rose"]
    ids = tokenizer.encode_documents(documents)
    assert ids.dtype == np.int32
    assert ids.tolist() == [i for document in documents for i in tokenizer.encode(document)]


def test_wrong_tokenizers_are_refused(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="vocab_size must be at least 260.*got vocab_size=100"):
        text.train_bpe([ROSES], 100)
    with pytest.raises(FileNotFoundError, match="has neither"):
        text.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "Unigram"}}')
    with pytest.raises(ValueError, match="must hold a BPE model; got Unigram"):
        text.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(ValueError, match="must be JSON"):
        text.load_tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text('{"<s>": 1, "a": 0}')
    (tmp_path / "merges.txt").write_text("")
    with pytest.raises(ValueError, match="must have ids 0 to 3"):
        text.load_tokenizer(tmp_path)
    shutil.rmtree(tmp_path)
    tokenizer.save(tmp_path)
    (tmp_path / "merges.txt").write_text("x nothing\n")
    with pytest.raises(ValueError, match="a merge must join two tokens"):
        text.load_tokenizer(tmp_path)


def test_a_folder_is_read_in_order_without_what_is_not_text(tmp_path):
    (tmp_path / "sub" / "skip").mkdir(parents=True)
    (tmp_path / ".git").mkdir()
    for name, content in {
        "b.txt": b"bee",
        "a.txt": "ä".encode(),
        "sub/c.txt": b"sea",
        "sub/skip/d.txt": b"not wanted",
        ".git/e.txt": b"hidden",
        "image.txt": b"\x89PNG\0\xff",
        "latin.txt": "ä".encode("latin-1"),
        "empty.txt": b" \n",
        "other.md": b"other",
    }.items():
        (tmp_path / name).write_bytes(content)
    corpus = text.read_corpus(tmp_path, pattern="*.txt", exclude=("skip",))
    assert corpus.documents == ("ä", "bee", "sea")
    assert [path.name for path in corpus.skipped] == ["image.txt", "latin.txt"]


def test_a_file_is_cut_into_documents_and_may_be_compressed(tmp_path):
    written = "0123456789ä" * 4000
    for name, opener in {"plain.txt": open, "small.txt.xz": lzma.open, "small.txt.gz": gzip.open}.items():
        with opener(tmp_path / name, "wt", encoding="utf-8") as file:
            file.write(written)
        corpus = text.read_corpus(tmp_path / name)
        assert len(corpus.documents) == 3
        assert "".join(corpus.documents) == written


def test_lines_of_jsonl_are_documents(tmp_path):
    documents = ["one\u2028line", "Two\nlines"]  # what str.splitlines would take for the end of a line
    lines = [json.dumps({"text": document, "url": "x"}, ensure_ascii=False) for document in documents]
    (tmp_path / "c4.jsonl.xz").write_bytes(lzma.compress("\n".join([*lines, ""]).encode()))
    assert text.read_corpus(tmp_path / "c4.jsonl.xz").documents == tuple(documents)
    for wrong in ("{", '"text"', '{"url": "x"}', '{"text": 3}', "[1]"):
        (tmp_path / "wrong.jsonl").write_text(f"{lines[1]}\n{wrong}\n")
        with pytest.raises(ValueError, match=r'must be an object with a "text"; line 2 of .*wrong.jsonl is not'):
            text.read_corpus(tmp_path / "wrong.jsonl")


def test_wrong_corpora_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no .*missing"):
        text.read_corpus(tmp_path / "missing")
    with pytest.raises(ValueError, match="a corpus must hold text"):
        text.read_corpus(tmp_path)
    for name, content, message in [
        ("empty", b"", "a corpus must hold text"),
        ("blank", b"\n \n", "a corpus must hold text"),
        ("nul", b"text\0text", "holds a NUL byte at character 4"),
        ("latin", "caf\u00e9".encode("latin-1"), "must be UTF-8 text; .*latin is not, at byte 3"),
        ("cut.xz", lzma.compress(b"a" * 1000)[:-20], "not a whole .xz file"),
        ("not.gz", b"plain", "not a whole .gz file"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            text.read_corpus(tmp_path / name)


@given(count=st.integers(2, 50), held_out=st.floats(0.001, 0.999), seed=st.integers(0, 9))
def test_a_split_puts_every_document_on_one_side(count, held_out, seed):
    documents = [f"document {i}" for i in range(count)]
    train, held = text.split_documents(documents, held_out=held_out, seed=seed)
    assert train and held
    assert sorted(train + held) == sorted(documents)
    assert abs(len(held) - held_out * count) <= 1
    assert text.split_documents(documents, held_out=held_out, seed=seed) == (train, held)


def test_a_corpus_too_small_to_split_is_refused():
    with pytest.raises(ValueError, match="at least 2 documents.*got 1: give a larger corpus"):
        text.split_documents(["one"], held_out=0.5, seed=0)
    with pytest.raises(ValueError, match="held_out must be a fraction.*got held_out=1.0"):
        text.split_documents(["one", "two"], held_out=1.0, seed=0)


@given(tokens=st.integers(2, 60), length=st.integers(1, 12))
def test_windows_predict_every_token_once(tokens, length):
    ids = np.arange(tokens, dtype=np.int32)
    if tokens < length + 1:
        with pytest.raises(ValueError, match=f"needs {length + 1} tokens; got {tokens} tokens"):
            text.token_windows(ids, length=length)
        return
    windows = text.token_windows(ids, length=length)
    targets = windows[:, 1:].ravel()
    assert targets.tolist() == list(range(1, len(targets) + 1))
    assert tokens - 1 - len(targets) < length
    np.testing.assert_array_equal(windows[:, :-1] + 1, windows[:, 1:])


@pytest.mark.parametrize(("windows", "batch"), [(7, 3), (8, 4), (2, 5), (1, 1)])
def test_every_epoch_covers_every_window_in_an_order_of_its_own(windows, batch):
    epochs = 6
    batches = text.ShuffledBatches(np.arange(windows, dtype=np.int32)[:, None], batch=batch, seed=3)
    seen = np.concatenate([batches[step].ravel() for step in range(-(-windows * epochs // batch))])
    orders = seen[: windows * epochs].reshape(epochs, windows)
    for order in orders:
        assert Counter(order.tolist()) == Counter(range(windows))
    if windows > 2:
        assert len({tuple(order) for order in orders.tolist()}) > 1


def test_a_batch_is_a_pure_function_of_seed_and_step():
    windows = np.arange(50, dtype=np.int32)[:, None]
    first, second = (text.ShuffledBatches(windows, batch=4, seed=1) for _ in range(2))
    forwards = [first[step] for step in range(30)]
    backwards = [second[step] for step in reversed(range(30))][::-1]
    np.testing.assert_array_equal(forwards, backwards)
    other = text.ShuffledBatches(windows, batch=4, seed=2)
    assert not np.array_equal(forwards, [other[step] for step in range(30)])
