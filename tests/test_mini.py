"""mini/ is what mini/make.py makes, and as large as it may be."""
import subprocess
import sys
from pathlib import Path

MINI = Path(__file__).resolve().parent.parent / "mini"


def held(folder):
    return [p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts]


def test_the_data_are_made_again(tmp_path):
    """Byte for byte; not the model, which takes more than half an hour."""
    ended = subprocess.run([sys.executable, MINI / "make.py", "--data_only", "--out", tmp_path], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    made = [p.relative_to(tmp_path) for p in held(tmp_path)]
    assert len(made) == 8 and all((tmp_path / p).read_bytes() == (MINI / p).read_bytes() for p in made)


def test_its_size():
    assert sum(p.stat().st_size for p in held(MINI)) <= 12e6
