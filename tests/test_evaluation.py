import importlib
import math
import sys
import types
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import OPT, OPTConfig
from models.opt import with_predictors, with_sparse_rows
from sparsellm import evaluation, text
from sparsellm.evaluation import Quality
from sparsellm.predictors import LowRankPredictor
from sparsellm.pruning import MAGNITUDE, prune
from sparsellm.unstructured import compress

VOCAB = 300


class Table(nnx.Module):
    """Logits of the next token from this one, times a variable that is no parameter."""

    def __init__(self, table: np.ndarray):
        self.table = nnx.Param(jnp.asarray(table, jnp.float32))
        self.factor = nnx.Variable(jnp.float32(1))

    def __call__(self, tokens):
        return self.table[...][tokens] * self.factor[...]


class Served(Table):
    """What the adapter asks of a model, though it calls none of it but the model itself."""

    config = types.SimpleNamespace(max_length=8)

    def init_cache(self, *_):
        raise NotImplementedError

    hidden_states = logits = init_cache


@pytest.fixture(scope="module")
def table() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(VOCAB, VOCAB))


@pytest.fixture(scope="module")
def model(table) -> Table:
    return Table(table)


@pytest.fixture(scope="module")
def tokenizer() -> text.Tokenizer:
    return text.train_bpe(["a good film, a bad film. It was great, it was terrible. " * 3], VOCAB)


def log_probabilities(table: np.ndarray) -> np.ndarray:
    """[token, next token], in float64."""
    table = np.asarray(np.asarray(table, np.float32), np.float64)
    top = table.max(-1, keepdims=True)
    return table - top - np.log(np.exp(table - top).sum(-1, keepdims=True))


def reference_quality(table: np.ndarray, windows: np.ndarray) -> Quality:
    """A loop over tokens."""
    scores, hits = [], []
    for window in windows:
        for token, target in zip(window[:-1], window[1:], strict=True):
            scores.append(log_probabilities(table)[token, target])
            hits.append(np.argmax(table[token]) == target)
    loss = -float(np.mean(scores))
    return Quality(loss, math.exp(loss), float(np.mean(hits)), len(scores))


def windows(count: int, length: int, table: np.ndarray) -> np.ndarray:
    """Random tokens, every second of which is the likeliest after the one before."""
    found = np.random.default_rng(1).integers(0, VOCAB, (count, length)).astype(np.int32)
    found[:, 1::2] = np.argmax(table, axis=-1)[found[:, : 2 * (length // 2) : 2]]
    return found


@pytest.mark.parametrize("count", [1, 4, 6])  # less than a batch, just one, and one that is not full
def test_perplexity_is_that_of_a_loop_over_tokens(model, table, count):
    some = windows(count, 9, table)
    found, expected = evaluation.perplexity(model, some, batch=4), reference_quality(table, some)
    assert found == pytest.approx(expected, rel=1e-5)
    assert found.tokens == count * 8 and found.accuracy >= 0.5


def test_another_model_of_the_same_kind_compiles_nothing_and_all_its_variables_count(model, table):
    some = windows(6, 9, table)
    evaluation.perplexity(model, some, batch=4)
    step: Any = evaluation._token_scores
    compiled = step._cache_size()
    other = Table(table[::-1])
    other.factor[...] = jnp.float32(0.5)
    expected = reference_quality(table[::-1] * np.float32(0.5), some)
    assert evaluation.perplexity(other, some, batch=4) == pytest.approx(expected, rel=1e-5)
    assert step._cache_size() == compiled


def test_losses_past_all_bounds(model, table):
    some = windows(4, 9, table)
    hopeless = np.zeros((VOCAB, VOCAB))
    hopeless[:, 299] = 1e4
    found = evaluation.perplexity(Table(hopeless), np.where(some == 299, 0, some), batch=4)
    assert found.loss == pytest.approx(1e4) and found.perplexity == math.inf and found.accuracy == 0
    broken = evaluation.perplexity(Table(np.full((VOCAB, VOCAB), np.nan)), some, batch=4)
    assert math.isnan(broken.loss) and math.isnan(broken.perplexity)


def test_nothing_to_measure_is_refused(model, table):
    with pytest.raises(ValueError, match=r"windows must hold one at least; got shape \(0, 9\)"):
        evaluation.perplexity(model, np.zeros((0, 9), np.int32))
    with pytest.raises(ValueError, match="batch must be at least 1; got batch=0"):
        evaluation.perplexity(model, windows(1, 9, table), batch=0)


# The recipe


def test_the_recipe_is_opt_evals(model, table, tokenizer):
    """The loop of SparseGPT's opt_eval: mean over a window times its length, over all; the tail is dropped."""
    words = "a good film, a bad film. It was great, it was terrible. " * 9
    encoded = np.array(tokenizer.encode(words))
    length = 8
    samples = encoded.size // length
    assert encoded.size % length, "there is to be a tail"
    nlls = []
    for i in range(samples):
        batch = encoded[i * length : (i + 1) * length]
        loss = -np.mean([log_probabilities(table)[a, b] for a, b in zip(batch[:-1], batch[1:], strict=True)])
        nlls.append(loss * length)
    expected = np.exp(np.sum(nlls) / (samples * length))
    found = evaluation.perplexity(model, evaluation.recipe_windows(words, tokenizer, length=length), batch=4)
    assert found.perplexity == pytest.approx(expected, rel=1e-5)
    assert found.tokens == samples * (length - 1)


def test_windows_of_a_text_that_fits_exactly(tokenizer):
    tokens = tokenizer.encode("a good film")
    assert tokens[0] == text.END_OF_TEXT
    np.testing.assert_array_equal(evaluation.recipe_windows("a good film", tokenizer, length=len(tokens)), [tokens])
    message = rf"must fill a window of length={len(tokens) + 1} tokens; got {len(tokens)} tokens"
    with pytest.raises(ValueError, match=message):
        evaluation.recipe_windows("a good film", tokenizer, length=len(tokens) + 1)


def test_rows_are_joined_as_a_data_sets():
    """As `"\\n\\n".join(testdata["text"])`: rows keep their line end, blank ones are empty strings."""
    rows = ["", " = Title = \n", "", " It began\u2028once . \n", "", " The end"]
    assert evaluation.joined_rows(" \n = Title = \n \n It began\u2028once . \n\n The end") == "\n\n".join(rows)
    of_windows = "\r\n = Title = \r\n\r\n It began\u2028once . \r\n\r\n The end"
    assert evaluation.joined_rows(of_windows) == "\n\n".join(rows)


# Continuations


def test_continuations_are_scored_alone(model, table):
    best = np.argmax(table, axis=-1)
    greedy = [int(best[7]), int(best[best[7]])]
    pairs = [([3, 5, 7], greedy), ([7], [*greedy, 11]), ([2], [9]), ([4, 2], [])]
    found = evaluation.continuation_scores(model, pairs, batch=3)
    for (context, continuation), (score, is_greedy) in zip(pairs, found, strict=True):
        whole = [*context, *continuation]
        steps = [(whole[i - 1], whole[i]) for i in range(len(context), len(whole))]
        assert score == pytest.approx(sum(log_probabilities(table)[a, b] for a, b in steps), rel=1e-5)
        assert is_greedy == all(best[a] == b for a, b in steps)
    assert [is_greedy for _, is_greedy in found] == [True, False, False, True]


class Longest(nnx.Module):
    """Refuses to read more than 8 tokens, and predicts how many of them are 5."""

    def __call__(self, tokens):
        assert tokens.shape[1] <= 8
        distance = jnp.abs(jnp.cumsum(tokens == 5, axis=1)[..., None] - jnp.arange(10)[None, None])
        return -1e3 * distance.astype(jnp.float32)


def test_a_context_that_is_too_long_loses_its_start():
    pairs = [([5, 5, 5, 5, 9, 9, 9, 9], [6, 7]), ([5] * 20, [8])]  # read: 5 5 5 9 9 9 9 6, and eight times 5
    (first, _), (second, is_greedy) = evaluation.continuation_scores(Longest(), pairs, max_length=8, batch=2)
    assert first == pytest.approx(-1e3 * (3 + 4)) and (second, is_greedy) == (0, True)
    with pytest.raises(ValueError, match="at most max_length=8 tokens; got 9"):
        evaluation.continuation_scores(Longest(), [([2], [3] * 9)], max_length=8)
    with pytest.raises(ValueError, match="must hold one token at least"):
        evaluation.continuation_scores(Longest(), [([], [3])])
    assert evaluation.continuation_scores(Longest(), []) == []


# SST-2


class Critic(nnx.Module):
    """Likes what holds the token `good`: then ` great` is likelier than ` terrible`."""

    def __init__(self, tokenizer: text.Tokenizer):
        self.ids = tuple(tokenizer.encode(word)[1] for word in (" good", " great", " terrible"))

    def __call__(self, tokens):
        good, great, terrible = self.ids
        liked = (jnp.cumsum(tokens == good, axis=1) > 0).astype(jnp.float32)
        logits = jnp.zeros((*tokens.shape, VOCAB), jnp.float32)
        return logits.at[..., great].set(5 * liked).at[..., terrible].set(5 * (1 - liked))


def test_the_probe_finds_what_a_critic_thinks(tokenizer, tmp_path):
    assert all(len(tokenizer.encode(word)) == 2 for word in (" good", " great", " terrible"))
    path = tmp_path / "dev.tsv"
    rows = [
        'a good "film \t1',
        "a bad film\t0",
        "it was good\t0",
        "film\t0",
        "a film\t1",
    ]
    path.write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    assert evaluation.sst2(Critic(tokenizer), tokenizer, path, batch=4) == 3 / 5
    turned = evaluation.sst2(Critic(tokenizer), tokenizer, path, labels=(" great", " terrible"), batch=4)
    assert turned == 2 / 5


@pytest.mark.parametrize(
    "content,message",
    [
        ("text\tlabel\nfine\t1\n", "must have the columns sentence and label; got text, label"),
        ("sentence,label\nfine,1\n", "got sentence,label"),
        ("", "must have the columns sentence and label; got "),
        ("sentence\tlabel\n", "must hold one example at least"),
        ("sentence\tlabel\nfine\t1\nbad\t2\n", "label must be 0 or 1; got '2' in line 3"),
        ("sentence\tlabel\nfine\n", "label must be 0 or 1; got None in line 2"),
    ],
)
def test_a_table_that_is_not_sst2_is_refused(tokenizer, tmp_path, content, message):
    path = tmp_path / "dev.tsv"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        evaluation.sst2(Critic(tokenizer), tokenizer, path)
    with pytest.raises(FileNotFoundError):
        evaluation.sst2(Critic(tokenizer), tokenizer, tmp_path / "missing.tsv")


# The adapter, on a harness that is not there


class Hook:
    def __init__(self):
        self.seen: list[tuple] = []

    def add_partial(self, *found):
        self.seen.append(found)


class FakeLM:
    def __init__(self):
        self.cache_hook = Hook()


@pytest.fixture
def adapter(monkeypatch):
    """The adapter's module, with as much of lm_eval as it asks for."""
    api, model = types.ModuleType("lm_eval.api"), types.ModuleType("lm_eval.api.model")
    setattr(model, "LM", FakeLM)  # noqa: B010 - a module that is made here has no such attribute for pyright
    for name, module in (("lm_eval", types.ModuleType("lm_eval")), ("lm_eval.api", api), ("lm_eval.api.model", model)):
        monkeypatch.setitem(sys.modules, name, module)
    yield importlib.import_module("sparsellm.lm_eval_adapter")
    del sys.modules["sparsellm.lm_eval_adapter"]


def requests(*args: tuple) -> list[Any]:
    return [types.SimpleNamespace(args=args) for args in args]


def test_the_adapter_scores_continuations(adapter, table, tokenizer):
    harness = adapter.HarnessModel(Served(table), tokenizer, batch=2)
    asked = requests(("a good", " film"), ("", "It was"), ("it was ", "great"))
    found = harness.loglikelihood(asked)
    for (context, continuation), (score, _) in zip((r.args for r in asked), found, strict=True):
        whole, before = tokenizer.encode(context + continuation), len(tokenizer.encode(context.rstrip()))
        steps = [log_probabilities(table)[whole[i - 1], whole[i]] for i in range(before, len(whole))]
        assert len(steps) >= 1 and score == pytest.approx(sum(steps), rel=1e-5)
    assert [seen[:2] for seen in harness.cache_hook.seen] == [("loglikelihood", r.args) for r in asked]


def test_rolling_windows_have_as_much_context_as_there_is_room(adapter, table, tokenizer):
    harness = adapter.HarnessModel(Served(table), tokenizer)
    harness.max_length = 4
    assert harness._rolling([99, *range(10)]) == [  # the example in the harness's own documentation
        ([99], [0, 1, 2, 3]),
        ([3], [4, 5, 6, 7]),
        ([5, 6, 7], [8, 9]),
    ]
    harness.max_length = 8
    words = "a good film, a bad film. It was great"
    tokens = tokenizer.encode(words)
    assert len(tokens) > 9
    expected = [sum(log_probabilities(table)[a, b] for a, b in zip(tokens, tokens[1:], strict=False)), 0.0]
    assert harness.loglikelihood_rolling(requests((words,), ("",))) == pytest.approx(expected, rel=1e-5)


def test_the_adapter_generates_up_to_a_stop(adapter, table, tokenizer, monkeypatch):
    called = []

    def generate(model, prompts, *, max_new_tokens, temperature, key):
        called.append((len(prompts), max_new_tokens, temperature))
        assert all(len(prompt) + max_new_tokens <= 8 for prompt in prompts)
        return [tokenizer.encode(" film. It was great")[1:] for _ in prompts]

    monkeypatch.setattr(adapter, "generate", generate)
    harness = adapter.HarnessModel(Served(table), tokenizer, batch=2)
    greedy = {"until": ["great", "."], "max_gen_toks": 4}
    asked = requests(
        ("a good", greedy),
        ("a bad film, a bad film, a bad film", greedy),
        ("it", {"until": " It", "max_new_tokens": 4, "temperature": 0.7}),
        ("it", greedy | {"do_sample": False, "temperature": 0.7, "until": ["great"]}),
    )
    assert harness.generate_until(asked) == [" film", " film", " film.", " film. It was "]
    assert called == [(2, 4, 0.0), (1, 4, 0.0), (1, 4, 0.7)]
    with pytest.raises(ValueError, match="max_gen_toks must be less than max_length=8; got 256"):
        harness.generate_until(requests(("it", {})))


def test_one_function_evaluates_every_kind_of_model():
    """Masked, compressed, with micro-tiles skipped and with predicted neurons: the same weights, as much perplexity."""
    rngs = nnx.Rngs(0)
    config = OPTConfig(vocab_size=VOCAB, layers=1, d_model=32, heads=2, d_ff=64, max_length=24, init_std=0.2)
    model = OPT(config, rngs=rngs)
    windows = np.random.default_rng(0).integers(4, VOCAB, (4, 21)).astype(np.int32)
    unpruned = evaluation.perplexity(model, windows, batch=2)
    prune(model, MAGNITUDE, sparsity=0.6)
    dense = evaluation.perplexity(model, windows, batch=2)
    assert abs(dense.perplexity / unpruned.perplexity - 1) > 1e-2  # pruning shows
    every, none = ([LowRankPredictor(32, 4, 64, threshold=t, rngs=rngs)] for t in (-math.inf, math.inf))
    predicted = {name: with_predictors(model, p, "mask_everywhere") for name, p in (("every", every), ("none", none))}
    compressed = nnx.clone(model)
    compress(compressed)
    kinds = {"micro-tiles": with_sparse_rows(model, 8), "predicted": predicted["every"], "compressed": compressed}
    for name, kind in kinds.items():
        found = evaluation.perplexity(kind, windows, batch=2)
        assert found.perplexity == pytest.approx(dense.perplexity, rel=1e-5), name
    wrong = evaluation.perplexity(predicted["none"], windows, batch=2)
    assert abs(wrong.perplexity / dense.perplexity - 1) > 1e-2
