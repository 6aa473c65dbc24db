"""Runs in object stores: what is spooled and uploaded, and whole runs on servers that speak the protocols of gs:// and s3://.

The servers come from the packages gcp-storage-emulator and moto; without them, and the extras gcs and s3, runs are not tested.
"""

import json
import os
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

import fsspec
import pytest
from running import ROOT, SAMPLES, TIMES

from transformer.checkpointing.places import Spool
from transformer.config import Config, ConfigError, place, replace, to_json

Make = Callable[..., Config]


@pytest.fixture
def memory() -> Iterator[Any]:
    store = fsspec.filesystem("memory")
    yield store
    if store.exists("/bucket"):
        store.rm("/bucket", recursive=True)


def test_what_has_changed_is_uploaded_whole_and_config_json_last(
    memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[str] = []
    put = type(memory).put_file
    monkeypatch.setattr(
        type(memory), "put_file", lambda self, local, path: (sent.append(Path(path).name), put(self, local, path))
    )
    spool = Spool("memory://bucket/run", tmp_path / "run")
    (spool.files / "tokenizer").mkdir()
    for name in ("config.json", "corpus.json", "tokenizer/tokenizer.json", "metrics.jsonl", ".partial"):
        (spool.files / name).write_text(name)
    spool.upload()
    assert (
        sorted(sent) == ["config.json", "corpus.json", "metrics.jsonl", "tokenizer.json"] and sent[-1] == "config.json"
    )
    sent.clear()
    spool.upload()
    assert not sent
    with (spool.files / "metrics.jsonl").open("a") as file:
        file.write(" and more")
    spool.upload()
    assert sent == ["metrics.jsonl"]
    assert memory.cat_file("/bucket/run/metrics.jsonl") == b"metrics.jsonl and more"

    # Another process, another day: what makes it a run, and what the run goes on with.
    memory.pipe_file("/bucket/run/loss.png", b"drawn anew")
    again = Spool("memory://bucket/run", tmp_path / "again")
    again.fetch(resumes=True)
    found = {str(path.relative_to(again.files)) for path in again.files.rglob("*") if path.is_file()}
    assert found == {"config.json", "corpus.json", "tokenizer/tokenizer.json", "metrics.jsonl"}
    sent.clear()
    again.upload()
    assert not sent, "what was just downloaded"
    reader = Spool("memory://bucket/run", tmp_path / "reader")
    reader.fetch(resumes=False)
    assert not (reader.files / "metrics.jsonl").exists()


def test_checkpoints_without_a_run_are_seen(memory: Any, tmp_path: Path) -> None:
    memory.pipe_file("/bucket/run/checkpoints/3/a", b"")
    spool = Spool("memory://bucket/run", tmp_path / "run")
    spool.fetch(resumes=True)
    assert (spool.files / "checkpoints").is_dir()


def test_a_store_that_fails_is_an_error_of_the_disk(memory: Any, tmp_path: Path) -> None:
    spool = Spool("memory://bucket/run", tmp_path / "run")
    with pytest.raises(OSError, match=r"the object store failed: .*no network") as raised, spool.told():
        raise RuntimeError("no network")
    assert raised.value.filename == "memory://bucket/run"


def test_urls_that_name_no_directory_here() -> None:
    with pytest.raises(ConfigError, match="'ftp://a/b': a path begins with gs:// or s3://, or is local"):
        place("ftp://a/b")
    with pytest.raises(ConfigError, match="name a bucket and a directory in it, gs://BUCKET/DIRECTORY"):
        place("gs://bucket/")
    assert place("~/run") == Path.home() / "run"


@pytest.mark.parametrize(("package", "url"), [("gcsfs", "gs://a/b"), ("s3fs", "s3://a/b")])
def test_a_client_that_is_missing(package: str, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=f"needs the package {package}: pip install -e"):
        place(url)


# Servers.


@dataclass
class Server:
    bucket: str
    """URL of an empty bucket."""
    environ: dict[str, str]
    """How every client in another process finds the server, with no account."""


def _port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _know_generations(objects: Any, patch: pytest.MonkeyPatch) -> None:
    """Gives the emulator what clients rely on and it lacks: generations of what is read, and conditions on them."""

    def generation(query: Any, storage: Any) -> str:
        name = query.params.get("object_id") or query.query.get("name", [None])[0] or query.data["meta"]["name"]
        try:
            return storage.get_file_obj(query.params["bucket_name"], name)["generation"]
        except objects.NotFound:
            return "0"

    def download(query: Any, response: Any, storage: Any, *others: Any, wrapped: Any = objects.download) -> None:
        wrapped(query, response, storage, *others)
        response["x-goog-generation"] = generation(query, storage)

    def conditional(upload: Any) -> Any:
        def checked(query: Any, response: Any, storage: Any) -> Any:
            wanted = query.query.get("ifGenerationMatch", [None])[0]
            if wanted is not None and wanted != generation(query, storage):
                response.status = HTTPStatus.PRECONDITION_FAILED
                return None
            return upload(query, response, storage)

        return checked

    patch.setattr(objects, "download", download)
    for name in ("_media_upload", "_multipart_upload"):
        patch.setattr(objects, name, conditional(getattr(objects, name)))


@pytest.fixture(params=["gs", "s3"])
def server(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    port = _port()
    url = f"http://127.0.0.1:{port}"
    if request.param == "gs":
        pytest.importorskip("gcsfs", reason="extra gcs")
        emulator = pytest.importorskip("gcp_storage_emulator.server")
        _know_generations(emulator.objects, monkeypatch)
        running = emulator.create_server("127.0.0.1", port, in_memory=True)
        running.start()
        body = json.dumps({"name": "bucket"}).encode()
        make = urllib.request.Request(f"{url}/storage/v1/b?project=p", body, {"Content-Type": "application/json"})
        environ = dict.fromkeys(
            ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL", "CLOUD_STORAGE_EMULATOR_ENDPOINT"), url
        )
        environ |= {"GOOGLE_CLOUD_PROJECT": "p", "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}
    else:
        pytest.importorskip("s3fs", reason="extra s3")
        running = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", port, verbose=False)
        running.start()
        make = urllib.request.Request(f"{url}/bucket", method="PUT")
        environ = {"AWS_ENDPOINT_URL": url, "AWS_DEFAULT_REGION": "us-east-1"}
        environ |= {"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "key"}
    urllib.request.urlopen(make).close()
    yield Server(f"{request.param}://bucket", environ)
    running.stop()


PATIENCE = """
from transformer.checkpointing import lease
lease.RENEWAL, lease.EXPIRY, lease.SETTLING = 0.5, 5, 0.5
"""
DIES = f"""{PATIENCE}
import os, signal
from transformer.training.loop import Loop
settle = Loop._settle

def dies(self, pending):
    if pending and pending[0] == 10:
        self.checkpoints.wait()
        os.kill(os.getpid(), signal.SIGKILL)
    return settle(self, pending)

Loop._settle = dies
"""


def lines(text: str) -> list[dict[str, Any]]:
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in text.splitlines()]


@pytest.mark.slow
def test_a_killed_run_goes_on_in_a_store(
    server: Server, make_run: Make, start_training: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    config = make_run(tracking={"plot": False, "tensorboard": True}, train={"num_steps": 14}, evaluation=SAMPLES)
    (tmp_path / "tmp").mkdir()
    environ = server.environ | {"TMPDIR": str(tmp_path / "tmp")}
    url: Any = f"{server.bucket}/runs/tiny"

    killed = start_training(config, url, before=DIES, **environ)
    output, _ = killed.communicate(timeout=600)
    assert killed.returncode == -9, output
    resumed = start_training(config, url, before=PATIENCE, **environ)
    output, _ = resumed.communicate(timeout=600)
    assert resumed.returncode == 0, output
    assert f"{url} was in use at" in output and "resuming after step 8 of 14" in output, output
    assert f"finished: {url} holds the run" in output
    undisturbed = start_training(config, tmp_path / "local")
    assert undisturbed.wait(600) == 0

    # A reader in a process of its own: what stands in the store, and what the verbs make of it.
    program = (
        "import json, sys\nfrom transformer.config import place\nfrom transformer.cli import run\nroot = place(sys.argv[1])\n"
        "print(json.dumps({'metrics': (root / 'metrics.jsonl').read_text(),\n"
        "    'steps': sorted(path.name for path in (root / 'checkpoints').iterdir()),\n"
        "    'files': sorted(path.name for path in root.iterdir())}))\n"
        "sys.exit(run(['evaluate', '--workdir', sys.argv[1], '--json']))"
    )
    done = [
        subprocess.run(
            [sys.executable, "-c", program, str(where)],
            env=os.environ | environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=600,
        )
        for where in (url, tmp_path / "local")
    ]
    assert [process.returncode for process in done] == [0, 0], done[0].stderr + done[1].stderr
    (stored, measured), (local, measured_locally) = [map(json.loads, process.stdout.splitlines()) for process in done]
    assert lines(stored["metrics"]) == lines(local["metrics"])
    assert stored["steps"] == local["steps"]
    assert set(local["files"]) - set(stored["files"]) <= {".lock"} and ".lock" not in stored["files"]
    assert measured == measured_locally
    assert len(list((tmp_path / "tmp").glob("transformer-*"))) == 1, "only what was killed leaves its local copy"


@pytest.mark.slow
def test_published_data_trains_without_the_text(
    server: Server, make_run: Make, start_training: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    config = make_run(train={"num_steps": 4}, evaluation={"sample_tokens": 0})
    url = f"{server.bucket}/corpus"
    (tmp_path / "recipe.json").write_text(to_json(config))
    program = "import sys; from transformer.cli import run; sys.exit(run(sys.argv[1:]))"
    command = ["prepare", "--config", str(tmp_path / "recipe.json"), "--publish", url]
    environ = server.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", program, *command], env=os.environ | environ, check=True, timeout=600)
    assert start_training(config, tmp_path / "local").wait(600) == 0

    (tmp_path / "corpus.jsonl").unlink()
    reads = replace(config, data={"prepared": url, "cache_dir": str(tmp_path / "pod")})
    process = start_training(reads, tmp_path / "reads", **server.environ)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    how = f"read in {url}" if url.startswith("gs://") else f"copied from {url} to {tmp_path / 'pod'}"
    assert f"MiB of tokens, {how}" in output
    assert bool(list((tmp_path / "pod").rglob("*.array_record"))) == url.startswith("s3://")
    read, local = ((tmp_path / name / "metrics.jsonl").read_text() for name in ("reads", "local"))
    assert lines(read) == lines(local)
