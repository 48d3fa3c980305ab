"""What only a machine with CUDA can show; elsewhere skipped. All other tests run on the CPU."""
import importlib
import json
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import METHODS, ROOT, arguments, start
from safetensors.torch import load_file

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU (CUDA)")
FLAGS = ["--sparsity", "0.1", "--steps", "20"]
PRETRAIN = {"rpp": ["--pretrain_steps", "4"]}


def on_device(method, data, out, device, *flags):
    words = [*arguments(data, out, *FLAGS, *PRETRAIN.get(method, [])), "--device", device, *flags]
    return [sys.executable, f"{method}.py", *words]


def result_of(folder):
    return json.loads((folder / "result.json").read_text())


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("v", [0.9, 0.5, 0.1, 0.03, 0.004])
def test_masks_on_the_card_equal_those_on_the_cpu(scope, v):
    """With ties and without, where the k-th is nearer to the largest and to the smallest."""
    mvp = importlib.import_module("mvp")
    torch.manual_seed(0)
    plain = [torch.randn(64, 64), 2 * torch.randn(256, 64), torch.randn(64, 256) - 1]
    for scores in (plain, [s.round() for s in plain]):
        masks = []
        for device in ("cpu", "cuda"):
            there = [s.to(device) for s in scores]
            masked = [mvp.Masked(s) for s in there]
            mvp.update_masks(masked, there, v, scope)
            masks.append([m.mask.cpu() for m in masked])
        assert all(map(torch.equal, *masks))


def test_no_step_of_ranking_waits_for_the_card():
    mvp = importlib.import_module("mvp")
    scores = [torch.randn(64, 64, device="cuda"), torch.randn(256, 64, device="cuda")]
    masked = [mvp.Masked(s) for s in scores]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for scope in ("local", "global"):
            mvp.update_masks(masked, scores, 0.1, scope)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("method", METHODS)
def test_twenty_steps_on_the_card(data, tmp_path, method):
    """fp32 under --preset mini, so the same losses as on a CPU, to rounding that training grows."""
    for device in ("cpu", "cuda"):
        process = start(on_device(method, data, tmp_path / device, device))
        assert process.returncode == 0, process.stderr
    result = result_of(tmp_path / "cuda")
    assert result["kept"] == pytest.approx(0.1, abs=1e-3)
    assert result["precision"] == "fp32" and result["peak_memory"] > 0
    assert result["card"] == torch.cuda.get_device_name(0)
    if method == "l0":
        return                                          # a card draws its gates from other numbers
    weights = [load_file(tmp_path / device / "model.safetensors") for device in ("cpu", "cuda")]
    apart = [(weights[0][key] - weights[1][key]).abs().flatten() for key in weights[0]
             if not key.endswith("key.bias")]           # its gradient is rounding alone
    assert (torch.cat(apart) > 1e-3).float().mean() < 0.05


@pytest.mark.parametrize("method", METHODS)
def test_killed_and_resumed_on_the_card(data, tmp_path, method):
    """Equal bytes are not promised on CUDA, where sums have no fixed order: the goal is."""
    command = on_device(method, data, tmp_path, "cuda", "--checkpoint_every", "3")
    process = subprocess.Popen([str(w) for w in command], cwd=ROOT, stdout=subprocess.DEVNULL)
    while not list(tmp_path.glob("*.pt")) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process = start([*command, "--resume"])
    assert process.returncode == 0 and "goes on from step" in process.stdout, process.stderr
    assert result_of(tmp_path)["kept"] == pytest.approx(0.1, abs=1e-3)
