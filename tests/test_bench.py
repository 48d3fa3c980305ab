"""tests/bench.py: its turns are turns, and it times the steps of two scripts."""
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import bench                                            # noqa: E402


def test_the_baton_goes_round_and_is_dropped():
    baton, seen = bench.Baton(["a", "b"]), []

    def run(row, steps):
        baton.wait(row)
        for step in range(steps):
            seen.append(row)
            baton.pass_on()
            if step < steps - 1:
                baton.wait(row)
        baton.drop(row)
    threads = [threading.Thread(target=run, args=args) for args in (("a", 2), ("b", 4))]
    for t in threads:
        t.start()
    for t in threads:
        t.join(10)
    assert seen == list("ababbb")


def test_two_scripts_in_turn(tmp_path):
    spec = bench.SHAPES["mini"] | dict(folder=str(tmp_path), device="cpu", steps=4, batch_size=4)
    bench.lay_out("mini", spec)
    found = bench.measure(spec, ["dense", "mvp"])
    assert set(found) == {"dense", "mvp", "bytes"} and 1e8 < found["bytes"] < 2e10
    assert all(len(found[row]) == 4 and min(found[row]) > 0 for row in ("dense", "mvp"))
