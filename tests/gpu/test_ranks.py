"""Two GPUs of one run: gathered blocks of a sharded base, two nodes, and the loss of a process."""

import json
import os
import signal
from pathlib import Path

import pytest

from qlora_api.contract import ExitCode
from tests.gpu.figures import Figures
from tests.gpu.runs import losses, on_gpu, record
from tests.support.commands.command import Files
from tests.support.manifests import merged
from tests.support.ranks import SHARDED, TWO, Pods, beginning_with, other, succeeded, until

ONLY_SOCKETS = {
    "NCCL_P2P_DISABLE": "1",
    "NCCL_SHM_DISABLE": "1",
    "NCCL_IB_DISABLE": "1",
    "NCCL_SOCKET_IFNAME": "lo",
}
"""As between machines, although the GPUs are in one."""
NOTING = """
from pathlib import Path
from tests.support.models.gathered import note_gathered
note_gathered(Path("{notes}"))
"""


@pytest.mark.gpu(cards=2, gib=8)
def test_two_blocks_at_most_are_gathered_at_a_time_and_none_after_a_pass(
    tmp_path: Path, billion: Files, figures: Figures
) -> None:
    files, notes = billion.copied(tmp_path / "job").with_spec(SHARDED), tmp_path / "gathered"
    code = beginning_with(tmp_path / "code", NOTING.format(notes=notes))
    succeeded(files.run("train", QLORA_DEVICE="cuda", **code))
    for rank in (0, 1):
        lines = [json.loads(line) for line in Path(f"{notes}-{rank}").read_text().splitlines()]
        assert {line["blocks"] for line in lines if line["moment"] in ("forward", "backward")} == {0}
        most = max(line["bytes"] / line["block"] for line in lines)
        figures.add(f"blocks of a sharded base gathered at a time, rank {rank}", most, "", limit=2)
        assert most <= 2
    figures.add(
        "1B, 2 × 2048 tokens, sharded over two GPUs: memory", record(files, "train")["peakMemoryBytes"] / 2**30, "GiB"
    )


@pytest.mark.gpu(cards=2)
def test_two_nodes_that_meet_over_sockets_train_as_one_gpu(tmp_path: Path, tiny: Files) -> None:
    spec = {"resources": {"nodes": 2}, "training": {"gradientAccumulationSteps": 2}}
    pods = Pods.of(tiny.copied(tmp_path / "nodes").with_spec(spec))
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")
    both = [pods.start(node, QLORA_DEVICE="cuda", CUDA_VISIBLE_DEVICES=gpus[node], **ONLY_SOCKETS) for node in (1, 0)]
    for pod in both:
        done = pod.done()
        assert done.exit_code == 0, done.stdout + done.stderr
    one = on_gpu(tiny.copied(tmp_path / "one").with_spec({**spec, "resources": {"nodes": 1}}), "train")
    assert losses(pods.files) == pytest.approx(losses(one), rel=2e-2)


@pytest.mark.gpu(cards=2)
@pytest.mark.parametrize("sharding", ["none", "full"])
def test_a_killed_process_ends_the_other_for_another_attempt(sharding: str, tmp_path: Path, tiny: Files) -> None:
    spec = merged(TWO, {"training": {"sharding": sharding, "maxSteps": 2000, "evalEverySteps": 5000}})
    files = tiny.copied(tmp_path / "job").with_spec(spec)
    # The default limit is half an hour.
    hurried = "from datetime import timedelta\nfrom qlora_trainer.training.distributed import ranks\n"
    code = beginning_with(tmp_path / "code", hurried + "ranks.TIMEOUT = timedelta(seconds=20)\n")
    process = files.start("train", QLORA_DEVICE="cuda", **code)
    said = until(process, 5)
    os.kill(other(process), signal.SIGKILL)
    assert files.finish(process, said).exit_code == ExitCode.UNREACHABLE
