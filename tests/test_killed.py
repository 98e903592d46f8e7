"""Every command, killed at a random moment of its writing, leaves nothing or all of its output."""

import json
import subprocess
import sys
from pathlib import Path

from families import make
from gguf import GGUFReader
from peft import LoraConfig
from safetensors.torch import load_file
from test_stream import scattered_plan
from transformers import AutoModelForCausalLM

from secateur.checkpoint.stream import stored_tensors
from secateur.discovery import discover

# Forked from one process with all imports; killed within seconds after the first file is there, most often soon.
SCRIPT = """
import json, os, random, signal, sys, time
from pathlib import Path
import gguf, peft, transformers
from secateur import cli, pipeline

place = Path(sys.argv[1])
for number, command in enumerate(json.loads(sys.argv[2])):
    out = place / f"out{number}"
    if (child := os.fork()) == 0:
        sys.argv = ["secateur", *command, "-o", str(out)]
        cli.main()
        os._exit(0)
    ended, wait = 0, 3 * random.random() ** 3
    while not ended and not list(place.glob(f".{out.name}.secateur-*/*")):
        time.sleep(0.002)
        ended, _ = os.waitpid(child, os.WNOHANG)
    time.sleep(wait)
    if not ended:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    print("killed", json.dumps({"output": str(out), "wait": wait, "ended": bool(ended)}), flush=True)
"""


def test_any_command_killed_while_it_writes_leaves_nothing_or_everything(checkpoint_folder, text_file, tmp_path):
    groups = discover(make("llama", hidden_size=48, intermediate_size=96, num_hidden_layers=3))
    scattered_plan(groups, ("ffn_channel",)).save(tmp_path / "plan.json")
    plan, data = str(tmp_path / "plan.json"), str(text_file)
    arguments = [
        ["prune", "--plan", plan],  # without loading the model
        ["prune", "--plan", plan, "--dtype", "float32"],
        ["recover", "--data", data, "--seq-len", "32", "--steps", "1", "--batch-size", "2", "--micro-batch-size", "2"],
        [
            "tune",
            "--data",
            data,
            "--init-rank",
            "4",
            "--target-rank",
            "2",
            "--seq-len",
            "32",
            "--steps",
            "3",
            "--batch-size",
            "2",
            "--micro-batch-size",
            "2",
            "--text",
            data,
        ],
        ["export", "--to", "gguf"],
        ["export", "--to", "vllm"],
    ]
    commands = json.dumps([[verb, str(checkpoint_folder), *flags] for verb, *flags in arguments])
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path), commands], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    killed = [json.loads(line.partition(" ")[2]) for line in done.stdout.splitlines() if line.startswith("killed ")]
    assert len(killed) == len(arguments) and not all(row["ended"] for row in killed), (done.stdout, done.stderr)
    for row in killed:
        output = Path(row["output"])
        assert not row["ended"] or output.exists(), (row, done.stderr)
        if output.exists():
            check_whole(output)


def check_whole(output):
    """A folder that holds what the commands write."""
    assert json.loads((output / "results.json").read_text())
    if (output / "model.gguf").exists():
        assert GGUFReader(output / "model.gguf").tensors
    elif (output / "adapter_config.json").exists():
        assert LoraConfig.from_pretrained(output).r == 2 and load_file(output / "adapter_model.safetensors")
    else:
        assert stored_tensors(output) and AutoModelForCausalLM.from_pretrained(output)
