"""`qlora watch`, `logs` and `submit --watch` on a running job: the output, and its time."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from devcluster.controlplane import ControlPlane
from tests.support.cluster.reported import Reported, progress, reported
from tests.support.commands.typed import typed

SPEC = {"training": {"maxSteps": 100}}


@pytest.fixture(scope="module")
def team(plane: ControlPlane, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reported]:
    with reported(plane, tmp_path_factory.mktemp("kubelet"), "followed") as team:
        yield team


def options(team: Reported) -> tuple[str, ...]:
    return "--namespace", team.namespace, "--kubeconfig", str(team.plane.kubeconfig)


def at(step: int, loss: float) -> dict[str, object]:
    """The progress of a job that trains."""
    return {
        "step": step,
        "totalSteps": 100,
        "percent": step,
        "loss": loss,
        "tokensPerSecond": 850,
        "summary": f"{step}% {step}/100",
        "remaining": f"{100 - step}m",
    }


def test_a_terminal_shows_bar_curve_speed_time_left_and_events(team: Reported) -> None:
    team.job("seen")
    history = "\n".join(("step,train_loss,valid_loss", *(f"{step},{3 - step / 50}," for step in range(1, 60))))
    team.report("seen", "Training", progress=at(60, 1.75), history=history)
    team.event("seen", "Training", "step 60 is done")
    with typed("watch", "seen", *options(team), terminal=True) as watch:
        watch.wait_for("850 tokens/s, 40m left")
        watch.wait_for("step 60 is done")
        # Of step 1, long before the watch.
        watch.wait_for("2.98 |")
        assert re.search(r"[⠁-⣿]", watch.shown)
        assert "━" in watch.shown
        assert "\x1b[36m" in watch.shown
        team.report("seen", "Suspended", "a checkpoint is saved at step 60")
        watch.wait_for("a checkpoint is saved at step 60")
        team.report("seen", "Training", progress=at(61, 1.5))
        watch.wait_for("loss 1.500")
        team.report("seen", "Succeeded", progress=at(100, 1.25), adapter=None)
        assert watch.end() == 0
    assert "seen has succeeded" in watch.shown


def test_no_color_leaves_out_colors_and_keeps_the_picture(team: Reported) -> None:
    team.job("plain")
    team.report("plain", "Failed", "a rank is missing", progress=at(30, 2.5), lastFailure=failure(13))
    with typed("watch", "plain", *options(team), terminal=True, NO_COLOR="1") as watch:
        assert watch.end() == 13
    assert "loss 2.500" in watch.shown
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]m", watch.shown)


def failure(code: int) -> dict[str, object]:
    return {"step": "train", "reason": "Known", "exitCode": code, "time": "2026-01-02T03:04:05Z"}


def test_without_a_terminal_each_change_is_a_line_without_control_characters(team: Reported) -> None:
    team.job("lines")
    with typed("watch", "lines", *options(team), terminal=False) as watch:
        watch.wait_for("Pending")
        team.report("lines", "Preparing", "downloads the model")
        watch.wait_for("Preparing: downloads the model")
        team.report("lines", "Training", progress=at(7, 2.125))
        watch.wait_for("Training: 7% 7/100, loss 2.125, 850 tokens/s, 93m left")
        team.report("lines", "Failed", "the loss is \x1b[31mNaN\n", lastFailure=failure(14))
        assert watch.end() == 14
    assert "\x1b" not in watch.shown
    assert "lines has failed: the loss is \\x1b[31mNaN\n" in watch.shown


def test_ctrl_c_ends_the_watch_and_reports_that_the_job_continues(team: Reported) -> None:
    team.job("left")
    with typed("watch", "left", *options(team), terminal=True) as watch:
        watch.wait_for("Pending")
        watch.interrupt()
        assert watch.end() == 130
    assert "left goes on" in watch.shown
    assert "Traceback" not in watch.shown
    assert team.stored("left")["spec"]["suspend"] is False


def test_submit_watches_its_job_and_ends_with_the_exit_code_of_its_step(team: Reported) -> None:
    command = ("submit", "--name", "quick", "--model", "hf://org/m", "--data", "hf://org/rows", "--watch")
    with typed(*command, *options(team), terminal=False) as submit:
        submit.wait_for("qlorajob.qlora.dev/quick created")
        submit.wait_for("Pending")
        team.report("quick", "Failed", "no row fits", lastFailure=failure(11) | {"step": "prepare"})
        assert submit.end() == 11


def test_deleting_the_job_ends_the_watch(team: Reported) -> None:
    team.job("gone")
    with typed("watch", "gone", *options(team), terminal=False) as watch:
        watch.wait_for("Pending")
        team.kubectl("delete", "qlorajob", "gone")
        assert watch.end() == 1
    assert "Error: gone has been deleted" in watch.shown


def test_logs_wait_for_a_pod_survive_a_cut_and_continue_in_the_resumed_pod(team: Reported, tmp_path: Path) -> None:
    job = team.job("told")
    log = team.pod(job, "told-prepare-1", "prepare", ("first line",))
    team.wait("told-prepare-1", "ImagePullBackOff", "no such image")
    with typed("logs", "-f", "told", *options(team), terminal=False) as logs:
        logs.wait_for("waiting for pod told-prepare-1 to start (ImagePullBackOff: no such image)")
        team.start("told-prepare-1")
        logs.wait_for("first line")
        team.kubelet.cut()
        log.add("second line", "a \x1b]0;title\x07 of a terminal")
        logs.wait_for("a \\x1b]0;title\\x07 of a terminal")
        team.end("told-prepare-1")
        team.report("told", "Suspended", "for the night")
        logs.wait_for("told is Suspended: for the night")
        again = team.pod(job, "told-train-2", "train")
        uid = team.pod_uid("told-train-2")
        team.start("told-train-2")
        again.add(progress(job, uid, 42, 1.5), progress({"metadata": {"uid": "another"}}, uid, 43, 9.9))
        logs.wait_for("03:04:05 train: training 42/100, loss 1.500, 850 tokens/s, 58m0s left")
        team.end("told-train-2")
        team.report("told", "Succeeded")
        assert logs.end() == 0
    assert logs.shown.count("first line") == 1
    assert logs.shown.count("second line") == 1
    assert "9.9" not in logs.shown


def test_logs_of_one_step_are_printed_unchanged(team: Reported) -> None:
    job = team.job("raw")
    for step, name in (("prepare", "raw-prepare-1"), ("train", "raw-train-1")):
        team.pod(job, name, step, (f"of {step}",))
        team.start(name)
    line = progress(job, team.pod_uid("raw-train-1"), 1, 2.0)
    team.kubelet.logs["raw-train-1"].add(line)
    with typed("logs", "raw", "--raw", "--step=train", *options(team), terminal=False) as logs:
        assert logs.end() == 0
    assert logs.shown == f"of train\n{line}\n"


def test_a_cell_has_its_part_of_the_log_of_the_pod_that_trains_it_with_others(team: Reported) -> None:
    sweep, cell = team.job("rates"), team.job("rates-00")
    log = team.pod(sweep, "rates-p00-train-1", "train")
    team.kubectl("annotate", "pod", "rates-p00-train-1", f"--namespace={team.namespace}", "qlora.dev/cells=rates-00,x")
    owner = {"apiVersion": "qlora.dev/v1beta1", "kind": "QLoRASweep", "name": "rates", "controller": True}
    marks = {"annotations": {"qlora.dev/cells-in-pod": "2"}}
    metadata = marks | {"ownerReferences": [owner | {"uid": sweep["metadata"]["uid"]}]}
    change = f"--patch={json.dumps({'metadata': metadata})}"
    team.kubectl("patch", "qlorajob", "rates-00", f"--namespace={team.namespace}", "--type=merge", change)
    uid = team.pod_uid("rates-p00-train-1")
    log.add(progress(sweep, uid, 1, 2.5), progress(cell, uid, 1, 3.5))
    team.start("rates-p00-train-1")
    team.report("rates-00", "Training")
    with typed("logs", "rates-00", *options(team), terminal=False) as logs:
        assert logs.end() == 0
    assert "loss 3.500" in logs.shown
    assert "loss 2.500" not in logs.shown


def test_a_deleted_log_is_reported_and_the_others_are_read(team: Reported) -> None:
    job = team.job("partly")
    for name in ("partly-prepare-1", "partly-train-1"):
        team.pod(job, name, name.split("-")[1], ("still there",))
        team.start(name)
    team.kubelet.lost.add("partly-prepare-1")
    with typed("logs", "partly", *options(team), terminal=False) as logs:
        assert logs.end() == 0
    said = "the log of the pod partly-prepare-1 cannot be read: unable to retrieve container logs"
    assert logs.shown.splitlines() == [said, "still there"]


def test_a_job_without_a_log_names_the_reason(team: Reported) -> None:
    team.job("silent")
    team.report("silent", "Queued", "waits for a GPU")
    with typed("logs", "silent", *options(team), terminal=False) as logs:
        assert logs.end() == 0
    assert logs.shown == "no log yet: silent is Queued: waits for a GPU\n"
    team.report("silent", "Succeeded")
    with typed("logs", "silent", "--follow", *options(team), terminal=False) as logs:
        assert logs.end() == 0
    assert logs.shown == (
        "silent is Succeeded, and its pods are gone: the steps' logs are in records/ of its workspace\n"
    )
