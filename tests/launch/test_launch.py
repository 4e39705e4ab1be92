"""The launch scripts, run with stand-ins for what they start: argv and environment are recorded."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
LOCAL, SLURM = ROOT / "launch" / "local.sh", ROOT / "launch" / "slurm.sbatch"
AGENT = ROOT / "launch" / "agent.py"
NODES = ROOT / "launch" / "nodes.sh"
ENTRYPOINT = ROOT / "docker" / "entrypoint.sh"
SCRIPTS = sorted([*ROOT.glob("launch/*.sh"), SLURM, ENTRYPOINT])
RECORDER = """\
#!{python}
import json, os, sys
with open({calls!r}, "a") as calls:
    calls.write(json.dumps([sys.argv, dict(os.environ)]) + "\\n")
{then}
"""


class Stage:
    """A folder with a configuration, and a PATH on which some commands are stand-ins."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls_file = folder / "calls.jsonl"
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.config = folder / "run.yaml"
        self.config.touch()
        self.env = {"PATH": f"{self.bin}:/usr/bin:/bin", "HOME": str(folder)}

    def recorder(self, then: str = "") -> str:
        return RECORDER.format(python=sys.executable, calls=str(self.calls_file), then=then)

    def stand_in(self, name: str, then: str = "") -> Path:
        path = self.bin / name
        path.write_text(self.recorder(then))
        path.chmod(0o755)
        return path

    def calls(self, name: str) -> list[tuple[list[str], dict[str, str]]]:
        if not self.calls_file.exists():
            return []
        actual = [json.loads(line) for line in self.calls_file.read_text().splitlines()]
        return [(argv[1:], env) for argv, env in actual if Path(argv[0]).name == name]

    def run(self, *command: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(part) for part in command],
            env=self.env,
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script: Path):
    result = subprocess.run(
        ["shellcheck", "-x", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout


class TestLocal:
    def argv(self, stage: Stage, **env: str) -> tuple[list[str], dict[str, str]]:
        stage.env |= {"PYTHON": str(stage.stand_in("python"))} | env
        result = stage.run(LOCAL, stage.config, "train.steps=3", "run.dir=a b")
        assert result.returncode == 0, result.stderr
        (call,) = stage.calls("python")
        return call

    def expected(self, stage: Stage, ranks: int) -> list[str]:
        torchrun = [str(AGENT), "--standalone", "--nproc-per-node", str(ranks)]
        train = ["-m", "megatron_moe", "train", str(stage.config), "train.steps=3", "run.dir=a b"]
        return [*torchrun, *train]

    def test_one_rank_a_gpu(self, stage: Stage):
        stage.stand_in("nvidia-smi", "print('GPU 0: x\\nGPU 1: y\\nGPU 2: z')")
        argv, _ = self.argv(stage)
        assert argv == self.expected(stage, 3)

    @pytest.mark.parametrize(
        ("visible", "ranks"), [("0,5", 2), ("GPU-8a1b", 1), ("", 1), ("-1", 1)]
    )
    def test_hidden_gpus_get_no_rank(self, stage: Stage, visible: str, ranks: int):
        stage.stand_in("nvidia-smi", "print('GPU 0: x\\n' * 8)")
        argv, _ = self.argv(stage, CUDA_VISIBLE_DEVICES=visible)
        assert argv == self.expected(stage, ranks)

    @pytest.mark.parametrize("driver", [None, "sys.exit(9)"], ids=["no driver", "broken driver"])
    def test_cpu_ranks_where_there_is_no_gpu(self, stage: Stage, driver: str | None):
        if driver:
            stage.stand_in("nvidia-smi", driver)
        argv, _ = self.argv(stage, RANKS="4")
        assert argv == self.expected(stage, 4)

    def test_torchrun_starts_the_entry_point_on_every_rank(self, stage: Stage):
        package = stage.folder / "path" / "megatron_moe"
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
        (package / "__main__.py").write_text(stage.recorder())
        stage.env |= {"PYTHON": sys.executable, "RANKS": "2", "PYTHONPATH": str(package.parent)}
        result = stage.run(LOCAL, stage.config, "run.seed=1")
        assert result.returncode == 0, result.stderr
        calls = stage.calls("__main__.py")
        assert [argv for argv, _ in calls] == [["train", str(stage.config), "run.seed=1"]] * 2
        assert sorted(env["RANK"] for _, env in calls) == ["0", "1"]
        for _, env in calls:
            assert (env["WORLD_SIZE"], env["LOCAL_WORLD_SIZE"]) == ("2", "2")
            assert env["LOCAL_RANK"] == env["RANK"]
            assert env["MASTER_ADDR"]
            assert env["MASTER_PORT"]

    def test_no_configuration_is_two_kinds_of_message(self, stage: Stage):
        usage = stage.run(LOCAL)
        assert (usage.returncode, "launch/local.sh CONFIG.yaml" in usage.stdout) == (2, True)
        missing = stage.run(LOCAL, "no.yaml")
        assert (missing.returncode, "no such configuration: no.yaml" in missing.stderr) == (2, True)


@pytest.fixture
def job(stage: Stage) -> Stage:
    """What SLURM gives the script of a job of 2 nodes with 8 GPUs each."""
    (stage.folder / "launch").symlink_to(ROOT / "launch")
    stage.stand_in("srun")
    stage.stand_in("scontrol", "print('node17\\nnode18')")
    stage.env |= {
        "HEALTH_CHECK": "no",
        "SLURM_SUBMIT_DIR": str(stage.folder),
        "SLURM_JOB_ID": "123456",
        "SLURM_JOB_NODELIST": "node[17-18]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_NTASKS": "16",
        "SLURM_CPUS_PER_TASK": "12",
    }
    return stage


def requeues(job: Stage) -> list[list[str]]:
    return [words for words, _ in job.calls("scontrol") if words[0] == "requeue"]


class TestSlurm:
    train = ("-m", "megatron_moe", "train", "run.yaml", "train.steps=3", "run.dir=a b")
    srun = ("--kill-on-bad-exit=1", "--cpus-per-task=12")

    def argv(self, job: Stage, **env: str) -> tuple[list[str], dict[str, str]]:
        job.env |= env
        result = job.run(SLURM, "run.yaml", "train.steps=3", "run.dir=a b")
        assert result.returncode == 0, result.stderr
        (call,) = job.calls("srun")
        return call

    def test_one_task_a_gpu_that_meets_at_the_first_node(self, job: Stage):
        argv, env = self.argv(job)
        assert argv == [*self.srun, "python", *self.train]
        assert env["MASTER_ADDR"] == "node17"
        assert 20000 <= int(env["MASTER_PORT"]) < 40000
        assert job.calls("scontrol")[0][0] == ["show", "hostnames", "node[17-18]"]

    def test_the_virtual_environment_of_the_repository_is_found(self, job: Stage):
        python = job.folder / ".venv" / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.symlink_to(sys.executable)
        argv, _ = self.argv(job)
        assert argv == [*self.srun, ".venv/bin/python", *self.train]

    def test_a_container_sees_the_repository_and_the_mounts(self, job: Stage):
        argv, _ = self.argv(job, CONTAINER="moe.sqsh", MOUNTS="/data,/scratch")
        here = str(job.folder)
        assert argv == [
            *self.srun,
            "--container-image=moe.sqsh",
            f"--container-workdir={here}",
            f"--container-mounts={here}:{here},/data,/scratch",
            "python",
            *self.train,
        ]

    def test_another_action(self, job: Stage):
        argv, _ = self.argv(job, ACTION="bench")
        assert argv[3:6] == ["-m", "megatron_moe", "bench"]

    def test_every_node_is_looked_at_before_the_ranks_start(self, job: Stage):
        job.env |= {"HEALTH_CHECK": "yes", "SLURM_GPUS_ON_NODE": "8"}
        assert job.run(SLURM, "run.yaml").returncode == 0
        (check, _), (step, _) = job.calls("srun")
        a_task_a_node = ["--ntasks=2", "--ntasks-per-node=1"]
        assert check == [*a_task_a_node, "bash", "launch/node_health.sh", "8", str(job.folder)]
        assert "megatron_moe" in step

    def test_a_sick_node_ends_the_job_before_the_ranks_start(self, job: Stage):
        job.env |= {"HEALTH_CHECK": "yes"}
        job.stand_in("srun", "sys.exit(1)")
        result = job.run(SLURM, "run.yaml")
        assert (result.returncode, "is unhealthy" in result.stderr) == (4, True)
        assert len(job.calls("srun")) == 1

    def test_a_failed_step_fails_the_job(self, job: Stage):
        job.stand_in("srun", "sys.exit(3)")
        assert job.run(SLURM, "run.yaml").returncode == 3

    def test_before_the_time_limit_ranks_save_and_then_the_job_is_requeued(self, job: Stage):
        saves = "import signal, time; signal.signal(signal.SIGUSR1, lambda *_: sys.exit(0));"
        job.stand_in("srun", saves + "print('ready', flush=True); time.sleep(600)")
        process = subprocess.Popen(
            [SLURM, "run.yaml"], env=job.env, cwd=job.folder, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        assert requeues(job) == []
        process.send_signal(signal.SIGUSR1)
        assert process.wait(timeout=300) == 0
        assert requeues(job) == [["requeue", "123456"]]

    @pytest.mark.parametrize("time", ["None", "2026-11-29T04:00:00"])
    def test_a_preempted_job_is_requeued_although_its_ranks_saved(self, job: Stage, time: str):
        job.stand_in("scontrol", f"print('node17 PreemptTime={time}')")
        assert job.run(SLURM, "run.yaml").returncode == 0
        assert requeues(job) == ([["requeue", "123456"]] if time != "None" else [])

    def test_a_name_that_only_slurm_knows_becomes_an_address(self, job: Stage):
        job.stand_in(
            "scontrol", "print('NodeAddr=10.0.0.7 x' if 'node' in sys.argv else 'no-such-host')"
        )
        _, env = self.argv(job)
        assert env["MASTER_ADDR"] == "10.0.0.7"

    def test_a_save_that_takes_too_long_is_given_up(self, job: Stage):
        deaf = (
            "import os, signal, time; signal.signal(signal.SIGUSR1, signal.SIG_IGN);"
            "print('ready', flush=True)\n"
            "while not os.path.exists('end'): time.sleep(0.05)"
        )
        job.stand_in("srun", deaf)
        job.env["SAVE_SECONDS"] = "1"
        process = subprocess.Popen(
            [SLURM, "run.yaml"], env=job.env, cwd=job.folder, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGUSR1)
        wait_until(lambda: len(requeues(job)) == 1)
        assert process.poll() is None, "requeued while the step was still there"
        (job.folder / "end").touch()
        assert process.wait(timeout=300) == 0
        assert len(requeues(job)) == 1, "requeued once"

    @pytest.mark.parametrize(
        ("remove", "config", "message"),
        [
            ("launch", "run.yaml", "submit from the root of the repository"),
            ("nothing", "no.yaml", "no such configuration: no.yaml"),
        ],
    )
    def test_mistakes_stop_before_srun(self, job: Stage, remove: str, config: str, message: str):
        (job.folder / remove).unlink(missing_ok=True)
        result = job.run(SLURM, config)
        assert (result.returncode, message in result.stderr) == (2, True)
        assert job.calls("srun") == []

    def test_sbatch_directives_ask_for_what_the_script_relies_on(self):
        lines = SLURM.read_text().splitlines()
        directives = [line for line in lines if line.startswith("#SBATCH")]
        assert {
            "#SBATCH --requeue",
            "#SBATCH --signal=B:USR1@300",
            "#SBATCH --ntasks-per-node=8",
            "#SBATCH --gpus-per-node=8",
        } <= set(directives)
        # sbatch stops reading directives at the first command.
        first_command = next(i for i, line in enumerate(lines) if line and line[0] != "#")
        assert all(lines.index(directive) < first_command for directive in directives)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, as a container starts with")
@pytest.mark.parametrize(
    ("user", "owner", "becomes"), [(0, 12345, 12345), (0, 0, 0), (777, 12345, 777)]
)
def test_a_container_runs_as_the_owner_of_the_mounted_folder(user: int, owner: int, becomes: int):
    """Docker run with and without --user: the run folder takes files in the first and last case."""
    mounted = Path(tempfile.mkdtemp(dir="/tmp"))  # tmp_path is for one user only
    try:
        os.chown(mounted, owner, owner)
        mounted.chmod(0o777 if user else 0o755)
        script = mounted / "entrypoint.sh"  # others may not read this checkout
        shutil.copy(ENTRYPOINT, script)
        who = ["bash", "-c", "id -u; id -g; touch written"]
        actual = subprocess.run(
            ["setpriv", "--reuid", str(user), "--regid", str(user), "--clear-groups", script, *who],
            cwd=mounted, capture_output=True, text=True, check=False, timeout=300,
        )  # fmt: skip
        assert actual.stdout.split() == [str(becomes)] * 2, actual.stderr
        assert (mounted / "written").stat().st_uid == becomes
    finally:
        shutil.rmtree(mounted)


class TestNodes:
    def test_it_says_what_it_needs(self, stage: Stage):
        assert stage.run(NODES).returncode == 2
        result = stage.run(NODES, stage.config)
        assert (result.returncode, "set NNODES" in result.stderr) == (2, True)
        stage.env |= {"NNODES": "2", "MASTER_ADDR": "no-such-host.invalid"}
        result = stage.run(NODES, stage.config)
        assert result.returncode == 2
        assert "MASTER_ADDR (no-such-host.invalid) cannot be resolved on" in result.stderr

    @pytest.mark.parametrize(
        ("master", "endpoint"), [("127.0.0.1", "localhost:7"), ("192.0.2.7", "192.0.2.7:7")]
    )
    def test_machines_meet_at_one_of_them(self, stage: Stage, master: str, endpoint: str):
        then = "if sys.argv[1] == '-c': sys.argv = sys.argv[2:]; exec(sys.orig_argv[3])"
        stage.env |= {
            "PYTHON": str(stage.stand_in("python", then)), "NNODES": "2", "RANKS": "4",
            "MASTER_ADDR": master, "MASTER_PORT": "7", "JOB_ID": "a b", "NODE_ADDR": "10.0.0.7",
        }  # fmt: skip
        result = stage.run(NODES, stage.config, "run.dir=a b")
        assert result.returncode == 0, result.stderr
        argv, env = stage.calls("python")[-1]
        assert argv == [
            str(ROOT / "launch" / "agent.py"), "--nnodes", "2", "--nproc-per-node", "4",
            "--rdzv-backend", "c10d_limited", "--rdzv-endpoint", endpoint, "--rdzv-id", "a b",
            "--rdzv-conf", "last_call_timeout=30", "--max-restarts", "3",
            "--local-addr", "10.0.0.7",
            "-m", "megatron_moe", "train", str(stage.config), "run.dir=a b",
        ]  # fmt: skip
        assert "MASTER_ADDR" not in env


HEALTH = ROOT / "launch" / "node_health.sh"


@pytest.mark.parametrize(
    ("answer", "gpus", "message"),
    [
        ("print('0\\n' * 8)", 8, None),
        ("print('[N/A]\\n' * 8)", 8, None),
        ("print('0\\n' * 7)", 8, "7 of 8 GPUs respond"),
        ("print('0\\n' * 7 + '3')", 8, "uncorrected memory errors"),
        ("sys.exit(9)", 8, "nvidia-smi fails"),
        ("sys.exit(9)", 0, None),
    ],
)
def test_node_health(stage: Stage, answer: str, gpus: int, message: str | None):
    stage.stand_in("nvidia-smi", answer)
    result = stage.run(HEALTH, gpus, stage.folder)
    assert result.returncode == (0 if message is None else 1)
    assert (message or "") in result.stderr
    assert not list(stage.folder.glob(".node_health*"))


def test_a_file_system_that_takes_no_file_is_sick(stage: Stage):
    result = stage.run(HEALTH, 0, stage.folder / "not mounted")
    assert (result.returncode, "cannot write to" in result.stderr) == (1, True)


def test_the_kubernetes_job_fits_its_configuration():
    job, runtime, policy = yaml.safe_load_all((ROOT / "launch" / "kubernetes.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    reference = job["spec"]["runtimeRef"]
    assert (runtime["kind"], runtime["metadata"]["name"]) == (reference["kind"], reference["name"])
    trainer = job["spec"]["trainer"]
    path = next(word for word in trainer["args"] if word.startswith("configs/"))
    gpus = trainer["numNodes"] * trainer["numProcPerNode"]
    assert gpus == int(Path(path).stem.rpartition("-")[2])
    assert runtime["spec"]["mlPolicy"]["numNodes"] == trainer["numNodes"]
    assert trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"] == trainer["numProcPerNode"]
    assert (ROOT / path).exists()
    settings = {entry["name"]: entry["value"] for entry in trainer["env"]}
    assert settings["GLOO_SOCKET_IFNAME"] == settings["NCCL_SOCKET_IFNAME"]
    (pods,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    pod = pods["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert (pods["name"], container["name"]) == ("node", "node")  # the operator looks for them
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
    (ingress,) = policy["spec"]["ingress"]
    assert ingress["from"] == [{"podSelector": policy["spec"]["podSelector"]}]
    assert list(policy["spec"]["podSelector"]["matchLabels"].values()) == [job["metadata"]["name"]]


def test_torchrun_takes_its_place_from_the_operator(stage: Stage):
    """Kubeflow Trainer sets PET_*; the command in launch/kubernetes.yaml has no options."""
    package = stage.folder / "path" / "megatron_moe"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(stage.recorder())
    stage.env |= {
        "PYTHONPATH": str(package.parent), "PET_NNODES": "1", "PET_NPROC_PER_NODE": "2",
        "PET_NODE_RANK": "0", "PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": "29517",
    }  # fmt: skip
    job = next(yaml.safe_load_all((ROOT / "launch" / "kubernetes.yaml").read_text()))
    command, *words = [*job["spec"]["trainer"]["command"], *job["spec"]["trainer"]["args"]]
    assert command == "torchrun"
    result = stage.run(Path(sys.executable).with_name("torchrun"), *words)
    assert result.returncode == 0, result.stderr
    calls = stage.calls("__main__.py")
    assert sorted(env["RANK"] for _, env in calls) == ["0", "1"]
    assert all(argv == job["spec"]["trainer"]["args"] for argv, _ in calls)
    assert {env["MASTER_PORT"] for _, env in calls} == {"29517"}


def wait_until(condition, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("NNODES", value) for value in ("abc", "0", "-1", "2:1", "1:", "1.5")),
        *(("RANKS", value) for value in ("0", "-1", "abc", "2.5")),
        ("RESTARTS", "-1"), ("RESTARTS", "x"), ("MASTER_PORT", "99999"), ("MASTER_PORT", "0"),
        ("LAST_CALL", "x"), ("LAST_CALL", "-3"),
    ],
)  # fmt: skip
def test_a_wrong_number_is_refused_before_torchrun_starts(stage: Stage, name: str, value: str):
    stage.env |= {"PYTHON": sys.executable, "NNODES": "2", "MASTER_ADDR": "localhost"} | {
        name: value
    }
    for script in (NODES, LOCAL) if name == "RANKS" else (NODES,):
        result = stage.run(script, stage.config)
        assert result.returncode == 2
        assert f"launch/{script.name}: {name} ({value}) must be " in result.stderr
