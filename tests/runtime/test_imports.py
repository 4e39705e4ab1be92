"""Tests of the start-up cost: ranks share imports, and CPU runs never import a compiler."""

import json
import re
import subprocess
import sys

import pytest
from tiny import save_dense
from training_runs import tree, write_tokens


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_ranks_import_once_and_no_compiler(tmp_path, precision):
    """These imports took 9 of the 15 s before the first step of a tiny run on four ranks."""
    dense, tokens = save_dense(tmp_path / "dense"), write_tokens(tmp_path / "tokens")
    train = {"steps": 2, "precision": precision}
    settings = tmp_path / "run.yaml"
    settings.write_text(json.dumps(tree(tmp_path / "run", dense, tokens, train=train)))
    command = ["-X", "importtime", "-m", "megatron_moe", "train", str(settings), "--ranks", "2"]
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    imports = re.findall(r"import time:\s+\d+ \|\s+\d+ \|\s*(\S+)", done.stderr)
    assert imports.count("megatron_moe.train.step") == 1
    assert not {"torch._dynamo", "torch._inductor", "transformers"} & set(imports)
    assert not {"ortools", "matplotlib"} & set(imports)
