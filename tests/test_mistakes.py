"""A user's mistake ends in one sentence, without a traceback, and touches nothing."""
import importlib
import shutil

import pytest
from conftest import ROOT, arguments, start_script
from transformers import BertConfig, BertForPreTraining

BERT = ROOT / "mini" / "bert"


def fails(method, data, out, *flags):
    """The sentence with which a run in this process ends."""
    script = importlib.import_module(method)
    with pytest.raises(SystemExit) as error:
        script.main(script.flags().parse_args(arguments(data, out, *flags)))
    assert not (out / "result.json").exists() and not (out / "model.safetensors").exists()
    return str(error.value)


@pytest.mark.parametrize("flags, words", [
    (["--device", "cuda:9"], "--device cuda:9 is not there"),
    (["--device", "toaster"], "--device toaster is not there"),
    (["--model", "no/such/folder"], "cannot be loaded"),
    (["--teacher", str(BERT)], "give a model trained on squad"),
    (["--task", "sst2"], "SST-2/train.tsv"),
    (["--resume"], "holds no unfinished run"),
    (["--lr", "1e9"], "the loss is"),
    (["--t_i", "0.7"], "--t_i 0.7 leaves no steps to prune in: give less than 0.7"),
])
def test_sentence(data, tmp_path, flags, words):
    sentence = fails("magnitude", data, tmp_path / "out", *flags)
    assert words in sentence and "\n" not in sentence


@pytest.mark.parametrize("method, flag, bad", [
    ("magnitude", "--sparsity", ["0", "97", "nan"]), ("magnitude", "--steps", ["0", "1.5", "many"]),
    ("magnitude", "--batch_size", ["-1"]), ("magnitude", "--lr", ["0", "inf"]),
    ("magnitude", "--seed", ["-1"]), ("magnitude", "--checkpoint_every", ["0"]),
    ("mvp", "--score_lr", ["-1"]), ("mvp", "--t_i", ["0", "2"]),
    ("soft_mvp", "--penalty", ["0"]), ("l0", "--penalty", ["-1"]),
    ("mgpp", "--mix", ["0", "2"]), ("mgpp", "--spike", ["0"]), ("mgpp", "--interval", ["0"]),
    ("rpp", "--gamma", ["0"]), ("rpp", "--pretrain_steps", ["0"]), ("rpp", "--rounds", ["0"])])
def test_numbers_out_of_range(method, flag, bad, capsys):
    for text in bad:
        with pytest.raises(SystemExit) as error:
            importlib.import_module(method).flags().parse_args([flag, text])
        assert error.value.code == 2 and flag in capsys.readouterr().err.strip().split("\n")[-1]


@pytest.mark.parametrize("method", ["mvp", "soft_mvp", "l0", "mgpp"])
def test_dense_is_magnitude_py(data, tmp_path, method):
    assert "magnitude.py" in fails(method, data, tmp_path / "out", "--sparsity", "1")


def test_keep_is_sparsity():
    assert importlib.import_module("mvp").flags().parse_args(["--keep", "0.2"]).sparsity == 0.2


def test_out_is_a_file(data, tmp_path):
    (tmp_path / "out").write_text("mine")
    assert "something other than a run" in fails("mvp", data, tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_out_with_something_else(data, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    assert "something other than a run" in fails("mvp", data, tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_out_with_a_log_of_something_else(data, tmp_path):
    (tmp_path / "log.jsonl").write_text('{"loss": 1}\n')
    for flags in ([], ["--resume"]):
        assert "something other than a run" in fails("mvp", data, tmp_path, *flags)
    assert (tmp_path / "log.jsonl").read_text() == '{"loss": 1}\n'


def test_out_is_the_model(data, tmp_path):
    shutil.copytree(BERT, tmp_path / "bert")
    (tmp_path / "bert" / "log.jsonl").write_text("")
    before = (tmp_path / "bert" / "model.safetensors").read_bytes()
    script = importlib.import_module("mvp")
    for flag in ("--model", "--teacher"):
        words = arguments(data, tmp_path / "bert", flag, tmp_path / "bert")
        with pytest.raises(SystemExit, match="give another"):
            script.main(script.flags().parse_args(words))
    assert (tmp_path / "bert" / "model.safetensors").read_bytes() == before


def test_rpp_mistakes(data, tmp_path):
    assert "nothing.txt" in fails("rpp", data, tmp_path / "a", "--corpus", "nothing.txt")
    (tmp_path / "empty.txt").write_text(" \n")
    assert "is empty" in fails("rpp", data, tmp_path / "b", "--corpus", tmp_path / "empty.txt")
    assert "cannot be loaded" in fails("rpp", data, tmp_path / "c", "--support", "nowhere")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "log.jsonl").write_text('{"args": {"script": "rpp"}}')
    assert "holds the --support" in fails("rpp", data, tmp_path / "d", "--support", tmp_path / "d")
    shutil.copytree(BERT, tmp_path / "d" / "support")       # a run would write its own there
    for flag in ("--support", "--model"):
        sentence = fails("rpp", data, tmp_path / "d", flag, tmp_path / "d" / "support")
        assert "give another" in sentence
    assert (tmp_path / "d" / "support" / "model.safetensors").exists()
    needs = fails("rpp", data, tmp_path / "e", "--preset", "paper", "--model", str(BERT))
    assert "give --corpus FILE" in needs
    assert "--nip" in fails("rpp", data, tmp_path / "f", "--nip", "--gamma", "1e-3")


def test_rpp_pretraining_batch_over_processes(data, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "do not split evenly over 3" in fails("rpp", data, tmp_path / "out")


@pytest.mark.parametrize("changes", [
    {"num_hidden_layers": 2}, {"max_position_embeddings": 256}, {}])
def test_support_of_another_shape(data, tmp_path, changes):
    """Too few layers, too many positions, or no weights in the encoder."""
    model = BertForPreTraining(BertConfig.from_pretrained(BERT, **changes))
    weights = model.state_dict()
    if not changes:
        weights = {name: x for name, x in weights.items() if "encoder" not in name}
    model.save_pretrained(tmp_path / "support", state_dict=weights)
    sentence = fails("rpp", data, tmp_path / "out", "--support", tmp_path / "support")
    assert "does not fit --model" in sentence


def test_advice_on_the_complement(data, tmp_path, capsys):
    from conftest import run

    run("magnitude", data, tmp_path, "--sparsity", "0.97")
    lines = capsys.readouterr().out.split("\n")
    assert "keeps 97.00%" in lines[0] and "did you mean 0.03?" in lines[1]


def test_from_the_command_line(data, tmp_path):
    process = start_script("l0", data, tmp_path, "--sparsity", "1")
    assert process.returncode == 1 and "Traceback" not in process.stderr
    assert process.stderr.strip().count("\n") == 0
    process = start_script("l0", data, tmp_path, "--sparsity", "3")
    assert process.returncode == 2 and "Traceback" not in process.stderr


def test_paper_preset_without_a_network(data, tmp_path):
    process = start_script("soft_mvp", data, tmp_path, "--preset", "paper")
    assert process.returncode == 1 and "Traceback" not in process.stderr
    assert "--preset mini" in process.stderr
