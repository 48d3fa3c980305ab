"""The data side of common.py: reading, windows, batches, metrics, losses, downloads.

The oracles share no code with common.py: numbers worked out by hand (the working is in the comments), brute force, closed formulas in
numpy, and the plain transformers tokenizer and model. The BERT used is made here, so nothing depends on mini/.
"""
import argparse, contextlib, http.server, itertools, json, math, threading, types, unicodedata, zipfile

import numpy as np
import pytest
import torch
from transformers import (AutoTokenizer, BertConfig, BertForQuestionAnswering, BertForSequenceClassification, BertModel,
                          BertTokenizerFast)

import common
import tasks

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


# ---- helpers

def config(**more):
    """2 layers, hidden 16, intermediate 32; wide initial weights, so that different texts get visibly different logits."""
    sizes = dict(vocab_size=4096, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, initializer_range=0.4,
                 max_position_embeddings=512, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return BertConfig(**sizes | more)


@pytest.fixture(scope="session")
def bert(tmp_path_factory):
    """A folder with a tiny BERT: characters, their ## pieces, a few common letters beyond ASCII, and the words w0 ... w2999."""
    folder = tmp_path_factory.mktemp("bert")
    characters = [chr(c) for c in range(33, 127) if not chr(c).isupper()] + list("æøßı–—’“”«»東京€°")
    vocab = SPECIAL + characters + ["##" + c for c in characters if c.isalnum()] + [f"w{i}" for i in range(3000)]
    BertTokenizerFast(vocab={w: i for i, w in enumerate(vocab)}, do_lower_case=True).save_pretrained(folder)
    torch.manual_seed(0)
    BertModel(config()).save_pretrained(folder)
    return folder


@pytest.fixture
def make_task(bert, tmp_path):
    """make_task(name, length=..., ...) -> common.Task on the files under tmp_path, through a real Run."""
    def make(name, length=384, epochs=1.0, **flags):
        args = dict(task=name, sparsity=1.0, preset="mini", model=str(bert), data=str(tmp_path), teacher=None, out=str(tmp_path / "out"),
                    resume=False, seed=0, steps=None, batch_size=4, lr=1e-3, device="cpu")
        return common.Task(common.Run("magnitude.py", argparse.Namespace(**args | flags), {"mini": {"*": dict(length=length, epochs=epochs)}}))
    return make


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
    return path


def write_squad(path, rows):
    """rows: [(question, context, [(answer, offset)])], one paragraph a row."""
    paragraphs = [dict(context=c, qas=[dict(id=f"q{i}", question=q, answers=[dict(text=t, answer_start=s) for t, s in answers])])
                  for i, (q, c, answers) in enumerate(rows)]
    return write(path, json.dumps(dict(version="1.1", data=[dict(title="t", paragraphs=paragraphs)])))


def read(task, path):
    files = common.TASKS[task]
    return common.read_tsv(path, files.texts, files.label, files.labels)


@contextlib.contextmanager
def mistake(path, *words):
    """Expects a Mistake of one line which names the file and says each of words."""
    with pytest.raises(common.Mistake) as info:
        yield
    text = str(info.value)
    assert "\n" not in text and str(path) in text and all(word in text for word in words), text


# ---- SQuAD's metrics

# answer | golds | exact match | F1. The official script lower-cases, deletes the 32 ASCII characters of string.punctuation, replaces the
# words a, an, the by a space, splits on white space, and takes the best over the golds: of EM and of F1 each for itself.
EM_F1 = [
    ("The Cat!", ["cat"], 1, 1),                              # article, case, punctuation
    ("a theme", ["theme"], 1, 1),                             # "the" goes as a word only: theme stays whole
    ("theme", ["me"], 0, 0),                                  # ... nor does a word lose its front
    ("cobra", ["cobr"], 0, 0),                                # ... or its back
    ("the-cat", ["thecat"], 1, 1),                            # "-" is deleted before articles are looked for: thecat
    ("U.S.A.", ["usa"], 1, 1),                                # full stops are deleted, not replaced by spaces
    ("3.5", ["35"], 1, 1),                                    # ... in numbers too
    ("New  York\tCity\n", ["new york city"], 1, 1),           # white space of any kind and length
    ("red blue green", ["red green"], 0, 4 / 5),              # same 2, precision 2/3, recall 2/2: F1 = 2*2/(3+2)
    ("red red blue", ["red blue blue"], 0, 2 / 3),            # repeated words: same = min(2,1) red + min(1,2) blue = 2: F1 = 4/6
    ("blue red", ["red blue"], 0, 1),                         # order counts for EM only
    ("red", ["blue", "red wine", "Red."], 1, 1),              # best of several golds, the last one
    ("red wine", ["red", "old red wine bar"], 0, 2 / 3),      # golds: 2*1/(2+1) = 2/3 and 2*2/(2+4) = 2/3
    ("big red", ["red", "a big red, dog"], 0, 4 / 5),         # golds: 2*1/(2+1) = 2/3 and 2*2/(2+3) = 4/5: the second
    ("", ["red"], 0, 0),                                      # empty prediction
    ("the", ["red"], 0, 0),                                   # a prediction that normalises to nothing
    ("red", ["the"], 0, 0),                                   # a gold that does
    ("", ["The", "red"], 1, 0),                               # both do: equal strings, EM 1; but no common word, and v1.1 then says F1 0
    ("?!", ["an"], 1, 0),
    ("“red”", ["red"], 0, 0),                                 # curly quotes are not ASCII punctuation: they stay on the word
    ("rock’s", ["rock's"], 0, 0),                             # rock’s against rocks
    ("the ’a’ team", ["’ ’ team"], 1, 1),                     # ’ is no letter, so the a between two of them is a word, and goes
    ("Café", ["cafe"], 0, 0),                                 # accents stay ...
    ("CAFÉ", ["café"], 1, 1),                                 # ... through lower-casing
    ("cafe\u0301", ["caf\u00e9"], 0, 0),                      # no normalisation: composed and decomposed differ
    ("à la carte", ["la carte"], 0, 4 / 5),                   # à is a letter of its own, no article: 2*2/(3+2)
    ("20\u00a0km", ["20 km"], 1, 1),                          # a non-breaking space splits like a space
    ("the\u00a0cat", ["cat"], 1, 1),                          # ... and bounds an article
    ("1990–1995", ["1990-1995"], 0, 0),                       # en dash stays, hyphen goes: 1990–1995 against 19901995
    ("1990 – 1995", ["1990 1995"], 0, 4 / 5),                 # a free en dash is a word: 2*2/(3+2)
    ("$5_000", ["5000"], 1, 1),                               # $ and _ are punctuation, € is not:
    ("€5,000", ["5000"], 0, 0),
]


@pytest.mark.parametrize("answer, golds, em, f1", EM_F1)
def test_em_f1_by_hand(answer, golds, em, f1):
    assert tasks.em_f1(answer, golds) == pytest.approx((em, f1))


def test_squad_metrics_take_the_best_window_of_each_question():
    """Percent means over questions, each answered by the window of highest score, wherever among the windows it is."""
    rows = [("x", "?", "red green blue", [("blue", 10)]), ("y", "?", "one two three", [("two three", 4), ("three", 8)])]
    windows = [(0, (1.0, 0, 3)), (0, (2.5, 10, 14)), (0, (-9.0, 4, 9)), (1, (-3.0, 4, 13)), (1, (-2.0, 0, 7))]
    for order in itertools.permutations(windows):
        features, spans = [dict(row=row) for row, _ in order], [span for _, span in order]
        # blue: EM 1, F1 1. "one two": EM 0, F1 best of 2*1/(2+2) and 0. Means: 50 and 75.
        assert common.squad_metrics(rows, features, spans) == pytest.approx({"EM": 50.0, "F1": 75.0})


def brute_best(starts, ends, spans):
    """The largest starts[i] + ends[j] over all pairs i <= j < i + 30 of context tokens; and all the pairs that reach it."""
    inside = [i for i, span in enumerate(spans) if span]
    pairs = [(starts[i] + ends[j], i, j) for i in inside for j in inside if i <= j < i + 30]
    top = max(score for score, _, _ in pairs)
    return top, {(spans[i][0], spans[j][1]) for score, i, j in pairs if score == top}


@pytest.mark.parametrize("kind", ["random", "ties", "far apart"])
def test_best_spans_by_brute_force(kind):
    """Windows of several lengths, padded to the longest; the question and the padding hold the largest logits of all."""
    rng, width = np.random.default_rng(len(kind)), 70
    for _ in range(8):
        features = []
        for n in (width, 41, 9, 4):                             # question of 3 tokens, then the context, then [SEP]
            features.append(dict(spans=[None] * (2 if n == 4 else 3) + [(5 * i, 5 * i + 4) for i in range(n - (3 if n == 4 else 4))] + [None]))
        starts, ends = (rng.integers(0, 3, (4, width)) if kind == "ties" else rng.normal(size=(4, width)) for _ in range(2))
        starts, ends = starts.astype(np.float32), ends.astype(np.float32)
        if kind == "far apart":                                 # ends at the front, starts at the back: most good pairs are forbidden
            starts += np.arange(width, dtype=np.float32) * rng.choice([-1, 1])
            ends -= np.arange(width, dtype=np.float32) * rng.choice([-1, 1])
        for i, feature in enumerate(features):
            outside = [not s for s in feature["spans"]] + [True] * (width - len(feature["spans"]))
            starts[i, outside] = ends[i, outside] = 99
        got = common.best_spans(torch.from_numpy(starts), torch.from_numpy(ends), features)
        for i, (score, a, b) in enumerate(got):
            top, places = brute_best(starts[i], ends[i], features[i]["spans"])
            assert score == pytest.approx(float(top)) and (a, b) in places


def test_best_spans_limit_is_30_tokens_to_the_letter():
    """Token 0 to token 29 is a span of 30 tokens and allowed; to token 30 is not."""
    feature = dict(spans=[(i, i + 1) for i in range(50)])
    for last, allowed in ((29, True), (30, False)):
        starts, ends = torch.zeros(1, 50), torch.zeros(1, 50)
        starts[0, 0], ends[0, last] = 5, 4
        score, a, b = common.best_spans(starts, ends, [feature])[0]
        assert (score == 9) == allowed and ((a, b) == (0, last + 1)) == allowed


def test_best_spans_without_context_answers_nothing():
    """A window whose context left no token has no span: the empty answer, with a score below every other's."""
    score, a, b = common.best_spans(torch.ones(1, 5), torch.ones(1, 5), [dict(spans=[None] * 5)])[0]
    assert a == b and score == -math.inf


# ---- SQuAD's windows

ODD = ("The Ærøskøbing ferry – “built” in 1895 – cost €5\u00a0000; naïve café-goers’ cafe\u0301, İstanbul, ﬁne 東京 and 한국 😀 trips.\u2028"
       "Zero\u200bwidth, tab\there, soft\u00adhyphen, Straße, q̣̇ and\u3000wide «quotes» 12° end. ") * 6


def plain(text):
    """What BERT's uncased vocabulary sees of a piece of text, by Python's own unicode tables."""
    text = "".join(c for c in unicodedata.normalize("NFD", text) if unicodedata.category(c) != "Mn").lower()
    return "".join(c for c in text if unicodedata.category(c) not in ("Cc", "Cf"))


@pytest.mark.parametrize("context", [" ".join(f"w{i}" for i in range(1000)), ODD], ids=["long", "odd unicode"])
@pytest.mark.parametrize("length", [384, 40])
def test_windows_cover_the_context_and_map_back(make_task, tmp_path, bert, context, length):
    """Windows tile the tokens of the context in order, 128 apart where a window is long enough; spans are those of its characters."""
    write_squad(tmp_path / "squad/train-v1.1.json", [("w5 w6 ?", context, [(context[:3].strip(), 0)])])
    write_squad(tmp_path / "squad/dev-v1.1.json", [("w5 ?", "w1 w2", [("w1", 0)])])
    features, tokenizer = make_task("squad", length).train, AutoTokenizer.from_pretrained(bert)
    whole = tokenizer(context, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = whole["input_ids"], [tuple(s) for s in whole["offset_mapping"]]
    question, at, starts, covered = tokenizer("w5 w6 ?", add_special_tokens=False)["input_ids"], 0, [], set()
    for f in features:
        head = [tokenizer.cls_token_id, *question, tokenizer.sep_token_id]
        piece = f["input_ids"][len(head):-1]
        assert f["input_ids"] == [*head, *piece, tokenizer.sep_token_id] and len(f["input_ids"]) <= length
        assert f["token_type_ids"] == [0] * len(head) + [1] * (len(piece) + 1)
        at = next(k for k in range(at, len(ids)) if ids[k:k + len(piece)] == piece
                  and [tuple(s) for s in f["spans"][len(head):-1]] == offsets[k:k + len(piece)])
        assert len(f["spans"]) == len(f["input_ids"]) and not any(f["spans"][:len(head)]) and not f["spans"][-1]
        starts.append(at)
        covered |= set(range(at, at + len(piece)))
        for token, (a, b) in zip(tokenizer.convert_ids_to_tokens(piece), f["spans"][len(head):-1]):
            assert token == "[UNK]" or token.removeprefix("##") == plain(context[a:b])
    assert covered == set(range(len(ids))) and len(features) > 1
    assert all(len(f["input_ids"]) == length for f in features[:-1])        # only the last window may be short
    steps = set(np.diff(starts))
    assert steps == {128} if length == 384 else 0 < max(steps) < length - 6     # the short ones overlap
    # every character that is neither white space nor one BERT drops lies in a span: nothing of the context is lost
    inside = {k for a, b in offsets for k in range(a, b)}
    assert all(k in inside or not plain(context[k]).strip() for k in range(len(context)))


@pytest.mark.parametrize("tokens", [317, 318, 400, 445, 446])
def test_windows_are_those_of_the_plain_tokenizer(make_task, tmp_path, bert, tokens):
    """Token for token what transformers' own overflow makes with an overlap of room - 128; 445 = 317 + 128 fits exactly two windows."""
    question, context = " ".join(f"w{i}" for i in range(64)), " ".join(f"w{i}" for i in range(100, 100 + tokens))
    for name in ("train", "dev"):
        write_squad(tmp_path / f"squad/{name}-v1.1.json", [(question, context, [("w100", 0)])])
    features, tokenizer = make_task("squad", 384).train, AutoTokenizer.from_pretrained(bert)
    want = tokenizer(question, context, truncation="only_second", max_length=384, stride=384 - 67 - 128, return_overflowing_tokens=True)
    assert [f["input_ids"] for f in features] == want["input_ids"]
    assert [f["token_type_ids"] for f in features] == want["token_type_ids"]
    assert len(features) == 1 + math.ceil(max(0, tokens - 317) / 128)


def test_answer_positions_decode_to_the_answer(make_task, tmp_path):
    """In each window: the whole first answer's tokens, or [CLS] (0) where the window lacks any of it. Offsets are sought by hand.

    One flaw is the tokenizer's own and is let pass: a combining accent at the end of a word (no answer of SQuAD 1.1 has one) is in no token."""
    words = [f"w{i}" for i in range(900)]
    long = " ".join(words)
    rows = [("w1", long, [(text, (" " + long).index(f" {text} "))]) for text in
            ("w0", "w1 w2", "w130", "w378 w379 w380 w381", "w379", " ".join(words[250:290]), "w898")]
    rows += [("w1", ODD, [(text, ODD.index(text, 200))]) for text in ("Ærøskøbing", "“built”", "naïve café", "cafe\u0301", "İstanbul", "한국", "😀",
                                                                   "Straße", "width", "q̣̇ and\u3000wide", "12°", "ﬁne 東京")]
    rows += [("w1", "w7 w8 w7", [("w7", 6), ("w8", 3)])]                                        # the first answer, by offset and not by text
    for name in ("train", "dev"):
        write_squad(tmp_path / f"squad/{name}-v1.1.json", rows)
    task, whole = make_task("squad", 384), {n: 0 for n in range(len(rows))}
    for f in task.train:
        _, context, [(answer, at), *_] = rows[f["row"]]
        a, b = f["start_positions"], f["end_positions"]
        spans = [s for s in f["spans"] if s]
        if spans[0][0] <= at and at + len(answer) <= spans[-1][1]:
            whole[f["row"]] += 1
            assert f["spans"][a][0] == at and context[f["spans"][a][0]:f["spans"][b][1]] == answer.rstrip("\u0301")
        else:
            assert a == b == 0
    assert min(whole.values()) >= 1 and any(f["start_positions"] == 0 for f in task.train)
    # one token of w0..w899 a word, room 384 - 1 - 3 = 380: window 0 holds w0..w379, so w380 is the first it lacks
    first = {f["row"]: f for f in reversed(task.train)}
    assert first[3]["start_positions"] == first[3]["end_positions"] == 0 and first[4]["end_positions"] == 3 + 379


def test_answer_inside_a_word_takes_the_whole_tokens(make_task, tmp_path):
    """Annotators cut words: the tokens that touch the answer are it. An answer of characters BERT drops points at [CLS]."""
    rows = [("w1", "w11 w22 w33", [("2 w3", 6)]), ("w1", "w11 \u200b w22", [("\u200b", 4)])]
    for name in ("train", "dev"):
        write_squad(tmp_path / f"squad/{name}-v1.1.json", rows)
    cut, dropped = make_task("squad").train
    assert (cut["start_positions"], cut["end_positions"]) == (4, 5)             # [CLS] w1 [SEP] w11 w22 w33 [SEP]
    assert (dropped["start_positions"], dropped["end_positions"]) == (0, 0)


def test_questions_are_cut_at_64_tokens(make_task, tmp_path, bert):
    """Of a question of 90 tokens the first 64 stay, as in BERT's own code, and the answer is found behind them."""
    question = " ".join(f"w{i}" for i in range(90))
    for name in ("train", "dev"):
        write_squad(tmp_path / f"squad/{name}-v1.1.json", [(question, "w500 w501 w502", [("w501", 5)])])
    [f] = make_task("squad").train
    tokens = AutoTokenizer.from_pretrained(bert).convert_ids_to_tokens(f["input_ids"])
    assert tokens == ["[CLS]", *(f"w{i}" for i in range(64)), "[SEP]", "w500", "w501", "w502", "[SEP]"]
    assert f["start_positions"] == f["end_positions"] == 67 and f["spans"][67] == (5, 9)


def test_length_never_exceeds_the_model(make_task, tmp_path, bert):
    """A BERT has 512 positions: a longer length is cut to them."""
    for name in ("train", "dev"):
        write_squad(tmp_path / f"squad/{name}-v1.1.json", [("w1", " ".join(f"w{i}" for i in range(700)), [("w0", 0)])])
    assert [len(f["input_ids"]) for f in make_task("squad", 2000).train][:1] == [512]


class Oracle:
    """Stands for a QA model: the largest context logit at the token wanted; larger still on [CLS], the question, [SEP] and padding."""
    def __init__(self, tokenizer, wanted, decoy):
        self.wanted, self.decoy, self.special = *tokenizer.convert_tokens_to_ids([wanted, decoy]), tokenizer.all_special_ids

    def eval(self):
        return self

    def __call__(self, input_ids, token_type_ids, **rest):
        logits = torch.rand(input_ids.shape) + 3.0 * (input_ids == self.decoy) + 5.0 * (input_ids == self.wanted)
        logits += 20.0 * (token_type_ids == 0) + 20.0 * torch.isin(input_ids, torch.tensor(self.special))
        return types.SimpleNamespace(start_logits=logits, end_logits=logits)


def test_evaluate_finds_the_answer_among_windows(make_task, tmp_path, bert):
    """Questions of many lengths, one of them over 7 windows with the decoy in the others: every answer is found, whatever the order."""
    rows = []
    for n in (900, 5, 300, 40, 1200, 7):
        words = [f"w{i}" for i in range(100, 100 + n)]
        words[n - 2], words[1] = "w77", "w66"
        context = " ".join(words)
        rows.append(("w77 w3", context, [("w77", context.index("w77"))]))
    for name in ("train", "dev"):
        write_squad(tmp_path / f"squad/{name}-v1.1.json", rows)
    task = make_task("squad")
    assert task.evaluate(Oracle(AutoTokenizer.from_pretrained(bert), "w77", "w66")) == {"EM": 100.0, "F1": 100.0}
    decoyed = task.evaluate(Oracle(AutoTokenizer.from_pretrained(bert), "w66", "w77"))
    assert decoyed["EM"] == 0.0                                                 # and the numbers can be bad


# ---- GLUE's files

NAUGHTY = 'She said "no, \'twas \u2028 a\x0b b\x0c c\x1c d\x85 "stray'                   # quotes that never close; what str.splitlines splits at
# task | file as on GLUE's site | (text, text2, label) expected
GLUE = [
    ("sst2", f"sentence\tlabel\n{NAUGHTY}\t1\nhide new secretions from the parental units \t0\n",
     [(NAUGHTY, None, 1), ("hide new secretions from the parental units ", None, 0)]),
    ("cola", f"gj04\t1\t\t{NAUGHTY}\ngj04\t0\t*\tThey drank the pub.\n",                                         # no header; 4 columns
     [(NAUGHTY, None, 1), ("They drank the pub.", None, 0)]),
    ("mrpc", f"\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n1\t702876\t702977\t{NAUGHTY}\tAmrozi.\r\n0\t2\t3\t\"A\tB\"\r\n",    # BOM, CRLF
     [(NAUGHTY, "Amrozi.", 1), ('"A', 'B"', 0)]),
    ("stsb", f"index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n0\tmain-captions\tMSRvid\t2012test\t1\tnone\tnone\t"
     f"A plane.\t{NAUGHTY}\t5.000\n1\tg\tf\ty\t2\tn\tn\tA\tB\t0.25\n", [("A plane.", NAUGHTY, 5.0), ("A", "B", 0.25)]),
    ("qqp", f"id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n1\t2\t3\tWhat is \"x?\t{NAUGHTY}\t0\n4\t5\t6\tA?\tB?\t1\n",
     [('What is "x?', NAUGHTY, 0), ("A?", "B?", 1)]),
    ("mnli", "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\tsentence2_parse\tsentence1\tsentence2\tlabel1\t"
     f"gold_label\n0\t1\t1n\tg\t( a )\t( b )\t(R a)\t(R b)\t{NAUGHTY}\tB\tneutral\tcontradiction\n1\t2\t2e\tg\t(\t)\t(\t)\tC\tD\tneutral\tentailment\n"
     "2\t2\t2e\tg\t(\t)\t(\t)\tE\tF\tneutral\tneutral\n", [(NAUGHTY, "B", 2), ("C", "D", 0), ("E", "F", 1)]),
    ("mnli", "index\tsentence1\tsentence2\tlabel1\tlabel2\tlabel3\tlabel4\tlabel5\tgold_label\n0\tA\tB\tneutral\tneutral\tneutral\tneutral\tneutral\tentailment\n",
     [("A", "B", 0)]),                                                                                       # dev has five labels before gold_label
    ("qnli", f"index\tquestion\tsentence\tlabel\n0\tWhen?\t{NAUGHTY}\tentailment\n1\tWho?\tNobody\tnot_entailment", [("When?", NAUGHTY, 0), ("Who?", "Nobody", 1)]),
    ("rte", f"index\tsentence1\tsentence2\tlabel\n0\t{NAUGHTY}\tB\tnot_entailment\n1\tC\tD\tentailment\n", [(NAUGHTY, "B", 1), ("C", "D", 0)]),
    ("tsv", f"label\tid\ttext2\ttext\nyes\t7\tB\t{NAUGHTY}\nmaybe\t8\tD\tC\nno\t9\tF\tE\n", [(NAUGHTY, "B", 2), ("C", "D", 0), ("E", "F", 1)]),
    ("tsv", "text\tlabel\nC\tyes\nE\tno\n", [("C", None, 1), ("E", None, 0)]),
]


@pytest.mark.parametrize("newline", ["\n", "\r\n"], ids=["LF", "CRLF"])
@pytest.mark.parametrize("bom", ["", "\ufeff"], ids=["", "BOM"])
@pytest.mark.parametrize("task, text, want", GLUE, ids=[f"{i}-{row[0]}" for i, row in enumerate(GLUE)])
def test_read_tsv_of_every_task(tmp_path, task, text, want, bom, newline):
    """Columns by header name and not by place; no quoting; only newlines end a row, with or without CR; a BOM is no part of a name."""
    text = bom + text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\n", newline)
    rows, labels = read(task, write(tmp_path / "x.tsv", text))
    assert [tuple(row) for row in rows] == want
    assert labels == {"stsb": None, "tsv": sorted({x for x in ("yes", "no", "maybe") if x in text})}.get(task, common.TASKS[task].labels)


def test_every_task_of_glue_is_in_the_table():
    """The nine tasks and tsv, each GLUE one read above."""
    assert set(common.TASKS) == {"squad", "tsv", "mnli", "qqp", "cola", "sst2", "mrpc", "stsb", "qnli", "rte"} == {"squad", *(row[0] for row in GLUE)}


@pytest.mark.parametrize("rows, short, fine", [(1000, 1, True), (1000, 2, False), (2000, 2, True), (999, 1, False), (10, 1, False)])
def test_a_few_short_rows_are_left_out(tmp_path, capsys, rows, short, fine):
    """GLUE's QQP has rows cut short: up to one in a thousand is left out, with a word that says where; more is a mistake."""
    lines = [f"{i}\t{i}\t{i}\tA{i}\tB{i}\t{i % 2}" for i in range(rows)]
    for k in range(short):
        lines[5 + k] = f"{k}\t1\t2\tcut short"
    path = write(tmp_path / "train.tsv", "\n".join(["id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", *lines, ""]))
    if fine:
        got, _ = read("qqp", path)
        assert len(got) == rows - short and got[4] == ("A4", "B4", 0) and got[5][0] == f"A{5 + short}"
        assert "line 7" in capsys.readouterr().out                              # the header is line 1, row 5 line 7
    else:
        with mistake(path, "line 7"):
            read("qqp", path)


def test_only_the_first_process_tells_of_short_rows(make_task, tmp_path, monkeypatch, capsys):
    head, rows = "question1\tquestion2\tis_duplicate", [f"w{i}\tw{i}\t{i % 2}" for i in range(1000)]
    write(tmp_path / "glue/QQP/train.tsv", "\n".join([head, *rows, "w1"]))
    write(tmp_path / "glue/QQP/dev.tsv", "\n".join([head, *rows[:4]]))
    for rank, told in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        assert len(make_task("qqp").train) == 1000 and capsys.readouterr().out.count("left out 1 row") == told


BAD_TSV = [
    ("sst2", "sentence\tlabel\nA\t1\nB\tgood\nC\t0\n", ["line 3", "good"]),                   # a label that is none
    ("sst2", "sentence\tlabel\nA\t1\nB\t2\n", ["line 3", "2"]),
    ("cola", "x\t1\t\tA\nx\t-1\t\tB\n", ["line 2", "-1"]),                                     # without header, line 1 is data
    ("mnli", "sentence1\tsentence2\tgold_label\nA\tB\t-\n", ["line 2"]),                        # MultiNLI's own file, not GLUE's
    ("stsb", "sentence1\tsentence2\tscore\nA\tB\t1.5\nA\tB\thigh\n", ["line 3", "high"]),
    ("stsb", "sentence1\tsentence2\tscore\nA\tB\t1.5\nA\tB\tnan\n", ["line 3", "nan"]),       # float() reads it, but no loss survives it
    ("stsb", "sentence1\tsentence2\tscore\nA\tB\t1.5\nA\tB\tinf\n", ["line 3", "inf"]),
    ("sst2", "text\tlabel\nA\t1\n", ["sentence"]),                                             # another file's header
    ("qqp", "id,question1,question2,is_duplicate\n1,A,B,0\n", ["question1"]),                   # commas
    ("tsv", "sentence\tclass\nA\tyes\n", ["text"]),
    ("tsv", "text\tlabel\nA\tyes\nB\tyes\n", []),                                              # one class only: nothing to learn
    ("rte", "index\tsentence1\tsentence2\tlabel\n", []),                                       # a header and no rows
    ("sst2", "", []), ("sst2", " \n\n", []),
    ("sst2", b"sentence\tlabel\n\xff\xfe caf\xe9\t1\n", []),                                   # Latin-1
    ("sst2", "sentence\tlabel\nA\t1\n".encode("utf-16"), []),
    ("sst2", b"PK\x03\x04\0\0\0", []),                                                         # the zip under the file's name
]


@pytest.mark.parametrize("task, text, words", BAD_TSV, ids=[f"{i}-{row[0]}" for i, row in enumerate(BAD_TSV)])
def test_read_tsv_mistakes(tmp_path, task, text, words):
    """Each is one sentence that names the file and, for a row, its line."""
    path = write(tmp_path / "train.tsv", text)
    with mistake(path, *words):
        read(task, path)


def test_read_tsv_of_no_file(tmp_path):
    """A missing file is named, and --data with it."""
    with mistake(tmp_path / "train.tsv", "--data"):
        read("sst2", tmp_path / "train.tsv")
    (tmp_path / "train.tsv").mkdir()
    with mistake(tmp_path / "train.tsv"):
        read("sst2", tmp_path / "train.tsv")


def test_tsv_task_has_the_labels_of_its_training_file(make_task, tmp_path):
    """dev is read with train's classes, though it shows only some of them; a class that train lacks is named with file and line."""
    write(tmp_path / "tsv/train.tsv", "text\tlabel\nw1\tred\nw2\tblue\nw3\tgreen\nw4\tred\n")
    dev = write(tmp_path / "tsv/dev.tsv", "label\ttext\nred\tw5\ngreen\tw6\n")
    task = make_task("tsv")
    assert task.labels == ["blue", "green", "red"]
    assert [f["labels"] for f in task.train] == [2, 0, 1, 2] and [f["labels"] for f in task.dev["dev"]] == [2, 1] and task.n_dev == 2
    write(dev, "label\ttext\nred\tw5\nyellow\tw6\n")
    with mistake(dev, "line 3", "yellow"):
        make_task("tsv")


def test_pairs_and_evaluation_are_those_of_plain_transformers(make_task, tmp_path, bert):
    """STS-B, 70 pairs (more than one batch of evaluation) of very different lengths: features as the plain tokenizer makes them, and
    Pearson's r of the plain model's output, one pair at a time."""
    rng = np.random.default_rng(0)
    rows = [(*(" ".join(f"w{k}" for k in rng.integers(0, 3000, rng.integers(1, 40))) for _ in range(2)), round(5 * rng.random(), 3)) for _ in range(70)]
    for name in ("train", "dev"):
        write(tmp_path / f"glue/STS-B/{name}.tsv", "\n".join(["score\tsentence2\tsentence1", *(f"{y}\t{b}\t{a}" for a, b, y in rows)]))
    task, tokenizer = make_task("stsb", length=48), AutoTokenizer.from_pretrained(bert)
    torch.manual_seed(0)
    model = BertForSequenceClassification(config(num_labels=1, problem_type="regression")).eval()
    outputs = []
    for (a, b, y), feature in zip(rows, task.train):
        batch = tokenizer(a, b, truncation=True, max_length=48, return_tensors="pt")
        assert feature["input_ids"] == batch["input_ids"][0].tolist() and feature["token_type_ids"] == batch["token_type_ids"][0].tolist()
        assert feature["labels"] == y
        outputs.append(model(**batch).logits.item())
    assert np.std(outputs) > 0.01
    want = 100 * np.mean((outputs - np.mean(outputs)) * [y - np.mean([r[2] for r in rows]) for *_, y in rows]) / np.std(outputs) / np.std([r[2] for r in rows])
    assert task.evaluate(model)["pearson"] == pytest.approx(want, abs=1e-2)


# ---- SQuAD's file

GOOD = dict(context="red green blue", qas=[dict(id="7", question="Which?", answers=[dict(text="blue", answer_start=10), dict(text="green blue", answer_start=4)])])


def test_read_squad(tmp_path):
    """Articles, paragraphs and questions in order, all answers kept; offsets count characters, also those beyond 16 bits; a BOM is no harm."""
    odd = dict(context="😀 x\u2028y 😀z", qas=[dict(id="8", question="Q?", answers=[dict(text="😀z", answer_start=6)]),
                                            dict(id="9", question="R?", answers=[dict(text="x\u2028y", answer_start=2)])])
    text = json.dumps(dict(data=[dict(title="a", paragraphs=[GOOD]), dict(title="b", paragraphs=[odd])], version="1.1"))
    want = [("7", "Which?", "red green blue", [("blue", 10), ("green blue", 4)]), ("8", "Q?", "😀 x\u2028y 😀z", [("😀z", 6)]),
            ("9", "R?", "😀 x\u2028y 😀z", [("x\u2028y", 2)])]
    for bom in ("", "\ufeff"):
        assert [tuple(row) for row in common.read_squad(write(tmp_path / "dev-v1.1.json", bom + text))] == want


def squad_text(**answer_or_question):
    """GOOD with fields of its question, or of its first answer, changed."""
    p = json.loads(json.dumps(GOOD))
    for key, value in answer_or_question.items():
        (p if key == "context" else p["qas"][0] if key in ("question", "answers") else p["qas"][0]["answers"][0])[key] = value
    return json.dumps(dict(data=[dict(paragraphs=[p])]))


BAD_SQUAD = dict(
    cut_short=squad_text()[:80], empty="", blank=" \n ", a_list="[]", a_list_of_rows="[" + squad_text() + "]", a_number="7", null="null", no_data="{}",
    no_articles='{"data": []}', no_paragraphs='{"data": [{"paragraphs": []}]}', no_questions='{"data": [{"paragraphs": [{"context": "x", "qas": []}]}]}',
    data_a_text='{"data": "x"}', paragraphs_missing='{"data": [{"title": "x"}]}', lines="\n".join([squad_text(), squad_text()]),
    wrong_offset=squad_text(answer_start=9), offset_behind=squad_text(answer_start=99), offset_negative=squad_text(text="green", answer_start=-10),
    offset_text=squad_text(answer_start="10"), offset_null=squad_text(answer_start=None), offset_half=squad_text(answer_start=10.5),
    no_answers=squad_text(answers=[]), answers_null=squad_text(answers=None), answers_a_dict=squad_text(answers={"text": ["blue"], "answer_start": [10]}),
    answer_null=squad_text(text=None), answer_empty=squad_text(text=""), answer_blank=squad_text(text=" ", answer_start=3), answer_other=squad_text(text="Blue"),
    context_null=squad_text(context=None), context_a_list=squad_text(context=["red", "green"]), question_null=squad_text(question=None),
    question_a_number=squad_text(question=5), latin1=squad_text().replace("red", "r\\u00e9d").encode() + b"\xe9", a_zip=b"PK\x03\x04\0\0")


@pytest.mark.parametrize("kind", BAD_SQUAD)
def test_read_squad_mistakes(tmp_path, kind):
    """Whatever is wrong with a user's file is one sentence that names it."""
    path = write(tmp_path / "train-v1.1.json", BAD_SQUAD[kind])
    with mistake(path):
        common.read_squad(path)


def test_read_squad_names_the_question(tmp_path):
    """Of 100,000 questions, the user must find the wrong one."""
    with mistake(write(tmp_path / "t.json", squad_text(answer_start=9)), "7", "blue"):
        common.read_squad(tmp_path / "t.json")
    with mistake(tmp_path / "none.json", "--data"):
        common.read_squad(tmp_path / "none.json")


# ---- GLUE's metrics

GOLD, GUESS = np.array([1, 1, 1, 1, 0, 0, 0, 0]), np.array([1, 1, 0, 0, 1, 0, 0, 0])             # tp 2, fn 2, fp 1, tn 3


def logits(guess, classes=2):
    return np.random.default_rng(0).normal(size=(len(guess), classes)) + 20 * np.eye(classes)[guess]


def test_accuracy_f1_and_matthews_by_hand():
    """Accuracy 5/8; F1 = 2 tp / (2 tp + fp + fn) = 4/7; Matthews (tp tn - fp fn) / sqrt((tp+fp)(tp+fn)(tn+fp)(tn+fn)) = 4/sqrt(240)."""
    for task in ("sst2", "qnli", "rte", "tsv", "mnli"):
        assert common.glue_metrics(task, logits(GUESS), GOLD) == pytest.approx({"acc": 62.5})
    for task in ("qqp", "mrpc"):
        assert common.glue_metrics(task, logits(GUESS), GOLD) == pytest.approx({"acc": 62.5, "F1": 400 / 7})
    assert common.glue_metrics("cola", logits(GUESS), GOLD) == pytest.approx({"mcc": 400 / math.sqrt(3 * 4 * 4 * 5)})
    assert common.glue_metrics("cola", logits(1 - GUESS), GOLD) == pytest.approx({"mcc": -400 / math.sqrt(240)})


def test_mnli_has_two_dev_sets():
    """Three classes; matched and mismatched under two names, so that neither overwrites the other."""
    gold, guess = np.array([0, 1, 2, 2]), np.array([0, 1, 2, 1])
    assert list(common.glue_metrics("mnli", logits(guess, 3), gold, "dev_matched").values()) == [75.0]
    names = [next(iter(common.glue_metrics("mnli", logits(guess, 3), gold, dev))) for dev in ("dev_matched", "dev_mismatched")]
    assert len(set(names)) == 2


def test_pearson_and_spearman_with_ties_by_hand():
    """x = 1 2 2 4, y = 1 3 2 4. Deviations of x: -5/4 -1/4 -1/4 7/4, of y: -3/2 1/2 -1/2 3/2; products 15/8 - 1/8 + 1/8 + 21/8 = 4.5;
    squares 4.75 and 5: r = 4.5 / sqrt(23.75). Ranks of x with ties: 1 2.5 2.5 4, of y: 1 3 2 4; deviations of x: -1.5 0 0 1.5; products
    2.25 + 2.25 = 4.5; squares 4.5 and 5: rho = 4.5 / sqrt(22.5)."""
    x, y = np.array([[1.0], [2], [2], [4]]), np.array([1.0, 3, 2, 4])
    want = {"pearson": 450 / math.sqrt(23.75), "spearman": 450 / math.sqrt(22.5)}
    assert common.glue_metrics("stsb", x, y) == pytest.approx(want)
    order = [2, 0, 3, 1]
    assert common.glue_metrics("stsb", x[order], y[order]) == pytest.approx(want)
    # ranks do not mind a cube, and do mind a sign; three-fold ties: x = 5 5 5 9 has ranks 2 2 2 4, y = 1 2 3 4: products of the deviations
    # -.5*-1.5 + -.5*-.5 + -.5*.5 + 1.5*1.5 = 3, squares 3 and 5: 3 / sqrt(15)
    assert common.glue_metrics("stsb", x ** 3, y)["spearman"] == pytest.approx(want["spearman"])
    assert common.glue_metrics("stsb", -x, y) == pytest.approx({key: -value for key, value in want.items()})
    assert common.glue_metrics("stsb", np.array([[5.0], [5], [5], [9]]), np.array([1.0, 2, 3, 4]))["spearman"] == pytest.approx(300 / math.sqrt(15))


def test_metrics_of_one_class_only():
    """Where a denominator is 0, the value is 0 and not nan; F1 is of the class 1: none guessed and none there is 0."""
    zeros, ones = np.zeros(5, int), np.ones(5, int)
    mixed = np.array([1, 0, 1, 0, 0])
    assert common.glue_metrics("mrpc", logits(zeros), zeros) == {"acc": 100.0, "F1": 0.0}
    assert common.glue_metrics("mrpc", logits(ones), ones) == {"acc": 100.0, "F1": 100.0}
    assert common.glue_metrics("qqp", logits(ones), mixed) == pytest.approx({"acc": 40.0, "F1": 400 / 7})                # tp 2, fp 3
    for guess, gold in ((zeros, mixed), (mixed, ones), (ones, ones)):
        assert common.glue_metrics("cola", logits(guess), gold) == {"mcc": 0.0}
    assert common.glue_metrics("stsb", np.ones((5, 1)), np.arange(5.0)) == {"pearson": 0.0, "spearman": 0.0}
    assert common.glue_metrics("stsb", np.arange(5.0)[:, None], np.ones(5)) == {"pearson": 0.0, "spearman": 0.0}


# ---- flags and downloads

@pytest.mark.parametrize("kind, low, high, good, bad", [
    (float, 0, 1, ["0.03", "1", "1e-3"], ["0", "-1", "1.01", "nan", "inf", "-inf", "three", "", "3%"]),
    (float, 0, math.inf, ["5e-4", "7"], ["0", "-0.0", "-1", "nan", "inf", "1e999", "three"]),
    (int, 0, math.inf, ["0", "7"], ["-1", "nan", "inf", "three", "1.5", "1e3", ""]),
    (int, 1, math.inf, ["1", "32"], ["0", "-1", "nan", "three"])])
def test_number(kind, low, high, good, bad):
    """A float above low, an int of low or more, finite; anything else is argparse's error, in words that quote what was given."""
    parse = common.number(kind, low, high)
    for text in good:
        assert parse(text) == kind(text) and type(parse(text)) is kind
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match=text.replace("%", "%%?") or None):
            parse(text)


BODY = b"abc"                                           # its sha256 is FIPS 180's own example; 'hello\n' is git's, blob ce013625...
SHA_ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


class Site(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.close_connection = True
        if self.path == "/garbage":
            return self.wfile.write(b"this is no HTTP at all\r\n\r\n")
        self.send_response(404 if self.path == "/absent" else 200)
        if self.path == "/chunked":                                     # announces 16 bytes, sends 3, closes
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            return self.wfile.write(b"10\r\nabc")
        body = b"hello\n" if self.path == "/hello" else BODY
        if self.path != "/nosize":
            self.send_header("Content-Length", str(2 * len(body) if self.path == "/cut" else len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture(scope="session")
def site():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site)
    threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.01), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.mark.parametrize("page, check", [("whole", None), ("nosize", None), ("whole", ("sha256", SHA_ABC)),
                                         ("hello", ("git blob id", "ce013625030ba8dba906f756967f9e9ca394464a"))])
def test_download_whole(site, no_proxy, tmp_path, page, check):
    """The file and nothing beside it, in a folder made for it; checksums are the published ones of these bytes."""
    tasks.download(f"{site}/{page}", tmp_path / "new/folder/x.json", check)
    assert [p.name for p in (tmp_path / "new/folder").iterdir()] == ["x.json"]
    assert (tmp_path / "new/folder/x.json").read_bytes() == (b"hello\n" if page == "hello" else BODY)


@pytest.mark.parametrize("page, check", [("cut", None), ("chunked", None), ("absent", None), ("garbage", None), ("whole", ("sha256", "0" * 64)),
                                         ("whole", ("git blob id", SHA_ABC)), (None, None)])
def test_download_refused(site, no_proxy, tmp_path, page, check):
    """Cut off, not there, not HTTP, of another checksum, no server at all: one sentence that says where to put the file, and no file."""
    path = tmp_path / "x.json"
    with mistake(path, *["--preset mini"] * (page is None)):
        tasks.download(f"{site}/{page}" if page else "http://127.0.0.1:9/x.json", path, check)
    assert list(tmp_path.iterdir()) == []


def test_write_whole_leaves_the_old_file_or_the_new_one(tmp_path):
    """A writer that fails half way (a full disk, Ctrl-C) leaves what was there before, and no .part."""
    def half(f):
        f.write(b"half")
        raise KeyboardInterrupt
    common.write_whole(tmp_path / "x", "old €\n")
    with pytest.raises(KeyboardInterrupt):
        common.write_whole(tmp_path / "x", half)
    assert [p.name for p in tmp_path.iterdir()] == ["x"] and (tmp_path / "x").read_bytes() == "old €\n".encode()


def make_zip(path, *members, store=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED if store else zipfile.ZIP_DEFLATED) as z:
        for name in members:
            z.writestr(name, "sentence\tlabel\n" + "A b c d e f\t1\n" * 20)
    return path


def test_unzip_takes_one_member(tmp_path):
    """Only what was asked for is written; two dots inside a name are no way out."""
    tasks.unzip(make_zip(tmp_path / "z/a.zip", "CoLA/dev.tsv", "CoLA/train..old.tsv", "CoLA/original/x"), "CoLA/dev.tsv", tmp_path / "CoLA/dev.tsv")
    assert (tmp_path / "CoLA/dev.tsv").read_text().startswith("sentence\tlabel\nA b") and [p.name for p in (tmp_path / "CoLA").iterdir()] == ["dev.tsv"]


@pytest.mark.parametrize("name", ["../evil.tsv", "/tmp/evil.tsv", "CoLA/../../evil.tsv", "..\\evil.tsv", "C:\\evil.tsv", "CoLA/.."])
def test_unzip_refuses_members_outside(tmp_path, name):
    """A zip that has one such member is not to be trusted with the others."""
    archive, path = make_zip(tmp_path / "z/a.zip", "CoLA/dev.tsv", name), tmp_path / "data/CoLA/dev.tsv"
    with mistake(archive):
        tasks.unzip(archive, "CoLA/dev.tsv", path)
    assert sorted(p for p in tmp_path.rglob("*") if p.is_file()) == [archive]


@pytest.mark.parametrize("damage", ["half", "text", "no member", "crc", "deflate", "encrypted", "method"])
def test_unzip_refuses_a_damaged_zip(tmp_path, damage):
    """Half a zip, a web page under its name, a zip of another task, one with flipped bytes, a password, by a method of its own: a sentence, and no file."""
    archive, path = make_zip(tmp_path / "z/a.zip", "x" if damage == "no member" else "CoLA/dev.tsv", store=damage == "crc"), tmp_path / "data/dev.tsv"
    raw = archive.read_bytes()
    at = 30 + len("CoLA/dev.tsv")                                               # a local header is 30 bytes and the name
    entry = raw.rindex(b"PK\1\2")                                                # the directory's entry: flags at 8, method at 10; the header's at 6, 8
    secret = raw[:6] + b"\1" + raw[7:entry + 8] + b"\1" + raw[entry + 9:]
    archive.write_bytes(dict(encrypted=secret, method=raw[:8] + b"\x63" + raw[9:entry + 10] + b"\x63" + raw[entry + 11:], half=raw[:len(raw) // 2], text=b"<html>Not found</html>", crc=raw[:at] + b"X" + raw[at + 1:],
                             deflate=raw[:at] + b"\xff" * 4 + raw[at + 4:]).get(damage, raw))       # 11 in bits 1, 2: no block type of deflate
    with mistake(archive):
        tasks.unzip(archive, "CoLA/dev.tsv", path)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [archive]


def test_fetch_makes_the_files_from_what_is_there(tmp_path):
    """No network: MRPC's dev rows are those whose pair of ids is listed, train the others; CoLA's come out of its zip; a user's file stays."""
    folder = tmp_path / "glue/MRPC"
    head, rows = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n", [f"{i % 2}\t{i}\t{i + 50}\tA {i} \"x\tB\u2028 {i}\r\n" for i in range(6)]
    write(folder / "msr_paraphrase_train.txt", head + "".join(rows))
    write(folder / "mrpc_dev_ids.tsv", "1\t51\n4\t54\n3\t99\n")                                 # 3 is listed with another partner: not dev
    common.fetch(tmp_path, "mrpc")
    got = {name: [(a, b, y) for a, b, y in read("mrpc", folder / f"{name}.tsv")[0]] for name in ("train", "dev")}
    want = [(f'A {i} "x', f"B\u2028 {i}", i % 2) for i in range(6)]
    assert got == {"dev": [want[1], want[4]], "train": [want[0], want[2], want[3], want[5]]}
    make_zip(tmp_path / "glue/CoLA.zip", "CoLA/train.tsv", "CoLA/dev.tsv", "CoLA/test.tsv")
    write(tmp_path / "glue/CoLA/dev.tsv", "mine")
    common.fetch(tmp_path, "cola")
    assert (tmp_path / "glue/CoLA/dev.tsv").read_text() == "mine" and (tmp_path / "glue/CoLA/train.tsv").read_text().startswith("sentence")
    assert sorted(p.name for p in (tmp_path / "glue/CoLA").iterdir()) == ["dev.tsv", "train.tsv"]


GLUE_SITE = "https://dl.fbaipublicfiles.com/glue/data/"
DOWNLOADS = {
    "squad": [("https://rajpurkar.github.io/SQuAD-explorer/dataset/dev-v1.1.json", "squad/dev-v1.1.json",
               ("sha256", "95aa6a52d5d6a735563366753ca50492a658031da74f301ac5238b03966972c9")),
              ("https://rajpurkar.github.io/SQuAD-explorer/dataset/train-v1.1.json", "squad/train-v1.1.json",
               ("git blob id", "77f1d9a7daee11f7bc293832020f7709f63410ad"))],
    "mrpc": [("https://dl.fbaipublicfiles.com/senteval/senteval_data/msr_paraphrase_train.txt", "glue/MRPC/msr_paraphrase_train.txt", None),
             (f"{GLUE_SITE}mrpc_dev_ids.tsv", "glue/MRPC/mrpc_dev_ids.tsv", None)],
    "tsv": [],
    **{task: [(f"{GLUE_SITE}{name}.zip", f"glue/{name}.zip", None)] for task, name in (
        ("mnli", "MNLI"), ("qqp", "QQP-clean"), ("cola", "CoLA"), ("sst2", "SST-2"), ("stsb", "STS-B"), ("qnli", "QNLIv2"), ("rte", "RTE"))}}
FOLDERS = dict(mnli="MNLI", qqp="QQP", cola="CoLA", sst2="SST-2", mrpc="MRPC", stsb="STS-B", qnli="QNLI", rte="RTE")


@pytest.mark.parametrize("task", DOWNLOADS)
def test_fetch_asks_for(tmp_path, monkeypatch, task):
    """Each task's files, from the data set's own site, to where CONTRACT has them, with the checksums that are known; once. A file that is there
    already is the user's: neither asked for nor checked."""
    asked = []

    def download(url, path, check=None):
        asked.append((url, str(path.relative_to(tmp_path)), check))
        assert not path.exists()
        if path.suffix == ".zip":
            path.parent.mkdir(parents=True, exist_ok=True)
            with zipfile.ZipFile(path, "w") as z:
                for name in ("train", "dev", "dev_matched", "dev_mismatched", "test"):
                    z.writestr(f"{FOLDERS[task]}/{name}.tsv", f"{task}'s {name}")
        else:
            write(path, {"msr_paraphrase_train.txt": "head\n1\t7\t8\tA\tB\n1\t9\t8\tA\tC\n", "mrpc_dev_ids.tsv": "9\t8\n"}.get(path.name, "{}"))
    monkeypatch.setattr(tasks, "download", download)
    common.fetch(tmp_path, task)
    assert sorted(asked) == sorted(DOWNLOADS[task])
    names = ["train", "dev_matched", "dev_mismatched"] if task == "mnli" else ["train", "dev"]
    files = {name: tmp_path / (f"squad/{name}-v1.1.json" if task == "squad" else f"glue/{FOLDERS.get(task)}/{name}.tsv") for name in names * (task != "tsv")}
    for name, file in files.items():
        assert file.read_text() == {"squad": "{}", "mrpc": f"head\n1\t{7 + 2 * (name == 'dev')}\t8\tA\t{'BC'[name == 'dev']}\n"}.get(task, f"{task}'s {name}")
    for path in [p for p in tmp_path.rglob("*") if p.is_file() and p not in files.values()]:
        path.unlink()                                                                       # archives and lists: not missed once the files are there
    for file in files.values():
        file.write_text("mine")
    common.fetch(tmp_path, task)
    assert len(asked) == len(DOWNLOADS[task]) and all(file.read_text() == "mine" for file in files.values())
    for name, file in files.items():
        if name == "train":
            file.unlink()
            common.fetch(tmp_path, task)                                                    # of two files the one that is not there
    again = asked[len(DOWNLOADS[task]):]
    assert sorted(again) == sorted(row for row in DOWNLOADS[task] if "/dev-v1.1" not in row[0])
    assert all((file.read_text() == "mine") == (name != "train") for name, file in files.items())


# ---- text for pre-training

def test_read_corpus(tmp_path, bert):
    """A line is a list of ids, blank lines (of spaces, several of them, at the ends) part documents; BOM, CRLF and U+2028 do no harm."""
    tokenizer = AutoTokenizer.from_pretrained(bert)
    path = write(tmp_path / "c.txt", "\ufeff\n\nw1 w2\r\nw3\u2028w4\n  \t\n\nw5\n\u200b\nw6 w7 w8\n\n \n")
    want = [[["w1", "w2"], ["w3", "w4"]], [["w5"], ["w6", "w7", "w8"]]]                     # a line of no token (U+200B) is no line
    assert [[tokenizer.convert_ids_to_tokens(line) for line in d] for d in tasks.read_corpus(path, tokenizer)] == want
    for text in ("", "\n \n", "\u200b\n", b"caf\xe9\n"):
        with pytest.raises((ValueError, common.Mistake)) as info:
            tasks.read_corpus(write(path, text), tokenizer)
        assert str(path) in str(info.value) and "\n" not in str(info.value)


def pretraining(bert, batch, length, documents, lines, tokens, seed=0):
    """Documents in which every word occurs once, so that each token of a batch tells its place (document, index in it); the batch; rows.

    A row is (A, B, label): places of A's and B's tokens with the masking undone, label 1 where B is said to be random."""
    tokenizer = AutoTokenizer.from_pretrained(bert)
    first, texts, place = tokenizer.convert_tokens_to_ids("w0"), [], {}
    for d in range(documents):
        ids = [first + (d * lines * tokens + k) for k in range(lines * tokens)]
        place |= {t: (d, k) for k, t in enumerate(ids)}
        texts.append([ids[k:k + tokens] for k in range(0, len(ids), tokens)])
    out = {k: v.numpy() for k, v in tasks.mlm_nsp_batch(texts, tokenizer, batch, length, np.random.default_rng(seed)).items()}
    rows = []
    for ids, labels, types, attend, label in zip(*(out[k] for k in ("input_ids", "labels", "token_type_ids", "attention_mask", "next_sentence_label"))):
        n = attend.sum()
        assert n <= length and (attend[:n] == 1).all() and (attend[n:] == 0).all() and (ids[n:] == tokenizer.pad_token_id).all() and (types[n:] == 0).all()
        assert (labels[n:] == -100).all()                                       # padding is never predicted ...
        a = int((types[:n] == 0).sum())
        assert (types[:a] == 0).all() and (types[a:n] == 1).all()                # 0: [CLS] A [SEP], 1: B [SEP]
        special = [0, a - 1, n - 1]
        assert ids[special].tolist() == [tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.sep_token_id] and (labels[special] == -100).all()
        ids = np.where(labels == -100, ids, labels)                              # ... nor [CLS] and [SEP]; the label is the token that was there:
        rows.append(([place[t] for t in ids[1:a - 1]], [place[t] for t in ids[a:n - 1]], int(label)))       # KeyError: it was not
    return tokenizer, out, rows


def contiguous(places):
    return all(b == (a[0], a[1] + 1) for a, b in zip(places, places[1:]))


@pytest.mark.parametrize("length", [128, 24])
def test_nsp_pairs(bert, length):
    """A and B are runs of their documents; label 0: B follows A, at once where nothing was cut; 1: another document; half of each."""
    _, _, rows = pretraining(bert, 2000, length, documents=12, lines=8, tokens=6)
    for a, b, label in rows:
        assert a and b and contiguous(a) and contiguous(b)
        assert (a[0][0] != b[0][0]) == bool(label)
        if not label:
            assert b[0][1] > a[-1][1] and (length < 60 or b[0][1] == a[-1][1] + 1)          # a document has 48 tokens
    half = sum(label for _, _, label in rows)
    assert abs(half - 1000) < 5 * math.sqrt(2000 / 4)                                       # binomial, 5 sigma
    assert len({a[0] for a, _, _ in rows}) > 50 and len({len(a) for a, _, _ in rows}) > 3       # from all over the corpus, in many lengths


def test_nsp_lengths_do_not_tell_the_label(bert):
    """In BERT's own pre-training a random B fills the room that A leaves, so A is as long under either label: no count of tokens gives it away."""
    _, _, rows = pretraining(bert, 2000, 64, documents=9, lines=30, tokens=10)
    longer = [np.mean([len(a) > len(b) for a, b, label in rows if label == want]) for want in (0, 1)]
    assert abs(longer[0] - longer[1]) < 0.15                                                 # 5 sigma of the difference is 0.11


def test_mlm_masks_15_percent(bert):
    """15 % of the ordinary tokens, anywhere in the row: 80 % [MASK], 10 % another word of the whole vocabulary, 10 % as they were."""
    tokenizer, out, rows = pretraining(bert, 2500, 128, documents=12, lines=8, tokens=6)
    ids, labels = out["input_ids"], out["labels"]
    chosen, sizes = labels != -100, np.array([len(a) + len(b) for a, b, _ in rows])
    assert abs(chosen.sum() - 0.15 * sizes.sum()) < 5 * math.sqrt(sizes.sum() * 0.15 * 0.85)
    n, masked, same = chosen.sum(), (ids == tokenizer.mask_token_id)[chosen].sum(), (ids == labels)[chosen].sum()
    assert n > 10_000
    for count, share in ((masked, 0.8), (same, 0.1), (n - masked - same, 0.1)):
        assert abs(count - share * n) < 5 * math.sqrt(n * share * (1 - share)), (count / n, share)
    swapped = ids[chosen & (ids != labels) & (ids != tokenizer.mask_token_id)]
    assert not np.isin(swapped, tokenizer.all_special_ids).any()
    assert len(set(swapped.tolist())) > 0.8 * len(swapped) * (1 - len(swapped) / len(tokenizer) / 2)        # not a few favourites
    where = np.concatenate([(np.flatnonzero(row) - 1) / (size + 1) for row, size in zip(chosen, sizes)])     # uniform over the row
    assert abs(where.mean() - 0.5) < 5 * math.sqrt(1 / 12 / n) + 0.01
    assert (ids == tokenizer.mask_token_id)[~chosen].sum() == 0


def test_mlm_is_a_function_of_its_generator(bert):
    """The same seed makes the same batch, another another: a pre-training can be made again."""
    a, b, c = (pretraining(bert, 32, 64, 5, 4, 5, seed)[1] for seed in (3, 3, 4))
    assert all(np.array_equal(a[k], b[k]) for k in a) and not np.array_equal(a["input_ids"], c["input_ids"])


@pytest.mark.parametrize("lines, tokens", [(1, 5), (6, 5), (1, 300)])
def test_mlm_of_one_document_terminates(bert, lines, tokens):
    """There is no other document to draw B from; a line longer than the room is cut. A one-line document can only be a random pair."""
    _, _, rows = pretraining(bert, 64, 32, 1, lines, tokens)
    assert all(a and b and contiguous(a) and contiguous(b) for a, b, _ in rows)
    assert {label for _, _, label in rows} == ({1} if lines == 1 else {0, 1})


# ---- loss, learning rate, weights

def soft(x, t=1.0):
    e = np.exp((x - x.max(-1, keepdims=True)) / t)
    return e / e.sum(-1, keepdims=True)


def ce(x, y):
    return float(-np.log(soft(x)[np.arange(len(y)), y]).mean())


def kl(teacher, student):
    """KL(teacher || student) at temperature 2, mean over the batch."""
    p, q = soft(teacher, 2.0), soft(student, 2.0)
    return float((p * np.log(p / q)).sum(-1).mean())


def nets(kind, **more):
    torch.manual_seed(1)
    return [kind(config(**more)).eval() for _ in range(2)]


def inputs():
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 4000, (6, 11), generator=g)
    return dict(input_ids=ids, token_type_ids=torch.zeros_like(ids), attention_mask=torch.ones_like(ids))


def outputs(net, batch, *keys):
    with torch.no_grad():
        out = net(**batch)
    return [out[key].double().numpy() for key in keys]


def test_task_loss_of_classes():
    """Without a teacher CE; with one 0.1 CE + 0.9 * 4 * KL(teacher || student) of the logits halved (T = 2)."""
    (student, teacher), y = nets(BertForSequenceClassification, num_labels=3), np.array([0, 1, 2, 2, 1, 0])
    batch = inputs() | dict(labels=torch.from_numpy(y))
    [s], [t] = outputs(student, batch, "logits"), outputs(teacher, batch, "logits")
    assert kl(t, s) > 0.01 and abs(kl(t, s) - kl(s, t)) > 1e-4              # the direction shows
    assert common.task_loss(student, batch).item() == pytest.approx(ce(s, y), rel=1e-4)
    assert common.task_loss(student, batch, teacher).item() == pytest.approx(0.1 * ce(s, y) + 0.9 * 4 * kl(t, s), rel=1e-4)


def test_task_loss_of_squad():
    """CE and KL are each the mean of the start's and the end's."""
    (student, teacher), a, b = nets(BertForQuestionAnswering), np.array([0, 3, 1, 7, 10, 2]), np.array([0, 4, 9, 7, 10, 5])
    batch = inputs() | dict(start_positions=torch.from_numpy(a), end_positions=torch.from_numpy(b))
    (s, e), (ts, te) = (outputs(net, batch, "start_logits", "end_logits") for net in (student, teacher))
    hard, soft_loss = (ce(s, a) + ce(e, b)) / 2, (kl(ts, s) + kl(te, e)) / 2
    assert common.task_loss(student, batch).item() == pytest.approx(hard, rel=1e-4)
    assert common.task_loss(student, batch, teacher).item() == pytest.approx(0.1 * hard + 0.9 * 4 * soft_loss, rel=1e-4)


def test_task_loss_of_a_number():
    """STS-B has no classes: squares in both places."""
    (student, teacher), y = nets(BertForSequenceClassification, num_labels=1, problem_type="regression"), np.array([0.0, 1, 2.5, 3, 4, 5])
    batch = inputs() | dict(labels=torch.from_numpy(y).float())
    [s], [t] = outputs(student, batch, "logits"), outputs(teacher, batch, "logits")
    s, t = s[:, 0], t[:, 0]
    assert common.task_loss(student, batch, teacher).item() == pytest.approx(0.1 * np.mean((s - y) ** 2) + 0.9 * np.mean((s - t) ** 2), rel=1e-4)


def test_task_loss_trains_the_student_only():
    """Gradients reach the student, and never the teacher, even one that was not frozen."""
    student, teacher = nets(BertForSequenceClassification, num_labels=2)
    common.task_loss(student, inputs() | dict(labels=torch.tensor([0, 1, 0, 1, 1, 1])), teacher).backward()
    assert student.classifier.weight.grad.abs().sum() > 0 and all(p.grad is None for p in teacher.parameters())


def test_lr_factor_by_hand():
    """10 steps, warm-up 0.2: 1/2, 1, then (10 - step) / 8, never above 1; the corners: no warm-up, all warm-up, one step, under one step."""
    assert [common.lr_factor(step, 10, 0.2) for step in range(11)] == pytest.approx([1 / 2, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8, 0])
    assert [common.lr_factor(step, 4, 0.0) for step in range(4)] == pytest.approx([1, 3 / 4, 2 / 4, 1 / 4])
    assert [common.lr_factor(step, 4, 1.0) for step in range(4)] == pytest.approx([1 / 4, 2 / 4, 3 / 4, 1])
    assert [common.lr_factor(0, 1, w) for w in (0, 0.05, 0.5, 1)] == pytest.approx([1, 1, 1, 1])
    assert [common.lr_factor(step, 4, 0.0, 0.2) for step in range(5)] == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])
    for steps, warmup in ((10, 0.05), (7, 0.3), (1000, 0.06), (3, 0.9)):
        values = [common.lr_factor(step, steps, warmup) for step in range(steps)]
        peak = int(np.argmax(values))
        assert 0 < min(values) and max(values) <= 1 and values[:peak + 1] == sorted(values[:peak + 1]) and values[peak:] == sorted(values[peak:], reverse=True)


@pytest.mark.parametrize("kind", [BertForSequenceClassification, BertForQuestionAnswering])
def test_prunable_and_kept_by_hand(kind):
    """6 matrices a layer and no others: 4 of 16 x 16 and 2 of 16 x 32, 2,048 weights a layer, 4,096 in two; biases, pooler, head stay out."""
    torch.manual_seed(0)
    model = kind(config())
    weights = common.prunable(model)
    parts = ["attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense", "intermediate.dense", "output.dense"]
    assert sorted(weights) == sorted(f"bert.encoder.layer.{i}.{part}" for i in (0, 1) for part in parts)
    assert all(weights[name] is model.get_submodule(name) for name in weights) and sum(m.weight.numel() for m in weights.values()) == 4096
    each, share = common.kept(weights)
    assert share == 1 and set(each) == set(weights) and set(each.values()) == {1.0}
    query, inter = "bert.encoder.layer.0.attention.self.query", "bert.encoder.layer.1.intermediate.dense"
    with torch.no_grad():
        weights[query].weight[:, :4] = 0                                        # 64 of 256: 3/4 left
        weights[inter].weight[:] = 0                                            # all 512
        weights[inter].bias[:] = 0                                              # no part of the count
        weights["bert.encoder.layer.0.output.dense"].weight[0, 0] = 1e-30       # tiny is not zero
        model.bert.pooler and model.bert.pooler.dense.weight.zero_()
    each, share = common.kept(weights)
    assert each[query] == 0.75 and each[inter] == 0 and each["bert.encoder.layer.0.output.dense"] == 1 and share == pytest.approx((4096 - 64 - 512) / 4096)
    # as the forward pass sees them: a mask by parametrization counts, though the weight under it is dense
    class Half(torch.nn.Module):
        def forward(self, w):
            return w * (torch.arange(w.shape[1]) % 2)
    torch.nn.utils.parametrize.register_parametrization(weights[query], "weight", Half())       # columns 5, 7, ... 15 of 16: 6/16
    again = common.prunable(model)
    assert set(again) == set(weights) and common.kept(again)[0][query] == pytest.approx(6 / 16)


# ---- batches

def sst2(tmp_path, n):
    """n training rows, row i known by its first word w<i>, of many lengths; two dev rows."""
    rng = np.random.default_rng(n)
    rows = ["\t".join([" ".join([f"w{i}", *(f"w{k}" for k in rng.integers(1000, 2000, rng.integers(0, 30)))]), str(i % 2)]) for i in range(n)]
    write(tmp_path / "glue/SST-2/train.tsv", "\n".join(["sentence\tlabel", *rows]))
    write(tmp_path / "glue/SST-2/dev.tsv", "sentence\tlabel\nw1\t1\nw2\t0\n")


def numbers(task, step):
    """The training rows in the batch of a step, told by their first word; checks the padding, mask and label of each on the way."""
    batch, base = task.batch(step), task.tokenizer.convert_tokens_to_ids("w0")
    width = batch["attention_mask"].sum(1)
    assert set(batch) == {"input_ids", "token_type_ids", "attention_mask", "labels"} and width.max() == batch["input_ids"].shape[1]
    found = (batch["input_ids"][:, 1] - base).tolist()
    for i, ids, mask, label, n in zip(found, batch["input_ids"], batch["attention_mask"], batch["labels"], width):
        assert ids[:n].tolist() == task.train[i]["input_ids"] and (ids[n:] == 0).all() and (mask[:n] == 1).all() and label == i % 2
    return found


@pytest.mark.parametrize("n, size, steps", [(120, 2, 60), (23, 4, 5), (3, 4, 1)])
def test_an_epoch_is_a_permutation(make_task, tmp_path, n, size, steps):
    """Every row once (what is over n // size batches waits for a later epoch); epochs differ; also over more than 50 batches, which are
    sorted by length in stretches; and with fewer rows than a batch."""
    sst2(tmp_path, n)
    task = make_task("sst2", batch_size=size)
    epochs = [[numbers(task, e * steps + k) for k in range(steps)] for e in range(3)]
    for epoch in epochs:
        rows = sum(epoch, [])
        assert len(rows) == len(set(rows)) == min(n, steps * size) and set(rows) <= set(range(n))
    assert all(len(batch) == min(n, size) for epoch in epochs for batch in epoch)
    assert n == 3 or epochs[0] != epochs[1] != epochs[2]
    assert n != 23 or set(sum(epochs[0] + epochs[1] + epochs[2], [])) == set(range(23))      # the rows left out change
    assert task.run.args.steps == steps                                                     # one epoch was asked for
    lengths = [len(task.train[i]["input_ids"]) for i in sum(epochs[0], [])]
    assert n != 120 or lengths != sorted(lengths)                                           # the batches themselves come in no order of length


def test_batches_depend_on_seed_and_step_alone(make_task, tmp_path):
    """Same seed, same batches, asked for in any order (a resumed run starts in the middle); another seed, others."""
    sst2(tmp_path, 40)
    a, b, c = make_task("sst2", seed=1), make_task("sst2", seed=1), make_task("sst2", seed=2)
    forward = [numbers(a, step) for step in range(25)]
    assert [numbers(b, step) for step in reversed(range(25))] == forward[::-1]
    assert [numbers(c, step) for step in range(25)] != forward
    assert sorted(sum(forward[:10], [])) == sorted(sum(forward[10:20], [])) == list(range(40))


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_split_the_batch(make_task, tmp_path, world):
    """The rows of ranks 0 .. N-1 of N are together the batch of one process, each as many."""
    sst2(tmp_path, 40)
    task = make_task("sst2", batch_size=8)
    whole = [numbers(task, step) for step in range(12)]
    for step, want in enumerate(whole):
        parts = []
        for rank in range(world):
            task.run.rank, task.run.world = rank, world
            parts.append(numbers(task, step))
        assert all(len(part) == 8 // world for part in parts) and sorted(sum(parts, [])) == sorted(want)


def test_squad_batches_hold_positions(make_task, tmp_path):
    """A training batch of SQuAD has start and end positions, no labels, and no spans or row, which the model would not take."""
    rows = [("w1", "w2 w3 w4", [("w4", 6)])] * 4
    for name in ("train", "dev"):
        write_squad(tmp_path / f"squad/{name}-v1.1.json", rows)
    batch = make_task("squad").batch(0)
    assert set(batch) == {"input_ids", "token_type_ids", "attention_mask", "start_positions", "end_positions"}
    assert batch["start_positions"].tolist() == batch["end_positions"].tolist() == [5] * 4       # [CLS] w1 [SEP] w2 w3 w4 [SEP]
