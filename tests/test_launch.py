"""The files that start runs: manifests against the schema of their kinds, scripts by shellcheck and by running them."""

import importlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from transformer.arguments import TrainOptions, parse
from transformer.config import validate
from transformer.parallel.processes import find_processes

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
MANIFESTS = sorted(LAUNCH.glob("*.yaml"))


def job_set(document: Any) -> Any:
    """Reads a JobSet as its generated API does, which knows every field of it and of the pods in it."""
    models = importlib.import_module("kubeflow_trainer_api.models.jobset_v1alpha2_job_set")
    return models.JobsetV1alpha2JobSet.from_dict(document)


def unknown(given: Any, understood: Any, path: str = "") -> list[str]:
    """Returns the paths of a document that its schema has left out: it does not know them."""
    if isinstance(given, dict) and isinstance(understood, dict):
        missing = [f"{path}.{name}" for name in given if name not in understood]
        return missing + [
            found
            for name in given
            if name in understood
            for found in unknown(given[name], understood[name], f"{path}.{name}")
        ]
    if isinstance(given, list) and isinstance(understood, list) and len(given) == len(understood):
        return [
            found
            for i, pair in enumerate(zip(given, understood, strict=True))
            for found in unknown(*pair, f"{path}[{i}]")
        ]
    return [] if given == understood else [path]


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_a_manifest_fits_its_schema(path: Path) -> None:
    for document in yaml.safe_load_all(path.read_text()):
        assert (document["apiVersion"], document["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
        assert unknown(document, json.loads(job_set(document).to_json())) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("backoffLimit: 0", "backofLimit: 0"),
        ("restartPolicy: Never", "restartPolice: Never"),
        ("maxRestarts: 100", "maxRestarts: often"),
        ("containerPort: 8482", "containerPort: 8482a"),
        ("          operator: In", "          operators: In"),
    ],
)
def test_a_manifest_that_does_not_fit_is_found(old: str, new: str) -> None:
    text = (LAUNCH / "jobset_gpu.yaml").read_text()
    assert old in text
    document = yaml.safe_load(text.replace(old, new))
    try:
        understood = json.loads(job_set(document).to_json())
    except ValueError:
        return
    assert unknown(document, understood)


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_a_manifest_starts_a_run(path: Path) -> None:
    document = yaml.safe_load(path.read_text())
    [replicated] = document["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    [container] = pod["containers"]
    assert job["completionMode"] == "Indexed" and job["completions"] == job["parallelism"] and job["backoffLimit"] == 0
    # What a restart would repeat ends all; everything else starts all again.
    [rule] = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["values"] == [2, 3] and rule["onExitCodes"]["containerName"] == container["name"]
    [hopeless] = document["spec"]["failurePolicy"]["rules"]
    assert (hopeless["action"], hopeless["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    assert pod["restartPolicy"] == "Never" and pod["terminationGracePeriodSeconds"] >= 60
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes

    options = parse(TrainOptions, container["args"], "train.py")
    validate(options.config)
    environ = {item["name"]: item["value"] for item in container.get("env", [])}
    if "google.com/tpu" in container["resources"]["limits"]:
        chips = [int(size) for size in pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")]
        assert job["parallelism"] * container["resources"]["limits"]["google.com/tpu"] == chips[0] * chips[1] * chips[2]
        assert options.config.parallel.replica == replicated["replicas"]
        environ |= {"TPU_WORKER_HOSTNAMES": "one,two", "TPU_WORKER_ID": "1", "MEGASCALE_NUM_SLICES": "2"}
        assert find_processes(options.config, environ) == {}
    else:
        assert replicated["replicas"] == 1 and int(environ["JAX_NUM_PROCESSES"]) == job["parallelism"]
        found = find_processes(options.config, environ | {"JOB_COMPLETION_INDEX": str(job["parallelism"] - 1)})
        first = f"{document['metadata']['name']}-{replicated['name']}-0-0.{document['metadata']['name']}"
        assert found is not None and found["coordinator_address"].split(":")[0] == first


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_sound(path: Path) -> None:
    subprocess.run(["bash", "-n", path], check=True)
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert shellcheck is not None, "the extra `test` has it"
    done = subprocess.run([shellcheck, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert os.access(path, os.X_OK) and path.read_text().startswith("#!/usr/bin/env bash\n")


def fake(directory: Path, name: str, body: str) -> None:
    """Puts a program on the path that writes its arguments to a log, and does `body`."""
    directory.mkdir(exist_ok=True)
    (directory / name).write_text(f'#!/usr/bin/env bash\nprintf "%s " {name} "$@" >> "$LOG"; echo >> "$LOG"\n{body}\n')
    (directory / name).chmod(0o755)


def run(tmp_path: Path, *command: str, **environ: str) -> tuple[int, str, list[str]]:
    """Runs a script with the programs of `fake`; returns its status, its output and the log."""
    log = tmp_path / "log"
    log.unlink(missing_ok=True)
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command,
        env=os.environ | {"PATH": path, "LOG": str(log)} | environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout, log.read_text().splitlines() if log.exists() else []


@pytest.mark.parametrize(("status", "again"), [(0, False), (2, False), (3, False), (5, True), (143, True), (1, True)])
def test_slurm_starts_again_what_can_go_on(status: int, again: bool, tmp_path: Path) -> None:
    fake(tmp_path / "bin", "srun", f"exit {status}")
    fake(tmp_path / "bin", "scontrol", "")
    script = str(LAUNCH / "slurm.sh")
    slurm = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "7"}
    found, _, log = run(tmp_path, script, "--workdir", "a b", **slurm)
    assert re.fullmatch(r"srun .*--label python train.py --workdir a b ", log[0])
    assert log[1:] == ["scontrol requeue 7 "] * again
    assert found == (0 if again else status)
    found, output, log = run(tmp_path, script, **slurm, SLURM_RESTART_COUNT="3", MAX_RESTARTS="3")
    assert found == status and len(log) == 1
    assert ("no more" in output) == again


def test_options_of_sbatch_are_known_ones() -> None:
    lines = re.findall(r"^#SBATCH --([a-z-]+)", (LAUNCH / "slurm.sh").read_text(), re.MULTILINE)
    known = "job-name nodes gpus-per-node ntasks-per-node exclusive time signal requeue open-mode output".split()
    assert lines == known


def test_restart_goes_on_until_the_command_is_finished(tmp_path: Path) -> None:
    fake(tmp_path / "bin", "work", 'case $(wc -l < "$LOG") in 1) exit 5 ;; 2) kill -ABRT $$ ;; *) exit 0 ;; esac')
    script = str(LAUNCH / "restart.sh")
    status, output, log = run(tmp_path, script, "work", "a b", RESTART_PAUSE_SECONDS="0")
    assert (status, log) == (0, ["work a b "] * 3) and "restart 2 of 100" in output
    fake(tmp_path / "bin", "work", "exit 2")
    assert run(tmp_path, script, "work")[::2] == (2, ["work "])
    fake(tmp_path / "bin", "work", "exit 4")
    status, output, log = run(tmp_path, script, "work", RESTART_PAUSE_SECONDS="0", MAX_RESTARTS="1")
    assert (status, len(log)) == (4, 2) and "no more" in output


def test_restart_passes_a_signal_on_and_ends(tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    body = f"import pathlib, signal, sys, time; signal.signal(15, lambda *_: sys.exit(143)); pathlib.Path({str(flag)!r}).touch(); time.sleep(100)"
    process = subprocess.Popen([LAUNCH / "restart.sh", sys.executable, "-c", body])
    while not flag.exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143


def test_tpu_vm_calls_every_worker(tmp_path: Path) -> None:
    fake(tmp_path / "bin", "gcloud", "")
    script = str(LAUNCH / "tpu_vm.sh")
    calls = {
        ("setup", "pod", "us-east5-a"): ["scp", "ssh"],
        ("start", "pod", "us-east5-a", "--config", "llama_1b", "--workdir", "/shared/a b"): ["ssh"],
        ("status", "pod", "us-east5-a"): ["ssh"],
        ("stop", "pod", "us-east5-a"): ["ssh"],
    }
    for arguments, expected in calls.items():
        status, output, log = run(tmp_path, script, *arguments)
        assert status == 0, output
        found = [line.split() for line in log if line.startswith("gcloud")]
        assert [words[4] for words in found] == expected
        assert all("--worker all" in " ".join(words) and "us-east5-a" in words for words in found)
    _, _, log = run(tmp_path, script, *list(calls)[1])
    [line] = [line for line in log if "restart.sh" in line]
    words = shlex.split(line.replace("&", ";"))
    assert words[words.index("train.py") + 1 :][:4] == ["--config", "llama_1b", "--workdir", "/shared/a b"]
    for arguments in ([], ["start", "pod", "zone"], ["nothing", "pod", "zone"]):
        status, output, log = run(tmp_path, script, *arguments)
        assert (status, log) == (2, []) and "tpu_vm.sh start" in output


def test_the_container_has_what_a_run_needs() -> None:
    """Its structure: no builder is at hand where tests run."""
    text = (LAUNCH / "Dockerfile").read_text()
    lines = [line for line in re.sub(r"\\\n", "", text).splitlines() if line and not line.startswith("#")]
    instructions = [line.split(maxsplit=1) for line in lines]
    assert [
        name for name, _ in instructions
    ] == "FROM ARG ENV WORKDIR COPY COPY COPY RUN COPY COPY COPY ENTRYPOINT".split()
    assert re.search(r"^FROM python:3\.12-slim$", text, re.MULTILINE), "as constraints/jax-0.12.txt needs"
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    for name, rest in instructions:
        if name == "COPY":
            for source in rest.split()[:-1]:
                assert (ROOT / source).exists(), source
                assert f"!{source.split('/')[0]}" in ignored, f".dockerignore leaves out {source}"
    extras = re.findall(r'"\.\[(.*)\]"', text)[0].replace("${ACCELERATOR}", "tpu").split(",")
    project = (ROOT / "pyproject.toml").read_text()
    assert all(re.search(rf"^{extra} = \[", project, re.MULTILINE) for extra in [*extras, "cuda"])
    assert json.loads(instructions[-1][1]) == ["python", "train.py"]
