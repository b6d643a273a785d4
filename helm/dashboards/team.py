"""The dashboard of a team: the jobs of the namespace that its reader chooses."""

from collections.abc import Sequence

from helm.dashboards.panels import RUNNING, Graph, Number, Query, Row, Table, free_space

_TEAM = 'namespace="$namespace"'


def _of_each_job(metric: str) -> str:
    """The metric of each running job of the team, once: two operators may export it while the leader changes."""
    return f"max by (name) ({metric}{{{_TEAM}}})"


TEAM: Sequence[Row] = (
    Row(
        "Now",
        6,
        (
            Number(
                "Running",
                "Jobs that prepare, train or publish.",
                "short",
                Query(f"sum(qlora_jobs{{{_TEAM}, {RUNNING}}})", "running"),
            ),
            Number(
                "Waiting",
                "Jobs whose first step has not begun, and jobs whose train step waits for a GPU or a queue.",
                "short",
                Query(f'sum(qlora_jobs{{{_TEAM}, phase=~"Pending|Queued"}})', "waiting"),
            ),
            Number(
                "Longest wait",
                "Waiting time of the job that has been in phase Queued for longest.",
                "s",
                Query(f"time() - min(qlora_jobs_queued_since_timestamp_seconds{{{_TEAM}}})", "longest wait"),
            ),
            Number(
                "Without progress",
                "Running jobs that have reported nothing for longer than spec.progressDeadlineSeconds.",
                "short",
                Query(f"sum({_of_each_job('qlora_job_without_progress')})", "without progress"),
            ),
            Number(
                "Failed",
                "Jobs in phase Failed.",
                "short",
                Query(f'sum(qlora_jobs{{{_TEAM}, phase="Failed"}})', "failed"),
            ),
            Number(
                "GPUs in use",
                "GPUs that train pods have, as the average of the latest minutes.",
                "short",
                Query(f"sum(rate(qlora_gpu_seconds_total{{{_TEAM}}}[5m]))", "GPUs"),
            ),
        ),
    ),
    Row(
        "Running jobs",
        1,
        (
            Table(
                "Running jobs",
                "The latest figures of each running job, from its status: loss, speed and time left "
                "from its first optimizer steps on.",
                (
                    (Query(f"max by (name, phase, profile) (qlora_job_info{{{_TEAM}}})", "Runs"), "short"),
                    (Query(_of_each_job("qlora_job_optimizer_steps"), "Steps"), "short"),
                    (Query(_of_each_job("qlora_job_planned_optimizer_steps"), "Planned"), "short"),
                    (Query(_of_each_job("qlora_job_loss"), "Loss"), "none"),
                    (Query(_of_each_job("qlora_job_tokens_per_second"), "Tokens/s"), "short"),
                    (Query(_of_each_job("qlora_job_remaining_seconds"), "Time left"), "s"),
                    (
                        Query(
                            f"time() - {_of_each_job('qlora_job_last_progress_timestamp_seconds')}", "Since progress"
                        ),
                        "s",
                    ),
                    (Query(_of_each_job("qlora_job_peak_memory_bytes"), "Peak memory"), "bytes"),
                ),
                hidden=("Value #A",),
            ),
        ),
    ),
    Row(
        "Training",
        2,
        (
            Graph(
                "Loss",
                "Training loss of each running job in its latest optimizer step.",
                "none",
                (Query(_of_each_job("qlora_job_loss"), "{{name}}"),),
                from_zero=False,
            ),
            Graph(
                "Loss on held-out rows",
                "Loss of each running job in its latest evaluation.",
                "none",
                (Query(_of_each_job("qlora_job_eval_loss"), "{{name}}"),),
                from_zero=False,
            ),
            Graph(
                "Progress",
                "Share of the planned optimizer steps that are done.",
                "percentunit",
                (
                    Query(
                        f"{_of_each_job('qlora_job_optimizer_steps')} / "
                        f"{_of_each_job('qlora_job_planned_optimizer_steps')}",
                        "{{name}}",
                    ),
                ),
            ),
            Graph(
                "Time left",
                "Time that the training of each running job still takes at its present speed.",
                "s",
                (Query(_of_each_job("qlora_job_remaining_seconds"), "{{name}}"),),
            ),
            Graph(
                "Speed",
                "Tokens that each running job trains on per second, without padding.",
                "short",
                (Query(_of_each_job("qlora_job_tokens_per_second"), "{{name}}"),),
            ),
            Graph(
                "Peak GPU memory",
                "The most that each running job has used so far (on CPU: resident memory).",
                "bytes",
                (Query(_of_each_job("qlora_job_peak_memory_bytes"), "{{name}}"),),
            ),
            Graph(
                "Time since progress",
                "Time since the operator last saw progress of each running job.",
                "s",
                (Query(f"time() - {_of_each_job('qlora_job_last_progress_timestamp_seconds')}", "{{name}}"),),
            ),
            Graph(
                "Goodput",
                "Share of the time of each running job's train pods that is in its adapter.",
                "percentunit",
                (Query(_of_each_job("qlora_job_goodput_ratio"), "{{name}}"),),
            ),
        ),
    ),
    Row(
        "GPU time and cost",
        2,
        (
            Graph(
                "GPUs in use",
                "GPUs that train pods have, by profile.",
                "short",
                (
                    Query(
                        f"sum by (profile) (rate(qlora_gpu_seconds_total{{{_TEAM}}}[$__rate_interval]))", "{{profile}}"
                    ),
                ),
            ),
            Graph(
                "GPU time lost",
                "GPU seconds within an hour that are in no checkpoint, by cause.",
                "s",
                (Query(f"sum by (cause) (increase(qlora_gpu_lost_seconds_total{{{_TEAM}}}[1h]))", "{{cause}}"),),
            ),
            Graph("Jobs", "Jobs by phase.", "short", (Query(f"sum by (phase) (qlora_jobs{{{_TEAM}}})", "{{phase}}"),)),
            Graph(
                "Failed jobs",
                "Jobs in phase Failed, by reason.",
                "short",
                (Query(f"sum by (reason) (qlora_jobs_failed{{{_TEAM}}})", "{{reason}}"),),
            ),
            Graph(
                "Free space of workspaces",
                "Free share of the claims that running jobs write to, as the kubelet reports it.",
                "percentunit",
                (Query(free_space(f"{{{_TEAM}}}"), "{{persistentvolumeclaim}}"),),
            ),
        ),
    ),
)
