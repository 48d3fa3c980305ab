"""mini/ is what mini/make.py makes, and as large as it may be."""
import sys

from conftest import ROOT, start

MINI = ROOT / "mini"


def files(folder):
    return [p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts]


def test_the_data_are_made_again(tmp_path):
    """Byte for byte; not the model, which takes more than half an hour."""
    process = start([sys.executable, MINI / "make.py", "--data_only", "--out", tmp_path])
    assert process.returncode == 0, process.stderr
    made = [p.relative_to(tmp_path) for p in files(tmp_path)]
    assert len(made) == 10
    assert all((tmp_path / p).read_bytes() == (MINI / p).read_bytes() for p in made)


def test_its_size():
    assert sum(p.stat().st_size for p in files(MINI)) <= 13e6
