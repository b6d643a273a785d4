"""The demo: a real Kubernetes fine-tunes a real model through a QLoRAJob; answers before and after are scored."""

import argparse
import fcntl
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from devcluster import cluster, console, layout, product, toolchain
from devcluster.errors import ClusterError
from devcluster.kubectl import Kubectl, claim, file_pod
from devcluster.product import Images
from qlora_api.status import QLoRAJobStatus

HERE = Path(__file__).parent
MANIFEST = HERE.parent / "demo.yaml"
NAMESPACE = "demo"
JOB = "demo"
INPUTS = "demo-inputs"
LONGEST_RUN_SECONDS = 1800


def main() -> int:
    """Run the demo, and exit with 0 for a verified adapter better than the base."""
    options = _parser().parse_args()
    started = time.monotonic()

    def say(text: str) -> None:
        minutes, seconds = divmod(int(time.monotonic() - started), 60)
        print(f"[{minutes:2d}:{seconds:02d}] {text}", flush=True)

    try:
        return _run(options, say)
    except ClusterError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1


def _run(options: argparse.Namespace, say: Callable[[str], None]) -> int:
    """Run every stage in order, with one line for each; the exit status."""
    kubectl, images = _cluster(options, say)
    say("Putting the model and the data set on a volume")
    model = model_folder()
    _inputs(kubectl, images.trainer, model)
    say(f"kubectl apply -f {MANIFEST.relative_to(HERE.parent.parent)}")
    _delete_job(kubectl)
    kubectl("apply", "--filename", str(MANIFEST))
    say("kubectl get qlorajobs --watch")
    job = _follow(kubectl)
    say("kubectl get qlorajob demo --output wide")
    print(kubectl("get", "qlorajob", JOB, f"--namespace={NAMESPACE}", "--output=wide"), end="")
    output = fetch(kubectl, images.trainer, job, options.output)
    say("Comparing the base model and the tuned model on held-out requests")
    code = _evaluate(model, output)
    if not console.verbose():
        print(f"The output of installers and image builders is in {layout.from_environment().build_log}")
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--cluster", choices=["embedded", "current"], default="embedded")
    parser.add_argument("--operator-image", help="with --cluster current: an image that the cluster can pull")
    parser.add_argument("--trainer-image", help="with --cluster current: an image that the cluster can pull")
    parser.add_argument("--gpu", action="store_true", help="with --cluster current: train on one of its nvidia.com/gpu")
    parser.add_argument(
        "--output", type=Path, default=Path("demo-output"), help="folder for the adapter and the report"
    )
    return parser


def _cluster(options: argparse.Namespace, say: Callable[[str], None]) -> tuple[Kubectl, Images]:
    where = layout.from_environment()
    values = product.SMALL_MACHINE
    if options.cluster == "current":
        if not (options.operator_image and options.trainer_image):
            raise ClusterError(
                "CLUSTER=current needs images that your cluster can pull: "
                "DEMO_OPTIONS='--operator-image NAME:TAG --trainer-image NAME:TAG'"
            )
        kubeconfig = Path(os.environ.get("KUBECONFIG", Path.home() / ".kube" / "config"))
        images = Images(options.operator_image, options.trainer_image)
        values = product.ANY_MACHINE if not options.gpu else {}
    else:
        say("Starting the embedded Kubernetes (the first start builds its programs: about ten minutes)")
        with cluster.locked(where):
            cluster.up(where, cluster.DEFAULT_GPUS)
        kubeconfig = where.kubeconfig
        say("Building the images (the first build installs PyTorch: some minutes)")
        images = product.build_images(where)
        product.load_images(where, images)
    say("helm upgrade --install qlora-operator")
    product.install(where, kubeconfig, images, values)
    return Kubectl(toolchain.build(where, ["kubectl"])["kubectl"], kubeconfig), images


def model_folder() -> Path:
    """Return the demo's cached model folder, made once while others wait."""
    where = layout.from_environment()
    maker = HERE / "model.py"
    key = hashlib.sha256(maker.read_bytes()).hexdigest()[:12]
    folder = where.cache / f"demo-model-{key}"
    where.cache.mkdir(parents=True, exist_ok=True)
    with (where.cache / "demo-model.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            console.run_noisy(where, [sys.executable, maker, folder], env={**os.environ, "TQDM_DISABLE": "1"})
    return folder


def _inputs(kubectl: Kubectl, image: str, model: Path) -> None:
    for manifest in (product.restricted_namespace(NAMESPACE), claim(INPUTS, NAMESPACE)):
        kubectl("apply", "--filename=-", input_text=json.dumps(manifest))
    with file_pod(kubectl, NAMESPACE, INPUTS, image) as pod:
        pod.put(model, "model")
        for name in ("train.jsonl", "held-out.jsonl"):
            pod.put(HERE / name, name)


def _delete_job(kubectl: Kubectl) -> None:
    kubectl("delete", "qlorajob", JOB, f"--namespace={NAMESPACE}", "--ignore-not-found", "--wait")


def _follow(kubectl: Kubectl) -> dict[str, Any]:
    """Show the user's view until the job has ended. Raises ClusterError on failure."""
    base: list[str | Path] = [
        kubectl.program,
        "--kubeconfig",
        kubectl.kubeconfig,
        "get",
        "qlorajobs",
        f"--namespace={NAMESPACE}",
        "--watch",
    ]
    watch = subprocess.Popen(base)
    deadline = time.monotonic() + LONGEST_RUN_SECONDS
    try:
        while time.monotonic() < deadline:
            job = kubectl.get("qlorajob", JOB, f"--namespace={NAMESPACE}")
            phase = job.get("status", {}).get("phase")
            if phase in ("Succeeded", "Failed"):
                break
            time.sleep(2)
    finally:
        watch.terminate()
        watch.wait()
    if phase != "Succeeded":
        raise ClusterError(kubectl("describe", "qlorajob", JOB, f"--namespace={NAMESPACE}"))
    return job


def fetch(kubectl: Kubectl, image: str, job: Mapping[str, Any], output: Path) -> Path:
    """Copy a finished job's adapter and report from its volume, and compare the sum with the status."""
    status = QLoRAJobStatus.model_validate(job["status"])
    adapter, workspace = status.adapter, status.workspace
    if adapter is None or workspace is None:
        raise ClusterError(f"{job['metadata']['name']} has published no adapter")
    output.mkdir(parents=True, exist_ok=True)
    with file_pod(kubectl, job["metadata"]["namespace"], workspace.claim_name, image) as pod:
        for name in ("adapter", "report"):
            pod.get(f"{workspace.path}/{name}", output / name)
    found = hashlib.sha256((output / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()
    print(f"\nadapter     {adapter.uri}")
    print(f"  copied to {output / 'adapter'}")
    print(f"  sha256    {found} on the volume")
    print(f"            {adapter.sha256} in the status")
    print(f"loss curve  {output / 'report' / 'loss.png'}")
    if found != adapter.sha256:
        raise ClusterError("the adapter on the volume is not the one in the status")
    return output


def _evaluate(model: Path, output: Path) -> int:
    scores = output / "scores.json"
    evaluate: list[str | Path] = [sys.executable, HERE / "evaluate.py", "--model", model]
    subprocess.run(
        [*evaluate, "--adapter", output / "adapter", "--held-out", HERE / "held-out.jsonl", "--json", scores],
        check=True,
        env={**os.environ, "TQDM_DISABLE": "1"},
    )
    measured = json.loads(scores.read_text())
    better = (
        measured["tuned"]["score"] > measured["base"]["score"] and measured["tuned"]["loss"] < measured["base"]["loss"]
    )
    print("\nThe cluster keeps running: `export KUBECONFIG=$(make kubeconfig)`, or `make cluster-down` to stop it.")
    return 0 if better else 1


if __name__ == "__main__":
    sys.exit(main())
