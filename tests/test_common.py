"""common.py: readers, features, batches, metrics, BERT. Expected values are written by hand."""
import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file

import common

BERT = str(ROOT / "mini" / "bert")


@pytest.fixture(scope="module")
def tokenizer():
    return common.load_tokenizer(BERT)


# ---- readers

def write_tsv(folder, text):
    path = folder / "train.tsv"
    path.write_text(text)
    return path


def test_tsv_columns_by_name(tmp_path):
    path = write_tsv(tmp_path, "index\tlabel\tsentence\n0\t1\ta \"quoted\" word\n1\t0\tb\n")
    rows, classes = common.read_tsv(path, "sst2", ["0", "1"])
    assert rows == [("a \"quoted\" word", None, 1), ("b", None, 0)]
    assert classes == ["0", "1"]


def test_tsv_pairs_numbers_and_own_classes(tmp_path):
    path = write_tsv(tmp_path, "text\ttext2\tlabel\r\na\tb\tyes \r\nc\td\tno\r\n")
    rows, classes = common.read_tsv(path, "tsv", None)
    assert rows == [("a", "b", 1), ("c", "d", 0)]
    assert classes == ["no", "yes"]
    path = write_tsv(tmp_path, "sentence1\tsentence2\tscore\na\tb\t2.5\nc\td\t1\n")
    assert common.read_tsv(path, "stsb", common.NUMBER)[0] == [("a", "b", 2.5), ("c", "d", 1.0)]


def test_whole_numbers_are_in_their_order(tmp_path):
    path = write_tsv(tmp_path, "label\ttext\n10\ta\n-1\tb\n2\tc\n")
    assert common.read_tsv(path, "tsv", None)[1] == ["-1", "2", "10"]
    path = write_tsv(tmp_path, "label\ttext\n10\ta\nb1\tb\n2\tc\n")
    assert common.read_tsv(path, "tsv", None)[1] == ["10", "2", "b1"]


def test_cola_has_no_header(tmp_path):
    path = write_tsv(tmp_path, "gj04\t1\t\tThe first row counts.\ngj04\t0\t*\tThis row too.\n")
    rows, _ = common.read_tsv(path, "cola", ["0", "1"])
    assert rows == [("The first row counts.", None, 1), ("This row too.", None, 0)]


@pytest.mark.parametrize("text, words", [
    ("", "is empty"),
    ("sentence\tlabel\n", "no rows"),
    ("sentence\tclass\na\t1\n", "line 1: the header has 0 columns 'label'"),
    ("sentence\tlabel\tlabel\na\t1\t0\n", "line 1: the header has 2 columns 'label'"),
    ("sentence\tlabel\na\t1\nb\n", "line 3: the row has 1 cells, not 2"),
    ("sentence\tlabel\na\t1\nb\tc\t0\n", "line 3: the row has 3 cells, not 2"),
    ("sentence\tlabel\na\t1\n\nb\t0\n", "line 3: the row has 1 cells, not 2"),
    ("sentence\tlabel\na\t1\nb\t2\n", "line 3: label '2' is not one of"),
    ("sentence\tlabel\na\t1\nb\t1\n", "every row has the label '1'"),
])
def test_bad_tsv(tmp_path, text, words):
    path = write_tsv(tmp_path, text)
    with pytest.raises(SystemExit, match=words) as error:
        common.read_tsv(path, "sst2", ["0", "1"])
    assert str(path) in str(error.value)


@pytest.mark.parametrize("label", ["nan", "inf", "", "four"])
def test_bad_labels(tmp_path, label):
    path = write_tsv(tmp_path, f"sentence1\tsentence2\tscore\na\tb\t1\nc\td\t{label}\n")
    with pytest.raises(SystemExit, match=f"line 3: label '{label}' is not a finite number"):
        common.read_tsv(path, "stsb", common.NUMBER)
    path = write_tsv(tmp_path, "text\tlabel\na\tno\nb\tyes\nc\t \n")
    with pytest.raises(SystemExit, match=r"line 4: label '' is not one of \['no', 'yes'\]"):
        common.read_tsv(path, "tsv", None)


def test_train_and_dev_have_the_same_columns(tmp_path, tokenizer):
    (tmp_path / "tsv").mkdir()
    write_tsv(tmp_path / "tsv", "text\ttext2\tlabel\na\tb\tyes\nc\td\tno\n")
    (tmp_path / "tsv" / "dev.tsv").write_text("text\tlabel\na\tyes\nc\tno\n")
    with pytest.raises(SystemExit, match="dev.tsv and its train.tsv differ.*no column text2"):
        common.Data("tsv", tmp_path, tokenizer, 64)


def test_no_text(tmp_path):
    (tmp_path / "train.tsv").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(SystemExit, match="cannot be read as text"):
        common.read_tsv(tmp_path / "train.tsv", "sst2", ["0", "1"])
    with pytest.raises(SystemExit, match="No such file"):
        common.read_tsv(tmp_path / "dev.tsv", "sst2", ["0", "1"])


def squad_file(folder, context, answers, text=None):
    qa = {"id": "q7", "question": " Who? ",
          "answers": [{"text": a, "answer_start": at} for a, at in answers]}
    body = {"data": [{"paragraphs": [{"context": context, "qas": [qa]}]}]}
    path = folder / "train-v1.1.json"
    path.write_text(json.dumps(body) if text is None else text)
    return path


def test_squad(tmp_path):
    path = squad_file(tmp_path, "It was Ann.", [("Ann", 7)])
    assert common.read_squad(path) == [("q7", "Who?", "It was Ann.", [("Ann", 7)])]


@pytest.mark.parametrize("context, answers, text, words", [
    ("It was Ann.", [("Ann", 6)], None, "question q7: the context does not hold"),
    ("It was Ann.", [("Ann", -4)], None, "question q7: the context does not hold"),
    ("It was Ann.", [("Bob", -1)], None, "question q7: the context does not hold"),
    ("It was Ann.", [("", 0)], None, "question q7: the context does not hold"),
    ("It was Ann.", [], None, "question q7 has no answer, as in SQuAD 2.0"),
    (None, [("Ann", 7)], None, "SQuAD 1.1's format, at or after question q7"),
    ("It was Ann.", [(None, 7)], None, "SQuAD 1.1's format, at or after question q7"),
    ("", [], "{\"data\": [", "not in SQuAD 1.1's format"),
    ("", [], "{\"rows\": []}", "not in SQuAD 1.1's format"),
])
def test_bad_squad(tmp_path, context, answers, text, words):
    with pytest.raises(SystemExit, match=words):
        common.read_squad(squad_file(tmp_path, context, answers, text))


def test_download_needs_a_network(tmp_path, monkeypatch):
    def refuse(url, path, hash_prefix=None):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    with pytest.raises(SystemExit, match="put it at .*dev-v1.1.json|put it at .*train-v1.1.json"):
        common.download("squad", tmp_path)
    with pytest.raises(SystemExit, match="--preset mini"):
        common.download("sst2", tmp_path)
    with pytest.raises(SystemExit, match="mrpc has no such file to download.*GLUE's own script"):
        common.download("mrpc", tmp_path)


@pytest.mark.parametrize("task, name", [
    ("squad", "squad/train-v1.1.json"), ("squad", "squad/dev-v1.1.json"),
    ("mnli", "glue/MNLI/dev_matched.tsv")])
def test_a_users_own_file_is_not_joined_by_a_download(tmp_path, monkeypatch, task, name):
    monkeypatch.delattr(torch.hub, "download_url_to_file")
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(SystemExit, match="is absent, but its folder holds a file of the same"):
        common.download(task, tmp_path)


def test_download_unpacks(tmp_path, monkeypatch):
    import zipfile

    def deliver(url, path, hash_prefix=None):
        assert url.endswith("/SST-2.zip")
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("SST-2/train.tsv", "sentence\tlabel\na\t1\n")
            archive.writestr("SST-2/dev.tsv", "sentence\tlabel\nb\t0\n")

    monkeypatch.setattr(torch.hub, "download_url_to_file", deliver)
    common.download("sst2", tmp_path)
    assert (tmp_path / "glue/SST-2/dev.tsv").read_text() == "sentence\tlabel\nb\t0\n"


def test_half_a_download_is_thrown_away(tmp_path, monkeypatch):
    def deliver(url, path, hash_prefix=None):
        with open(path, "wb") as file:
            file.write(b"PK, and then the connection broke")

    monkeypatch.setattr(torch.hub, "download_url_to_file", deliver)
    with pytest.raises(SystemExit, match="not downloaded whole"):
        common.download("sst2", tmp_path)
    assert not (tmp_path / "glue" / "SST-2.zip").exists()


# ---- features and batches

def test_windows_of_squad(tokenizer):
    """Windows start 128 tokens apart, hold all of the context, and point at the answer's text."""
    words = ["he", "stole", "a", "drum", "."] * 60
    context = " ".join([*words, "silver mirror", *words])
    at = context.index("silver mirror")
    rows = [("q", "What ?", context, [("silver mirror", at)])]
    features = common.squad_features(rows, tokenizer, 384)
    starts = [next(s for s in f["spans"] if s) for f in features]
    all_tokens = tokenizer(context, add_special_tokens=False, return_offsets_mapping=True)
    offsets = all_tokens["offset_mapping"]
    assert [offsets.index(tuple(s)) for s in starts] == [128 * i for i in range(len(starts))]
    assert max(s[1] for f in features for s in f["spans"] if s) == len(context)
    pointing = 0
    for f in features:
        assert len(f["input_ids"]) == len(f["spans"]) == len(f["token_type_ids"]) <= 384
        first, last = f["start_positions"], f["end_positions"]
        if first == 0:
            begins = [s[0] for s in f["spans"] if s]
            ends = [s[1] for s in f["spans"] if s]
            assert not (begins[0] <= at and at + len("silver mirror") <= ends[-1]) and last == 0
        else:
            pointing += 1
            assert context[f["spans"][first][0]:f["spans"][last][1]] == "silver mirror"
    assert pointing >= 2


@pytest.mark.parametrize("answer", [
    "cafe\u0301",                               # an accent behind its letter
    "dru\u0301m",
    "\u200bdrum\u200b",                         # white space without width
    "drum\ufe0f"])
def test_characters_that_the_tokenizer_drops(tokenizer, answer):
    """The target's span, which is what an evaluation reads, is the answer with them."""
    context = f"he stole a {answer}, \u200b and a mirror\u200b"
    for text in (answer, "stole", "mirror\u200b"):
        rows = [("q", "What ?", context, [(text, context.index(text))])]
        (feature,) = common.squad_features(rows, tokenizer, 128)
        begin, _ = feature["spans"][feature["start_positions"]]
        _, end = feature["spans"][feature["end_positions"]]
        assert context[begin:end] == text


def test_a_dropped_character_has_one_owner():
    """Of abc, tokens a and c: b is a's. Of "a bc", tokens a and c: b is c's."""
    assert common.whole_spans([(0, 1), (2, 3)], "abc") == {(0, 1): (0, 2), (2, 3): (2, 3)}
    assert common.whole_spans([(0, 1), (3, 4)], "a bc") == {(0, 1): (0, 1), (3, 4): (2, 4)}
    # several tokens of one character, as of a Korean syllable
    assert common.whole_spans([(0, 1), (0, 2), (1, 2)], "ab") == {s: s for s in [(0, 1), (0, 2),
                                                                               (1, 2)]}


def test_questions_need_offsets(tokenizer):
    class Slow:
        is_fast = False

    with pytest.raises(SystemExit, match="Slow has none: give a BERT with a fast tokenizer"):
        common.squad_features([], Slow(), 128)


def test_long_question_is_cut(tokenizer):
    question = "who stole a drum " * 40
    rows = [("q", question, "Ann stole a drum.", [("Ann", 0)])]
    (feature,) = common.squad_features(rows, tokenizer, 384)
    assert feature["token_type_ids"].index(1) == 64 + 2         # [CLS], 64 tokens, [SEP]


def test_pairs(tokenizer):
    rows = [("he stole", "a drum", 1)]
    (feature,) = common.text_features(rows, tokenizer, 128)
    tokens = tokenizer.convert_ids_to_tokens(feature["input_ids"])
    assert tokens == ["[CLS]", "he", "stole", "[SEP]", "a", "drum", "[SEP]"]
    assert feature["token_type_ids"] == [0, 0, 0, 0, 1, 1, 1]
    assert feature["labels"] == 1


def test_batches_depend_on_seed_and_step(data, tokenizer):
    task = common.Data("mnli", data, tokenizer, 128)
    first = list(itertools.islice(task.batches(0, 8, 3), 20))
    assert list(itertools.islice(task.batches(11, 8, 3), 9)) == first[11:]
    assert list(itertools.islice(task.batches(0, 8, 4), 20)) != first
    epoch = [id(feature) for batch in first[:8] for feature in batch]
    assert sorted(epoch) == sorted(id(feature) for feature in task.train)       # each row once
    assert sum(first[8:16], []) != sum(first[:8], [])


def test_collate_pads(data, tokenizer):
    """The same tensors as the tokenizer's own pad."""
    task = common.Data("squad", data, tokenizer, 128)
    batch = task.collate(task.train[:5])
    features = [dict(f) for f in task.train[:5]]
    for feature in features:
        del feature["row"], feature["spans"]
    expected = tokenizer.pad(features, return_tensors="pt")
    assert set(batch) == set(expected)
    for key, tensor in batch.items():
        assert tensor.dtype == torch.int64 and torch.equal(tensor, expected[key])
    assert set(task.collate(features, targets=False)) == {
        "input_ids", "token_type_ids", "attention_mask"}
    numbers = [dict(input_ids=[2, 3], token_type_ids=[0, 0], labels=2.5)]
    assert task.collate(numbers)["labels"].dtype == torch.float32


# ---- metrics

def test_em_f1_by_hand():
    assert common.em_f1("The  Silver, mirror!", ["silver mirror"]) == (1.0, 1.0)
    em, f1 = common.em_f1("old silver mirror", ["a mirror", "silver"])
    assert (em, round(f1, 6)) == (0.0, 0.5)                     # precision 1/3, recall 1
    assert common.em_f1("drum", ["mirror"]) == (0.0, 0.0)


def test_squad_metrics_take_the_best_window():
    rows = [("q", "?", "Ann saw Bob", [("Bob", 8)])]
    features = [dict(row=0), dict(row=0), dict(row=0)]
    metrics = common.squad_metrics(rows, features, [(1.0, 0, 3), (2.0, 8, 11), (1.5, 0, 3)])
    assert metrics == {"EM": 100.0, "F1": 100.0}


@pytest.mark.parametrize("longest", [3, 30])
def test_best_spans_against_brute_force(longest):
    torch.manual_seed(0)
    starts, ends = torch.randn(30, 50), torch.randn(30, 50)
    features = []
    for n in [50, 45, 12] * 10:
        spans = [None] * 5 + [(10 * i, 10 * i + 9) for i in range(n - 6)] + [None]
        features.append(dict(spans=spans))
    for row, (score, begin, end) in enumerate(common.best_spans(starts, ends, features, longest)):
        spans = features[row]["spans"]
        best = max((starts[row, i] + ends[row, j], spans[i][0], spans[j][1])
                   for i in range(len(spans)) for j in range(i, min(i + longest, len(spans)))
                   if spans[i] and spans[j])
        assert (begin, end) == best[1:] and abs(score - best[0]) < 1e-5


def test_flat_logits_are_a_collapse():
    """Against numpy, on windows of several lengths; only the context counts."""
    rng = np.random.default_rng(0)
    starts, ends = rng.normal(size=(2, 3, 14))
    features = [dict(spans=[None] * 3 + [(i, i + 1) for i in range(n)] + [None]) for n in (5, 9, 1)]
    inside = [slice(3, 3 + n) for n in (5, 9, 1)]
    expected = [max(starts[i, part].std(), ends[i, part].std()) for i, part in enumerate(inside)]
    alive = common.logit_spread(torch.tensor(starts), torch.tensor(ends), features)
    np.testing.assert_allclose(alive, expected, atol=1e-6)
    assert not common.collapsed_answers(alive.tolist())
    for i, part in enumerate(inside):
        starts[i, part] = 0.2139 + 1e-4 * starts[i, part]
        ends[i, part] = 0.3477
    flat = common.logit_spread(torch.tensor(starts), torch.tensor(ends), features)
    assert common.collapsed_answers(flat.tolist())


def test_glue_metrics_by_hand():
    logits = np.array([[2.0, 1.0], [0.0, 1.0], [0.0, 3.0], [1.0, 0.0]])       # guesses 0 1 1 0
    gold = np.array([0, 1, 0, 1])
    assert common.glue_metrics("sst2", "dev", logits, gold) == {"acc": 50.0}
    assert common.glue_metrics("mnli", "dev_mismatched", logits, gold) == {"acc_mm": 50.0}
    assert common.glue_metrics("qqp", "dev", logits, gold) == {"acc": 50.0, "F1": 50.0}
    assert common.glue_metrics("cola", "dev", logits, gold)["mcc"] == pytest.approx(0.0)
    gold = np.array([0, 1, 1, 1])               # TP 2, TN 1, FN 1: (2 - 0) / sqrt(2 * 3 * 1 * 2)
    mcc = common.glue_metrics("cola", "dev", logits, gold)["mcc"]
    assert mcc == pytest.approx(100 / 3 ** 0.5)
    guesses = np.array([[1.0], [2.0], [2.0], [9.0]])
    metrics = common.glue_metrics("stsb", "dev", guesses, np.array([1.0, 3.0, 2.0, 4.0]))
    assert metrics["spearman"] == pytest.approx(100 * 0.9486833)
    assert metrics["pearson"] == pytest.approx(100 * 12 / (41 * 5) ** 0.5)     # deviations by hand


def test_collapsed():
    assert common.collapsed_classes(np.array([[2.0, 1.0], [0.5, 0.4]]))
    assert not common.collapsed_classes(np.array([[2.0, 1.0], [0.5, 0.6]]))
    assert common.collapsed_classes(np.array([[2.51], [2.5]]))
    assert not common.collapsed_classes(np.array([[2.7], [2.5]]))


# ---- BERT

def test_prunable_and_count(data, tokenizer):
    task = common.Data("tsv", data, tokenizer, 64)
    model = common.load_bert(BERT, task)
    layers = common.prunable(model)
    assert len(layers) == 6 * 4
    assert sum(layer.weight.numel() for layer in layers.values()) == 786432
    assert not any("pooler" in name or "classifier" in name for name in layers)
    first = next(iter(layers.values()))
    with torch.no_grad():
        first.weight[:, :64] = 0
    shares, kept, total = common.count_kept(model)
    zeros = sum(int((layer.weight == 0).sum()) for layer in layers.values())
    assert next(iter(shares.values())) == 0.5
    assert kept == pytest.approx(1 - zeros / 786432) and total == 786432


def test_not_a_bert(tmp_path, data, tokenizer):
    with pytest.raises(SystemExit, match="cannot be loaded"):
        common.load_tokenizer(str(tmp_path / "nothing"))
    (tmp_path / "config.json").write_text("{\"model_type\": \"gpt2\"}")
    with pytest.raises(SystemExit, match="give"):
        common.load_tokenizer(str(tmp_path))
    (tmp_path / "config.json").write_text("{\"model_ty")
    with pytest.raises(SystemExit, match="cannot be loaded"):
        common.load_tokenizer(str(tmp_path))


def test_teacher_must_fit(tmp_path, data, tokenizer):
    task = common.Data("tsv", data, tokenizer, 64)
    with pytest.raises(SystemExit, match="give a model trained on tsv"):
        common.load_bert(BERT, task, teacher=True)              # no head
    model = common.load_bert(BERT, task)
    model.config.finetuning_task = "mnli"
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="was trained on mnli"):
        common.load_bert(str(tmp_path), task, teacher=True)
    task.classes = common.NUMBER                                # as for stsb
    with pytest.raises(SystemExit, match="nothing to distil"):
        common.load_bert(str(tmp_path), task, teacher=True)


def changed_bert(folder, weights=None, **config):
    """A copy of mini's BERT with more weights, or another config."""
    shutil.copytree(BERT, folder, dirs_exist_ok=True)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    if weights:
        own = load_file(folder / "model.safetensors")
        save_file(own | weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


@pytest.mark.parametrize("teacher", [False, True])
def test_classes_in_another_order(tmp_path, data, tokenizer, teacher):
    """The same model: its logits, and the names in its config, are in our order."""
    task = common.Data("tsv", data, tokenizer, 64)
    texts = tokenizer(["he stole 3 drums", "he stole a drum ."], return_tensors="pt", padding=True)
    saved = common.load_bert(BERT, task)
    logits = saved(**texts).logits
    tokenizer.save_pretrained(tmp_path)
    for names, columns in ((["few", "many"], [0, 1]), (["many", "few"], [1, 0]),
                           (["LABEL_0", "LABEL_1"], [0, 1])):
        saved.config.id2label = dict(enumerate(names))
        saved.save_pretrained(tmp_path)
        model = common.load_bert(str(tmp_path), task, teacher)
        assert torch.equal(model(**texts).logits, logits[:, columns])
        assert model.config.id2label == {0: "few", 1: "many"}
        assert model.config.label2id == {"few": 0, "many": 1}
    saved.config.id2label = {0: "no", 1: "yes"}
    saved.save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match=r"has the classes \['no', 'yes'\], and the data \['few'"):
        common.load_bert(str(tmp_path), task, teacher)


def test_weights_that_would_not_be_used(tmp_path, data, tokenizer):
    task = common.Data("tsv", data, tokenizer, 64)
    name = "bert.encoder.layer.0.output.dense.mask_scores"
    folder = changed_bert(tmp_path / "a", {name: torch.ones(2)})
    with pytest.raises(SystemExit, match="mask_scores, which transformers' BERT does not use"):
        common.load_bert(folder, task)
    folder = changed_bert(tmp_path / "b", position_embedding_type="relative_key")
    with pytest.raises(SystemExit, match="position_embedding_type, which"):
        common.load_bert(folder, task)


def test_capitals_are_not_lower_cased(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"aAbBcCdD"]
    folder = changed_bert(tmp_path, vocab_size=len(words))
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(SystemExit, match="capitals in its vocabulary.*do_lower_case"):
        common.load_tokenizer(folder)
    (tmp_path / "tokenizer_config.json").write_text("{\"do_lower_case\": false}")
    assert common.load_tokenizer(folder).tokenize("a A") == ["a", "A"]


def test_evaluate_is_the_plain_models(data, tokenizer):
    """Accuracy by the plain transformers model, one row at a time; evaluate sorts by length."""
    task = common.Data("tsv", data, tokenizer, 64)
    task.rows["dev"].reverse()                  # the long rows come first
    task.dev["dev"].reverse()
    torch.manual_seed(0)
    model = common.load_bert(BERT, task).eval()
    logits = []
    for text, _, _ in task.rows["dev"]:
        logits.append(model(**tokenizer(text, return_tensors="pt")).logits[0].detach().numpy())
    margins = np.stack(logits)[:, 1] - np.stack(logits)[:, 0]
    offset = np.median(margins)                 # half of the guesses become 0
    model.classifier.bias.data[1] -= float(offset)
    gold = np.array([label for _, _, label in task.rows["dev"]])
    right = np.mean((margins > offset) == (gold == 1))
    assert task.evaluate(model) == ({"acc": pytest.approx(100 * right)}, False)
    model.classifier.bias.data[1] += 1000       # now each guess is 1, and half of them are right
    assert task.evaluate(model) == ({"acc": 50.0}, True)
    model.classifier.bias.data[1] = np.nan      # the last step was too long
    with pytest.raises(SystemExit, match="not finite: give a smaller --lr"):
        task.evaluate(model)
