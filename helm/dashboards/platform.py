"""The dashboard of the platform: the jobs of all namespaces, their GPUs, and the operator."""

from collections.abc import Sequence

from helm.dashboards.panels import RUNNING, Graph, Number, Query, Row, free_space, percentiles

PLATFORM: Sequence[Row] = (
    Row(
        "Now",
        6,
        (
            Number(
                "Operators at work",
                "1 if an operator works. Others stand by.",
                "short",
                Query("sum(qlora_operator_leads)", "operators"),
            ),
            Number(
                "Running",
                "Jobs that prepare, train or publish.",
                "short",
                Query(f"sum(qlora_jobs{{{RUNNING}}})", "running"),
            ),
            Number(
                "Waiting",
                "Jobs whose first step has not begun, and jobs whose train step waits for a GPU or a queue.",
                "short",
                Query('sum(qlora_jobs{phase=~"Pending|Queued"})', "waiting"),
            ),
            Number(
                "Longest wait",
                "Waiting time of the job that has been in phase Queued for longest.",
                "s",
                Query("time() - min(qlora_jobs_queued_since_timestamp_seconds)", "longest wait"),
            ),
            Number(
                "Without progress",
                "Running jobs that have reported nothing for longer than spec.progressDeadlineSeconds.",
                "short",
                Query("sum(qlora_jobs_without_progress)", "without progress"),
            ),
            Number(
                "GPUs in use",
                "GPUs that train pods have, as the average of the latest minutes.",
                "short",
                Query("sum(rate(qlora_gpu_seconds_total[5m]))", "GPUs"),
            ),
        ),
    ),
    Row(
        "Jobs",
        2,
        (
            Graph("Jobs", "Jobs by phase.", "short", (Query("sum by (phase) (qlora_jobs)", "{{phase}}"),)),
            Graph(
                "Running jobs by namespace",
                "Jobs that prepare, train or publish, of the ten namespaces with most of them.",
                "short",
                (Query(f"topk(10, sum by (namespace) (qlora_jobs{{{RUNNING}}}))", "{{namespace}}"),),
            ),
            Graph(
                "Time in each phase",
                "Duration of the phases that jobs have left within a day.",
                "s",
                percentiles("qlora_job_phase_duration_seconds", by="phase", window="1d"),
            ),
            Graph(
                "Longest wait",
                "Waiting time of the job that has been in phase Queued for longest, by namespace.",
                "s",
                (
                    Query(
                        "time() - min by (namespace) (qlora_jobs_queued_since_timestamp_seconds)",
                        "{{namespace}}",
                    ),
                ),
            ),
            Graph(
                "Failures",
                "Attempts and jobs that have failed within an hour, by reason.",
                "short",
                (Query("sum by (reason) (increase(qlora_job_failures_total[1h])) > 0", "{{reason}}"),),
            ),
            Graph(
                "Jobs that have ended",
                "Jobs that have ended within an hour, by result.",
                "short",
                (Query("sum by (phase) (increase(qlora_jobs_ended_total[1h]))", "{{phase}}"),),
            ),
        ),
    ),
    Row(
        "GPUs and storage",
        2,
        (
            Graph(
                "GPUs in use by namespace",
                "GPUs that train pods have, of the ten namespaces with most of them.",
                "short",
                (
                    Query(
                        "topk(10, sum by (namespace) (rate(qlora_gpu_seconds_total[$__rate_interval])))",
                        "{{namespace}}",
                    ),
                ),
            ),
            Graph(
                "GPUs in use by profile",
                "GPUs that train pods have.",
                "short",
                (Query("sum by (profile) (rate(qlora_gpu_seconds_total[$__rate_interval]))", "{{profile}}"),),
            ),
            Graph(
                "GPU time lost",
                "Share of the GPU time within a day that is in no checkpoint, by cause.",
                "percentunit",
                (
                    Query(
                        "sum by (cause) (increase(qlora_gpu_lost_seconds_total[1d]))\n"
                        "/ scalar(sum(increase(qlora_gpu_seconds_total[1d])))",
                        "{{cause}}",
                    ),
                ),
            ),
            Graph(
                "Fullest workspaces",
                "Free share of the ten fullest claims that running jobs write to, as the kubelet reports it.",
                "percentunit",
                (Query(f"bottomk(10, {free_space()})", "{{namespace}}/{{persistentvolumeclaim}}"),),
            ),
        ),
    ),
    Row(
        "Operator",
        2,
        (
            Graph(
                "Status writes",
                "Writes per second, and those that the API server rejected or did not answer.",
                "ops",
                (
                    Query("sum(rate(qlora_operator_status_writes_total[$__rate_interval]))", "written"),
                    Query("sum(rate(qlora_operator_status_write_errors_total[$__rate_interval]))", "failed"),
                ),
            ),
            Graph(
                "Reconciles",
                "Duration of one reconcile.",
                "s",
                percentiles("qlora_operator_reconcile_duration_seconds"),
            ),
            Graph(
                "Reconciles that failed",
                "Reconciles per second that failed and are retried.",
                "ops",
                (Query("sum(rate(qlora_operator_reconcile_errors_total[$__rate_interval]))", "failed"),),
            ),
            Graph(
                "Queue",
                "Jobs that wait for a worker of the operator.",
                "short",
                (Query("sum(qlora_operator_queue_depth)", "jobs"),),
            ),
            Graph(
                "Time in the queue",
                "Time between a job's due time and its start by a worker.",
                "s",
                percentiles("qlora_operator_queue_wait_seconds"),
            ),
            Graph(
                "Requests to the API server",
                "Requests per second without those of the watches, by the status of the answer.",
                "reqps",
                (Query("sum by (code) (rate(qlora_operator_api_requests_total[$__rate_interval]))", "{{code}}"),),
            ),
            Graph(
                "Answers of the API server",
                "Time until an answer had been read, by resource.",
                "s",
                (
                    Query(
                        "histogram_quantile(0.95, sum by (le, resource)\n"
                        "(rate(qlora_operator_api_request_duration_seconds_bucket[$__rate_interval])))",
                        "95 % {{resource}}",
                    ),
                ),
            ),
            Graph(
                "Not served or not shown",
                "Namespaces that the operator may not list, running jobs without metrics, and whether the "
                "CustomResourceDefinition is older than the operator.",
                "short",
                (
                    Query("sum(qlora_operator_namespace_denied)", "namespaces denied"),
                    Query("sum(qlora_jobs_left_out)", "jobs without metrics"),
                    Query("max(qlora_operator_schema_outdated)", "definition outdated"),
                ),
            ),
        ),
    ),
)
