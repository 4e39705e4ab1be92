"""Tests of the statements of docs/security.md that no other test makes."""

import ast
import base64
import json
import os
import re
import shutil
import stat
import subprocess
from dataclasses import fields
from datetime import timedelta
from inspect import signature
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist
import yaml
from commands import run_command
from ranks import run_on_ranks
from tiny import save_dense, save_tokenizer
from training_runs import tree, write_tokens

from megatron_moe.cli import main
from megatron_moe.commands.verify import verify
from megatron_moe.config.load import load
from megatron_moe.config.run import Log, RunConfig
from megatron_moe.data.chat import ChatTokenizer
from megatron_moe.data.messages import Dialogue
from megatron_moe.errors import ConfigError, UserError
from megatron_moe.hf.checksums import write_checksums
from megatron_moe.hf.load import load_model
from megatron_moe.hf.spec import read_spec
from megatron_moe.runtime.world import World
from megatron_moe.train import watch
from megatron_moe.train.verdict import Report

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "megatron_moe"
PAGE = ROOT / "docs" / "security.md"
MODULES = sorted(PACKAGE.rglob("*.py"))


def calls(path: Path) -> list[tuple[str, dict[str, str]]]:
    """Return each call of a module: the function as written, and its keyword arguments."""
    return [
        (ast.unparse(node.func), {k.arg or "**": ast.unparse(k.value) for k in node.keywords})
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
    ]


def modules_that_import(*names: str) -> set[str]:
    """Return the modules that import one of these packages, anywhere in them."""
    result = set()
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            imported: list[str] = []
            if isinstance(node, ast.Import):
                imported = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                imported = [node.module or ""]
            if any(name == n or name.startswith(f"{n}.") for name in imported for n in names):
                result.add(path.relative_to(PACKAGE).as_posix())
    return result


@pytest.mark.parametrize("statement", re.findall(r"`(tests/\S+\.py)::(\w+)`", PAGE.read_text()))
def test_the_page_names_tests_that_exist(statement: tuple[str, str]):
    file, name = statement
    functions = {
        node.name
        for node in ast.walk(ast.parse((ROOT / file).read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    assert name in functions


def test_each_row_of_the_page_names_a_test():
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    statements = [row for row in rows if not row.startswith(("| statement", "| who", "| ---"))]
    assert len(statements) > 10
    assert all(re.search(r"`tests/|no test: ", row) for row in statements)
    assert sum("no test: " in row for row in statements) == 1, "NCCL's ports, which need GPUs"


def test_only_the_watch_listens():
    """No other module opens a port or speaks a network protocol."""
    servers = {
        path.relative_to(PACKAGE).as_posix()
        for path in MODULES
        for name, _ in calls(path)
        if name.endswith(("create_server", ".listen", "socketpair", "create_connection"))
        or name == "socket.socket"
    }
    assert servers == {"train/port.py"}
    protocols = ("http", "urllib.request", "requests", "httpx", "aiohttp", "socketserver")
    assert modules_that_import(*protocols, "ftplib", "smtplib", "xmlrpc", "asyncio") == set()


def test_nothing_read_is_executed():
    """No function that can run what a file contains is called."""
    for path in MODULES:
        for name, keywords in calls(path):
            where = f"{path.relative_to(ROOT)}: {name}"
            assert name not in ("eval", "exec", "os.system", "compile", "__import__"), where
            assert name not in ("pickle.load", "pickle.loads", "yaml.unsafe_load"), where
            if name == "torch.load":
                assert keywords.get("weights_only") == "True", where
            if name in ("np.load", "numpy.load"):
                assert "allow_pickle" not in keywords, where
            if name.endswith(".from_pretrained"):
                assert keywords.get("trust_remote_code") == "False", where
                assert keywords.get("local_files_only") == "True", where
    assert modules_that_import("pickle", "marshal", "shelve", "dill") == {"checkpoint/index.py"}


@pytest.mark.parametrize("place", ["file", "override"])
def test_yaml_constructs_no_objects(tmp_path: Path, place: str):
    evidence = tmp_path / "evidence"
    payload = f"!!python/object/apply:os.system ['touch {evidence}']"
    path = tmp_path / "run.yaml"
    path.write_text(f"run: {payload}\n" if place == "file" else "run: {}\n")
    with pytest.raises((ConfigError, yaml.YAMLError)):
        load(RunConfig, path, [f"run.dir={payload}"] if place == "override" else [])
    assert not evidence.exists()


def test_code_beside_a_model_is_not_executed(tmp_path: Path):
    """config.json may name Python modules of its folder, which transformers offers to run."""
    folder, evidence = save_dense(tmp_path / "dense"), tmp_path / "evidence"
    (folder / "modeling_own.py").write_text(f"open({str(evidence)!r}, 'w')\nclass Own: pass\n")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "modeling_own.Own",
        "AutoModelForCausalLM": "modeling_own.Own",
        "AutoTokenizer": ["modeling_own.Own", None],
    }
    for model_type in (config["model_type"], "own"):
        config["model_type"] = model_type
        (folder / "config.json").write_text(json.dumps(config))
        try:
            load_model(folder, device="cpu")
            read_spec(folder)
        except (UserError, ValueError):
            assert model_type == "own", "a known architecture is read with transformers' own code"
        assert not evidence.exists()


def test_checksums_are_no_signature(tmp_path: Path):
    """Whoever can write to a folder can write checksums that fit."""
    path = tmp_path / "weights"
    path.write_bytes(b"as written")
    write_checksums(tmp_path, {})
    path.write_bytes(b"as changed")
    (result,) = verify(tmp_path, lambda *_: None)
    assert result.problems
    (tmp_path / "CHECKSUMS").unlink()
    write_checksums(tmp_path, {})
    (result,) = verify(tmp_path, lambda *_: None)
    assert not result.problems


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('touch EVIDENCE').read() }}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_a_chat_template_runs_in_a_sandbox(tmp_path: Path, template: str):
    """Inside it a template cannot reach Python's objects, or other files."""
    text, evidence = tmp_path / "text", tmp_path / "evidence"
    text.write_text("one two three")
    template = template.replace("EVIDENCE", str(evidence))
    tokenizer = ChatTokenizer(save_tokenizer(tmp_path, [text], chat_template=template))
    dialogue = Dialogue([{"role": "user", "content": "one"}], [])
    try:
        rendered = tokenizer._render(dialogue, 1)
    except ValueError:  # the template was stopped
        rendered = ""
    assert rendered == "", "unsafe attributes are undefined values"
    assert not evidence.exists()


def test_nothing_is_sent_unless_asked():
    """Packages that can send or download are imported for a setting or an option alone."""
    importing = {
        name: {
            path.relative_to(PACKAGE).as_posix()
            for path in MODULES
            for called, _ in calls(path)
            if called.endswith("import_module") and f'"{name}' in path.read_text()
        }
        | modules_that_import(name)
        for name in ("wandb", "mlflow", "lm_eval", "huggingface_hub")
    }
    assert importing == {
        "wandb": {"rules/installed.py", "train/sinks.py"},
        "mlflow": {"rules/installed.py", "train/sinks.py"},
        "lm_eval": {"evaluate/harness.py"},
        "huggingface_hub": {"commands/hub.py", "evaluate/harness.py"},
    }
    assert Log().wandb_project is None
    assert Log().mlflow_experiment is None
    assert signature(main.export).parameters["push_to_hub"].default is None


def test_reports_hold_no_data():
    """They are not encrypted."""
    names = {field.name for field in fields(Report)}
    assert names == {"rank", "host", "step", "stage", "moves", "where", "waiting", "resident"}


@pytest.mark.distributed
def test_the_secret_is_not_in_the_store(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(watch, "new_secret", lambda: SECRET)
    run_on_ranks(_keeps_its_secret, world_size=2)


SECRET = b"the-secret-of-this-job-32-bytes."


def _keeps_its_secret(world: World) -> None:
    assert world.reports is not None
    with watch.Watch(world, hang_seconds=60, observe=watch.unobserved):
        dist.barrier()
        stored = (world.reports / "rendezvous").read_bytes()
        assert b"rank" in stored or len(stored) > 100, "it holds the keys of all ranks"
        assert SECRET not in stored
        assert SECRET.hex().encode() not in stored
        assert base64.b64encode(SECRET) not in stored
        dist.barrier()


def test_a_slurm_job_has_its_nodes_for_itself():
    lines = (ROOT / "launch" / "slurm.sbatch").read_text().splitlines()
    assert "#SBATCH --exclusive" in lines


def test_torchs_rendezvous_store_answers_anyone():
    """The page warns of it. If torch begins to authenticate, the page should say so."""
    seconds = timedelta(seconds=120)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=seconds)
    own = {
        c.laddr.ip
        for c in psutil.Process().net_connections(kind="tcp")
        if c.status == psutil.CONN_LISTEN and c.laddr.port == store.port
    }
    assert own & {"::", "0.0.0.0"}, "it listens on all interfaces, whatever MASTER_ADDR is"
    store.set("key", "value")
    stranger = dist.TCPStore("127.0.0.1", store.port, is_master=False, timeout=seconds)
    assert stranger.get("key") == b"value"


@pytest.mark.distributed
def test_local_ranks_meet_in_a_private_folder():
    run_on_ranks(_meets_in_private, world_size=2)


def _meets_in_private(world: World) -> None:
    assert world.reports is not None
    assert stat.S_IMODE(world.reports.stat().st_mode) == 0o700
    assert (world.reports / "rendezvous").exists()
    dist.barrier()  # gloo fails a rank whose peer ends while it still connects


def _has_network_namespaces() -> bool:
    if shutil.which("unshare") is None or shutil.which("ip") is None or os.geteuid() != 0:
        return False
    tried = subprocess.run(["unshare", "--net", "true"], capture_output=True, check=False)
    return tried.returncode == 0


@pytest.mark.distributed
@pytest.mark.skipif(not _has_network_namespaces(), reason="needs root and network namespaces")
def test_a_run_on_one_machine_needs_no_network(tmp_path: Path):
    """Train, export and verify in a namespace that has nothing but a loopback interface."""
    dense, tokens = save_dense(tmp_path / "dense"), write_tokens(tmp_path / "tokens")
    settings = tree(tmp_path / "run", dense, tokens, train={"steps": 2})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    for command in ("train run.yaml --ranks 2", "export run --out hf", "verify hf"):
        done = run_command(*command.split(), cwd=tmp_path, prepare=_leave_network, check=True)
    assert "hf: intact" in done.stdout


def _leave_network() -> None:
    os.unshare(os.CLONE_NEWNET)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
