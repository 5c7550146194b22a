"""`submit`: jobs against golden files, their syntax, and what a RayJob of KubeRay must have. Nothing is submitted."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from runner.__main__ import main
from runner.cluster import jobs
from runner.config import compose
from runner.errors import UserError

GOLDEN = Path(__file__).parent / "golden" / "jobs"
ROOT = Path("/shared/my runner")
OWN = {"image": "registry.example/runner:0.1.0"}
CASES = [(recipe, cluster) for recipe in ("qwen3_235b_int4", "kimi_k2_int4") for cluster in ("slurm", "k8s")]


def _job(recipe: str, cluster: str, *more: str) -> jobs.Job:
    typed = [f"recipe={recipe}", *more]
    return jobs.render(compose.load([*typed, f"cluster={cluster}"]).config, typed, OWN, ROOT)


@pytest.mark.parametrize(("recipe", "cluster"), CASES)
def test_golden(recipe: str, cluster: str) -> None:
    text, file = _job(recipe, cluster).text, GOLDEN / f"{recipe}.{'sbatch' if cluster == 'slurm' else 'yaml'}"
    if os.environ.get("RUNNER_UPDATE_GOLDEN"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    assert text == file.read_text()


@pytest.mark.parametrize("typed", ["steps=3", "task.train_path='/data/my file; rm -rf $HOME'"])
def test_bash_reads_the_script_as_it_was_meant(typed: str) -> None:
    text = _job("qwen3_235b_int4", "slurm", typed).text
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    (line,) = [line for line in text.splitlines() if line.startswith("python -m runner ")]
    script = f'address=head:6379 run=run_name=x\nfor word in {line.removesuffix("&")}; do printf "%s\\n" "$word"; done'
    words = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout.splitlines()
    assert words[:4] == ["python", "-m", "runner", "recipe=qwen3_235b_int4"] and words[4] == typed
    assert words[5:] == ["cluster=ray", "cluster.nodes=8", "cluster.gpus_per_node=8", "cluster.address=head:6379", "run_name=x"]


def test_the_token_is_in_no_argument() -> None:
    text = _job("qwen3_235b_int4", "slurm").text
    assert "umask 077" in text and text.index("umask 077") < text.index("token_hex") < text.index("ray start")
    assert "RAY_AUTH_TOKEN=" not in text


@pytest.mark.parametrize("recipe", ["qwen3_235b_int4", "kimi_k2_int4"])
def test_a_rayjob_has_what_kuberay_asks_for(recipe: str) -> None:
    cfg = compose.load([f"recipe={recipe}"]).config
    manifest = yaml.safe_load(_job(recipe, "k8s").text)
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayJob")
    spec: dict[str, Any] = manifest["spec"]
    assert spec["submissionMode"] == "SidecarMode" and spec["backoffLimit"] == 0
    cluster = spec["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    (workers,) = cluster["workerGroupSpecs"]
    assert workers["replicas"] == workers["minReplicas"] == workers["maxReplicas"] == cfg.cluster.nodes
    for group in (cluster["headGroupSpec"], workers):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert container["resources"]["limits"] == container["resources"]["requests"] and container["image"] == OWN["image"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())  # KubeRay takes strings only
        assert all(isinstance(variable["value"], str) for variable in container["env"])
    assert workers["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "8"


def test_what_it_refuses(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="is no scheduler"):
        jobs.render(compose.load(["recipe=qwen3_235b_int4"]).config, [], {}, ROOT)
    assert main(["submit", "recipe=kimi_k2_int4", "cluster=k8s", "--dry-run"]) == 2
    assert "needs an image" in capsys.readouterr().err
    monkeypatch.setenv("PATH", "")
    assert main(["submit", "recipe=kimi_k2_int4", "cluster=slurm"]) == 2
    assert "sbatch is not installed here" in capsys.readouterr().err


def test_a_dry_run_prints_the_job(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", "recipe=kimi_k2_int4", "cluster=slurm", "time=01:00:00", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("#!/bin/bash") and "--nodes=32" in printed and "--time=01:00:00" in printed
    assert "cluster=slurm" not in printed and "time=01:00:00 " not in printed.split("python -m runner ")[1]
