"""Jobs for schedulers that start a Ray and a run on it: an sbatch script, a KubeRay RayJob. Nothing here talks to a scheduler."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from runner.config.choices import LauncherKind
from runner.config.schema import Config
from runner.errors import UserError

LOCK = "constraints-gpu.txt"  # what the nodes' environment was installed from
STORE_GIB = 64  # of Ray's object store on each node
PORT, FIRST_PORT, LAST_PORT = 6379, 20000, 24999  # workers' ports: below the kernel's own range, above Ray's
GRACE_SECONDS = 900  # before the time limit: enough to finish a step and save
SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_USE_UVLOOP": "0",
    "RAY_worker_niceness": "0",
    "RAY_worker_register_timeout_seconds": "120",
    "RAY_gcs_server_request_timeout_seconds": "120",
    "RAY_gcs_rpc_server_connect_timeout_s": "60",
}
OWN = {
    "time": "slurm: the time limit, 24:00:00",
    "partition": "slurm: the partition",
    "image": "k8s: the image of every pod, made by the Dockerfile",
    "claim": "k8s: the PersistentVolumeClaim of outputs_dir, runner-outputs",
    "rdma": "k8s: the resource of a node's RDMA devices, rdma/ib; none: none",
    "namespace": "k8s: where the job goes",
}


@dataclass(frozen=True)
class Job:
    """`text` as the scheduler's `program` reads it from stdin."""

    text: str
    program: list[str]


def render(cfg: Config, overrides: list[str], own: dict[str, str], root: Path) -> Job:
    """The job that runs this config. `overrides`: what was typed, without `cluster=`; `root`: the checkout that it runs in."""
    if cfg.cluster.launcher not in RENDERED:
        raise UserError(f"cluster={cfg.cluster.name} is no scheduler", key="cluster", fix="cluster=slurm or cluster=k8s")
    return RENDERED[cfg.cluster.launcher](cfg, overrides, own, root)


def name_of(cfg: Config) -> str:
    """Of the job and of the run's folder."""
    return cfg.run_name or (cfg.recipe if cfg.recipe != "none" else cfg.model.name)


def lock_of(root: Path) -> str:
    """`constraints-gpu.txt 1a2b3c4d` of the checkout; what it was installed from is not known without one."""
    path = root / LOCK
    return f"{LOCK} {hashlib.blake2b(path.read_bytes(), digest_size=4).hexdigest()}" if path.is_file() else "no lock file"


def command(cfg: Config, overrides: list[str], address: str, run: str) -> str:
    """The run, as a shell line. `address` and `run` are shell words."""
    kept = " ".join(shlex.quote(item) for item in overrides if not item.startswith(("run_name=", "resume=", "cluster.address=")))
    nodes = f"cluster.nodes={cfg.cluster.nodes} cluster.gpus_per_node={cfg.cluster.gpus_per_node}"
    return f"python -m runner {kept} cluster=ray {nodes} cluster.address={address} {run}"


def slurm(cfg: Config, overrides: list[str], own: dict[str, str], root: Path) -> Job:
    """The batch script runs on the allocation's first node, Ray's head; the driver is its child, and gets the TERM."""
    cluster, name = cfg.cluster, name_of(cfg)
    partition = f"\n#SBATCH --partition={own['partition']}" if own.get("partition") else ""
    settings = " ".join(f"{key}={value}" for key, value in SETTINGS.items())
    text = f"""#!/bin/bash
# {name}: {cluster.nodes} nodes of {cluster.gpus_per_node} GPUs. Environment: .venv, {lock_of(root)}.
# Submitted with RESUME=1 in its environment it goes on from the last checkpoint.
#SBATCH --job-name=runner-{name}
#SBATCH --nodes={cluster.nodes} --ntasks-per-node=1 --gpus-per-node={cluster.gpus_per_node} --exclusive
#SBATCH --time={own.get("time", "24:00:00")} --signal=B:TERM@{GRACE_SECONDS} --open-mode=append
#SBATCH --output={name}_%j.log{partition}
set -euo pipefail
umask 077
cd {shlex.quote(str(root))}
export PATH=$PWD/.venv/bin:$PATH
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$PWD/.ray_token_$SLURM_JOB_ID
export {settings}
python -c 'import secrets; print(secrets.token_hex(32), end="")' > "$RAY_AUTH_TOKEN_PATH"
trap 'rm -f "$RAY_AUTH_TOKEN_PATH"' EXIT
ulimit -n 65536 || true
ulimit -l unlimited || true
host=$(getent ahostsv4 "$SLURMD_NODENAME" | awk 'NR == 1 {{ print $1 }}')
address=$host:{PORT}
options=(
  --num-gpus={cluster.gpus_per_node} --temp-dir="/tmp/r$SLURM_JOB_ID" --block
  --min-worker-port={FIRST_PORT} --max-worker-port={LAST_PORT} --object-store-memory=$(({STORE_GIB} << 30))
)
srun --overlap -N1 -n1 -w "$SLURMD_NODENAME" \\
  ray start --head --node-ip-address="$host" --port={PORT} --include-dashboard=false "${{options[@]}}" &
if [ "$SLURM_NNODES" -gt 1 ]; then
  others=$((SLURM_NNODES - 1))
  srun --overlap -N$others -n$others -x "$SLURMD_NODENAME" \\
    bash -c 'until ray start --address="$0" "$@"; do sleep 3; done' "$address" "${{options[@]}}" &
fi
until (exec 3<> "/dev/tcp/$host/{PORT}") 2> /dev/null; do sleep 1; done
run=run_name={name}
[ -z "${{RESUME:-}}" ] || run=resume={name}
{command(cfg, overrides, '"$address"', '"$run"')} &
driver=$!
trap 'kill -TERM "$driver"' TERM
code=0
while kill -0 "$driver" 2> /dev/null; do wait "$driver" && code=0 || code=$?; done
exit "$code"
"""
    return Job(text, ["sbatch"])


def k8s(cfg: Config, overrides: list[str], own: dict[str, str], root: Path) -> Job:
    """A RayJob: KubeRay 1.6 makes the token's Secret, the cluster, and removes it. The run's folder is a volume of all pods."""
    cluster, name = cfg.cluster, name_of(cfg)
    if not own.get("image"):
        raise UserError("a job of Kubernetes needs an image", key="image", fix="image=<registry>/runner:<tag>, of the Dockerfile")
    memory = int(cluster.host_memory_gib * 0.93)
    mounts = [{"name": "shm", "mountPath": "/dev/shm"}, {"name": "outputs", "mountPath": "/outputs"}]

    def pod(title: str, limits: dict[str, str], shm: int) -> dict[str, Any]:
        container = {
            "name": title,
            "image": own["image"],
            "env": [{"name": key, "value": value} for key, value in SETTINGS.items()],
            "resources": {"limits": dict(limits), "requests": dict(limits)},
            "securityContext": {"capabilities": {"add": ["IPC_LOCK"]}},
            "volumeMounts": [dict(mount) for mount in mounts],
        }
        volumes = [
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{shm}Gi"}},
            {"name": "outputs", "persistentVolumeClaim": {"claimName": own.get("claim", "runner-outputs")}},
        ]
        return {"spec": {"containers": [container], "volumes": volumes}}

    gpus = str(cluster.gpus_per_node)
    devices = {"cpu": str(16 * max(1, cluster.gpus_per_node)), "memory": f"{memory}Gi", "nvidia.com/gpu": gpus}
    if (rdma := own.get("rdma", "rdma/ib")) != "none":
        devices[rdma] = gpus
    manifest = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": f"runner-{name.replace('_', '-').lower()}", "annotations": {"runner/lock": lock_of(root)}},
        "spec": {
            "entrypoint": command(cfg, ["outputs_dir=/outputs", *overrides], "$RAY_ADDRESS", f"run_name={name}"),
            "submissionMode": "SidecarMode",
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 600,
            "backoffLimit": 0,
            "rayClusterSpec": {
                "rayVersion": version("ray"),
                "authOptions": {"mode": "token"},
                "headGroupSpec": {
                    "rayStartParams": {"num-gpus": "0", "num-cpus": "0"},
                    "template": pod("ray-head", {"cpu": "16", "memory": "128Gi"}, 32),
                },
                "workerGroupSpecs": [
                    {
                        "groupName": "nodes",
                        "replicas": cluster.nodes,
                        "minReplicas": cluster.nodes,
                        "maxReplicas": cluster.nodes,
                        "rayStartParams": {"num-gpus": gpus},
                        "template": pod("ray-worker", devices, memory // 2),
                    }
                ],
            },
        },
    }
    if own.get("namespace"):
        manifest["metadata"]["namespace"] = own["namespace"]  # type: ignore[index]
    head = f"# {name}: {cluster.nodes} nodes of {cluster.gpus_per_node} GPUs. The image has the environment of {LOCK}.\n"
    return Job(head + yaml.safe_dump(manifest, sort_keys=False, width=10**6), ["kubectl", "create", "-f", "-"])


Renderer = Callable[[Config, list[str], dict[str, str], Path], Job]
RENDERED: dict[LauncherKind, Renderer] = {LauncherKind.slurm: slurm, LauncherKind.k8s: k8s}
