"""The mutants: each once survived all tests, and names the test that was written to catch it."""

from tests.mutants.mutant import Mutant

_CONTRACT = "crds/qlora_api"
_OPERATOR = "operator/qlora_operator"
_DECISIONS = f"{_OPERATOR}/decisions"
_TRAINER = "trainer_image/qlora_trainer"
_API_TESTS = "tests/unit/qlora_api"
_OPERATOR_TESTS = "tests/unit/qlora_operator"
_TRAINER_TESTS = "tests/trainer"

API = (
    Mutant(
        name="a-result-may-have-any-size",
        file=f"{_CONTRACT}/contract.py",
        old="else MAX_RESULT_BYTES",
        new="else 10**9",
        tests=(f"{_API_TESTS}/test_contract.py::test_a_record_has_at_most_the_bytes_of_its_kind",),
    ),
    Mutant(
        name="a-status-may-have-numbers-that-json-has-not",
        file=f"{_CONTRACT}/status_types.py",
        old="Field(allow_inf_nan=False)",
        new="Field(allow_inf_nan=True)",
        tests=(
            f"{_OPERATOR_TESTS}/reconcile/test_job.py::test_a_result_with_a_number_that_is_no_json_is_an_unreadable_result",
        ),
    ),
    Mutant(
        name="jobs-cannot-be-selected-by-phase",
        file=f"{_CONTRACT}/crd.py",
        old='(".spec.model.source", ".status.phase"),',
        new='(".spec.model.source",),',
        tests=(f"{_API_TESTS}/test_crd.py::test_jobs_can_be_selected_by_model_and_by_phase",),
    ),
)

OPERATOR = (
    Mutant(
        name="a-deleted-cell-is-created-again",
        file=f"{_DECISIONS}/sweeps/plan.py",
        old="{line.name for line in sweep.status.cells if line.uid} | jobs.keys()",
        new="jobs.keys()",
        tests=(
            f"{_OPERATOR_TESTS}/decisions/test_sweep.py::test_a_deleted_cell_is_not_created_again_and_an_ended_one_keeps_its_line",
        ),
    ),
    Mutant(
        name="a-cell-that-has-not-succeeded-is-the-best",
        file=f"{_DECISIONS}/sweeps/plan.py",
        old='[line for line in lines if line.phase == "Succeeded" and line.adapter]',
        new="list(lines)",
        tests=(
            f"{_OPERATOR_TESTS}/decisions/test_sweep.py::test_the_best_is_the_cell_with_the_lowest_loss_of_those_that_have_succeeded",
        ),
    ),
    Mutant(
        name="clean-up-starts-beside-a-live-pod",
        file=f"{_DECISIONS}/plan.py",
        old="if cleaning is None and not observed.live_pods:",
        new="if cleaning is None:",
        tests=(f"{_OPERATOR_TESTS}/decisions/test_plan.py::test_clean_up_waits_for_the_last_pod_that_may_still_write",),
    ),
    Mutant(
        name="suspended-while-a-job-may-create-a-pod",
        file=f"{_DECISIONS}/summary.py",
        old=" or any(not child.finished for child in observed.children)",
        new="",
        tests=(
            f"{_OPERATOR_TESTS}/decisions/test_status.py::test_a_suspension_does_not_end_while_a_job_may_still_create_a_pod",
        ),
    ),
    Mutant(
        name="last-failure-is-forgotten",
        file=f"{_DECISIONS}/advance.py",
        old="if last is not None and last.step == step.name:",
        new="if False:",
        tests=(
            f"{_OPERATOR_TESTS}/decisions/test_status.py::test_a_failure_without_its_pods_is_reported_from_the_last_status",
        ),
    ),
    Mutant(
        name="clean-up-job-becomes-the-steps-job",
        file=f"{_DECISIONS}/status.py",
        old="if status.step is None or is_finished(status):",
        new="if status.step is None:",
        tests=(
            f"{_OPERATOR_TESTS}/decisions/test_status.py::test_the_clean_up_job_is_not_recorded_as_the_last_steps_job",
        ),
    ),
    Mutant(
        name="waiting-for-a-pod-is-not-reported",
        file=f"{_DECISIONS}/summary.py",
        old="if not step.job_uid and observed.live_pods:",
        new="if False:",
        tests=(
            f"{_OPERATOR_TESTS}/decisions/test_status.py::test_a_step_waits_for_the_last_pod_of_the_attempt_before",
        ),
    ),
    Mutant(
        name="attempts-of-a-found-job-are-not-counted",
        file=f"{_DECISIONS}/advance.py",
        old="        return count_attempts(status, job, facts.observed, facts.now)",
        new="        return status",
        tests=(
            f"{_OPERATOR_TESTS}/decisions/test_status.py::test_attempts_of_a_job_created_just_before_a_crash_are_counted",
        ),
    ),
    Mutant(
        name="any-pods-result-counts",
        file=f"{_DECISIONS}/advance.py",
        old="in reversed([pod for pod in facts.observed.pods_of(child.uid) if pod.node == 0]):",
        new="in reversed(facts.observed.pods):",
        tests=(
            f"{_OPERATOR_TESTS}/decisions/test_status.py::test_the_result_of_a_pod_that_the_steps_job_does_not_control_is_no_result",
        ),
    ),
    Mutant(
        name="exit-code-0-is-out-of-memory",
        file=f"{_DECISIONS}/observed/objects.py",
        old='self.termination.reason == "OOMKilled" and not self.exited_well',
        new='self.termination.reason == "OOMKilled"',
        tests=(f"{_OPERATOR_TESTS}/decisions/test_objects.py::test_a_pods_state_is_read_from_its_status",),
    ),
    Mutant(
        name="any-owner-is-the-controller",
        file=f"{_DECISIONS}/observed/parsing.py",
        old=' if owner.get("controller")',
        new="",
        tests=(
            f"{_OPERATOR_TESTS}/decisions/test_objects.py::test_a_job_that_the_qlorajob_owns_but_does_not_control_is_foreign",
        ),
    ),
    Mutant(
        name="a-false-condition-counts",
        file=f"{_DECISIONS}/observed/parsing.py",
        old=' if condition["status"] == "True"',
        new="",
        tests=(f"{_OPERATOR_TESTS}/decisions/test_objects.py::test_a_condition_that_does_not_hold_ends_no_job",),
    ),
    Mutant(
        name="deleting-its-job-disrupts-a-pod",
        file=f"{_DECISIONS}/pods/attempts.py",
        old="child is None or child.deleting or",
        new="child is None or",
        tests=(
            f"{_OPERATOR_TESTS}/decisions/test_status.py::test_a_pod_that_ends_because_its_job_is_being_deleted_was_not_disturbed",
        ),
    ),
    Mutant(
        name="an-attempt-is-counted-again",
        file=f"{_DECISIONS}/pods/attempts.py",
        old="and end > until",
        new="and end >= until",
        tests=(
            f"{_OPERATOR_TESTS}/decisions/test_status.py::test_an_attempt_is_not_counted_again_after_its_pod_is_deleted",
        ),
    ),
    Mutant(
        name="a-pod-without-a-container-is-not-explained",
        file=f"{_DECISIONS}/pods/attempts.py",
        old="if pod.termination is None:",
        new="if False:",
        tests=(
            f"{_OPERATOR_TESTS}/decisions/test_status.py::test_a_pod_that_the_kubelet_rejects_is_reported_and_uses_up_no_retry",
        ),
    ),
    Mutant(
        name="a-pod-without-a-container-has-no-start",
        file=f"{_DECISIONS}/pods/attempts.py",
        old="return pod.running_since or (pod.created if pod.ended else None)",
        new="return pod.running_since",
        tests=(
            f"{_OPERATOR_TESTS}/decisions/test_status.py::test_a_pod_that_the_kubelet_rejects_is_reported_and_uses_up_no_retry",
        ),
    ),
    Mutant(
        name="a-pod-without-a-container-has-no-end",
        file=f"{_DECISIONS}/pods/attempts.py",
        old="return pod.deletion_requested or (pod.created if pod.ended else None)",
        new="return pod.deletion_requested",
        tests=(
            f"{_OPERATOR_TESTS}/decisions/test_status.py::test_a_pod_that_the_kubelet_rejects_is_reported_and_uses_up_no_retry",
        ),
    ),
    Mutant(
        name="a-lost-pod-gives-the-reason",
        file=f"{_DECISIONS}/pods/nodes.py",
        old="    found = min(ended, key=_order, default=None)",
        new="    found = min(ended, key=lambda pod: pod.node, default=None)",
        tests=(
            f"{_OPERATOR_TESTS}/decisions/test_nodes.py::test_the_pod_that_failed_gives_the_reason_and_not_the_one_that_lost_it",
        ),
    ),
    Mutant(
        name="the-reason-is-told-too-early",
        file=f"{_DECISIONS}/pods/nodes.py",
        old="return found if is_own_failure(found) or all(pod.ended for pod in pods) else None",
        new="return found",
        tests=(
            f"{_OPERATOR_TESTS}/decisions/test_nodes.py::test_the_reason_is_not_reported_before_the_last_pod_has_ended",
        ),
    ),
    Mutant(
        name="waiting-for-nodes-is-a-failure",
        file=f"{_DECISIONS}/pods/nodes.py",
        old="    return pod.lost_peer or pod.missed_peers",
        new="    return pod.lost_peer",
        tests=(
            f"{_OPERATOR_TESTS}/decisions/test_nodes.py::test_pods_whose_peers_never_came_count_nothing_and_retry_with_backoff",
        ),
    ),
    Mutant(
        name="one-pod-of-several-is-replaced-alone",
        file=f"{_DECISIONS}/advance.py",
        old="or not step.counted_pod or not trains_together(facts.job, step.name):",
        new="or True:",
        tests=(
            f"{_OPERATOR_TESTS}/decisions/test_nodes.py::test_pods_that_stopped_together_are_replaced_together_and_count_once",
        ),
    ),
    Mutant(
        name="pods-that-are-all-gone-are-waited-for",
        file=f"{_DECISIONS}/advance.py",
        old="waits = bool(step.counted_pod) or not is_over(pods, child)",
        new="waits = True",
        tests=(
            f"{_OPERATOR_TESTS}/decisions/test_nodes.py::test_pods_lost_before_node_0_runs_cost_only_another_job_after_a_pause",
        ),
    ),
    Mutant(
        name="pods-that-are-done-explain-a-failed-job",
        file=f"{_DECISIONS}/pods/nodes.py",
        old="    return all(pod.ended for pod in pods)",
        new="    return not pods",
        tests=(
            f"{_OPERATOR_TESTS}/decisions/test_nodes.py::test_losing_node_0_after_the_other_pods_are_done_is_one_disruption",
        ),
    ),
    Mutant(
        name="node-0-runs-for-nothing-when-another-pod-ends-first",
        file=f"{_DECISIONS}/pods/attempts.py",
        old="    status = charge_running(status, observed, now)\n    return",
        new="    return",
        tests=(f"{_OPERATOR_TESTS}/decisions/test_nodes.py::test_the_time_of_node_0_counts_however_the_attempt_ends",),
    ),
    Mutant(
        name="a-node-0-that-is-gone-has-run-for-nothing",
        file=f"{_DECISIONS}/pods/attempts.py",
        old="    return _charge_vanished(status, child, pods, now) if _has_vanished(status, pods) else status",
        new="    return status",
        tests=(f"{_OPERATOR_TESTS}/decisions/test_nodes.py::test_the_time_of_node_0_counts_however_the_attempt_ends",),
    ),
    Mutant(
        name="what-node-0-saves-last-is-not-told",
        file=f"{_DECISIONS}/pods/attempts.py",
        old="if step.job_uid else _charge_earlier(status, job, observed)",
        new="if step.job_uid else status",
        tests=(
            f"{_OPERATOR_TESTS}/decisions/test_nodes.py::test_a_node_0_that_saves_late_reports_its_checkpoint_and_its_time",
        ),
    ),
    Mutant(
        name="the-spec-says-how-many-nodes-a-started-job-has",
        file=f"{_DECISIONS}/observed/stored_job.py",
        old="    spec = _with_fixed_nodes(spec, status.resolved)\n",
        new="",
        tests=(
            f"{_OPERATOR_TESTS}/decisions/test_nodes.py::test_a_job_whose_spec_has_lost_its_nodes_keeps_their_number",
        ),
    ),
    Mutant(
        name="two-jobs-wait-for-one-another-for-ever",
        file=f"{_DECISIONS}/plan.py",
        old="yield max(ended) + pause * (1 + _share(job.uid))",
        new="yield max(ended) + pause",
        tests=(
            f"{_OPERATOR_TESTS}/decisions/test_nodes.py::test_two_jobs_that_wait_for_one_anothers_nodes_never_try_again_at_the_same_time",
        ),
    ),
    Mutant(
        name="a-broken-interconnect-is-tried-without-a-pause",
        file=f"{_DECISIONS}/plan.py",
        old="    yield from _after_failures(job, status, observed)\n",
        new="",
        tests=(
            f"{_OPERATOR_TESTS}/decisions/test_nodes.py::test_jobs_that_fail_one_after_the_other_are_followed_after_pauses_that_grow",
        ),
    ),
    Mutant(
        name="what-connects-nodes-is-written-once",
        file=f"{_DECISIONS}/plan.py",
        old="any(pod.starting for pod in observed.pods_of(step.job_uid)):",
        new="False:",
        tests=(
            f"{_OPERATOR_TESTS}/reconcile/test_job.py::test_service_and_policy_of_peers_are_restored_while_a_pod_starts",
        ),
    ),
    Mutant(
        name="suspensions-count-as-disruptions",
        file=f"{_DECISIONS}/pods/attempts.py",
        old="child.deleting or child.suspended or child.complete or child.expired",
        new="child.deleting or child.complete or child.expired",
        tests=(f"{_OPERATOR_TESTS}/decisions/test_limits.py::test_a_suspension_by_a_queue_is_no_disruption",),
    ),
    Mutant(
        name="a-late-look-counts-a-suspension",
        file=f"{_DECISIONS}/pods/attempts.py",
        old="return child is not None and child.resumed is not None and pod.stopped_by(child.resumed)",
        new="return False",
        tests=(f"{_OPERATOR_TESTS}/decisions/test_limits.py::test_a_suspension_by_a_queue_is_no_disruption",),
    ),
    Mutant(
        name="a-vanished-pod-costs-nothing",
        file=f"{_DECISIONS}/pods/attempts.py",
        old="return _count_vanished(status, job, child, pods, now)",
        new="return status",
        tests=(f"{_OPERATOR_TESTS}/decisions/test_limits.py::test_a_deadline_is_not_evaded_by_deleting_pods_by_force",),
    ),
    Mutant(
        name="a-deleted-job-is-always-replaced-at-once",
        file=f"{_DECISIONS}/advance.py",
        old="status = note_deletion(status, facts)",
        new="pass",
        tests=(
            f"{_OPERATOR_TESTS}/decisions/test_plan.py::test_a_deleted_job_is_replaced_immediately_and_then_with_backoff",
        ),
    ),
    Mutant(
        name="a-deleted-job-is-replaced-at-once",
        file=f"{_DECISIONS}/advance.py",
        old="return status  # its pods are about to be deleted, and what they ran counts",
        new="pass",
        tests=(
            f"{_OPERATOR_TESTS}/decisions/test_limits.py::test_a_deleted_job_is_not_replaced_before_its_pods_count",
        ),
    ),
    Mutant(
        name="an-unread-log-looks-like-a-hang",
        file=f"{_DECISIONS}/limits.py",
        old="known = facts.log_read or _is_stalled(facts.job.status, step)",
        new="known = True",
        tests=(f"{_OPERATOR_TESTS}/decisions/test_limits.py::test_an_unreadable_log_is_not_a_lack_of_progress",),
    ),
    Mutant(
        name="the-trainers-clock-decides",
        file=f"{_DECISIONS}/status.py",
        old='"progressed_at": format_time(facts.now)',
        new='"progressed_at": record.time',
        tests=(f"{_OPERATOR_TESTS}/decisions/test_limits.py::test_a_trainers_clock_does_not_matter",),
    ),
    Mutant(
        name="a-request-is-not-spent",
        file=f"{_DECISIONS}/status.py",
        old="    _note_request,\n",
        new="",
        tests=(f"{_OPERATOR_TESTS}/decisions/test_retry.py::test_a_request_that_was_made_before_the_failure_is_spent",),
    ),
    Mutant(
        name="an-old-profile-is-kept",
        file=f"{_DECISIONS}/retry.py",
        old='"resolved": _resolved_again(status, facts, has_its_run=_has_its_run(status, cleaned=cleaned)),',
        new='"resolved": status.resolved,',
        tests=(f"{_OPERATOR_TESTS}/decisions/test_retry.py::test_a_retry_uses_the_current_profile",),
    ),
    Mutant(
        name="characters-beyond-ascii-make-a-document-too-large",
        file=f"{_DECISIONS}/manifests/objects.py",
        old=", ensure_ascii=False",
        new="",
        tests=(
            f"{_OPERATOR_TESTS}/reconcile/test_profile_limit.py::test_a_system_prompt_of_any_characters_reaches_the_pods",
        ),
    ),
    Mutant(
        name="a-document-of-any-size-is-resolved",
        file=f"{_DECISIONS}/resolution.py",
        old="    if size <= limit:",
        new="    if size:",
        tests=(
            f"{_OPERATOR_TESTS}/reconcile/test_profile_limit.py::test_a_spec_too_large_for_an_annotation_waits_and_names_its_long_texts",
        ),
    ),
    Mutant(
        name="the-document-changes-with-the-operator",
        file=f"{_DECISIONS}/manifests/objects.py",
        old="if resolved.document is not None:",
        new="if False:",
        tests=(f"{_OPERATOR_TESTS}/decisions/test_manifests.py::test_the_document_is_fixed_when_the_job_starts",),
    ),
    Mutant(
        name="an-unsupported-trainer-fails-the-job",
        file=f"{_DECISIONS}/advance.py",
        old="if ended[-1].unsupported:",
        new="if False:",
        tests=(
            f"{_OPERATOR_TESTS}/decisions/test_retry.py::test_a_trainer_of_another_release_is_waited_for_and_costs_no_failure",
        ),
    ),
    Mutant(
        name="a-pause-after-a-rejected-pod-is-not-explained",
        file=f"{_DECISIONS}/summary.py",
        old="if rejected := rejection(status, facts):",
        new="if (rejected := rejection(status, facts)) and False:",
        tests=(
            f"{_OPERATOR_TESTS}/decisions/test_status.py::test_a_step_that_waits_after_a_rejected_pod_reports_reason_and_time",
        ),
    ),
    Mutant(
        name="a-later-attempt-of-prepare-is-taken-for-the-first",
        file=f"{_DECISIONS}/observed/conditions.py",
        old='if step is None or (step.name == "prepare" and not has_begun(status)):',
        new='if step is None or (step.name == "prepare" and not step.job_uid):',
        tests=(
            f"{_OPERATOR_TESTS}/decisions/test_status.py::test_a_step_that_waits_after_a_rejected_pod_reports_reason_and_time",
        ),
    ),
    Mutant(
        name="somebody-is-accused-of-the-operators-own-deletion",
        file=f"{_DECISIONS}/pods/deletions.py",
        old="shown.reason == POD_DETACHED",
        new="False",
        tests=(
            f"{_OPERATOR_TESTS}/reconcile/test_job.py::test_the_deletion_of_a_detached_pods_job_is_not_blamed_on_a_user",
        ),
    ),
    Mutant(
        name="restarts-are-taken-for-deletions",
        file=f"{_DECISIONS}/pods/deletions.py",
        old=" - restarts",
        new="",
        tests=(
            f"{_OPERATOR_TESTS}/decisions/test_plan.py::test_jobs_restarted_by_the_operator_are_not_counted_as_deleted_by_others",
        ),
    ),
    Mutant(
        name="rejected-pods-fail-the-job",
        file=f"{_DECISIONS}/advance.py",
        old="if spared and step.failures <= allowed and not ended[-1].decisive:",
        new="if False:",
        tests=(
            f"{_OPERATOR_TESTS}/decisions/test_status.py::test_a_job_whose_pods_the_kubelet_rejected_is_followed_by_another",
        ),
    ),
    Mutant(
        name="a-service-mesh-adds-its-proxy",
        file=f"{_DECISIONS}/manifests/objects.py",
        old=' | {"sidecar.istio.io/inject": "false"}',
        new="",
        tests=(
            f"{_OPERATOR_TESTS}/decisions/test_manifests.py::test_no_service_mesh_adds_a_proxy_that_would_outlive_the_step",
        ),
    ),
    Mutant(
        name="threads-follow-a-limit-that-is-not-set",
        file=f"{_DECISIONS}/manifests/environment.py",
        old='"requests.cpu"',
        new='"limits.cpu"',
        tests=(
            f"{_OPERATOR_TESTS}/decisions/test_manifests.py::test_libraries_start_as_many_threads_as_the_pod_requests_cpus",
        ),
    ),
    Mutant(
        name="readiness-ignores-a-dead-watch",
        file=f"{_OPERATOR}/watch/resync.py",
        old="if dead := self.monitor.dead:",
        new="if dead := ():",
        tests=(
            f"{_OPERATOR_TESTS}/watch/test_resync.py::test_a_watch_that_shows_nothing_is_reported_at_the_second_list",
        ),
    ),
    Mutant(
        name="a-denied-namespace-stops-all",
        file=f"{_OPERATOR}/watch/resync.py",
        old="if len(rejected) == len(self._namespaces):",
        new="if rejected:",
        tests=(
            f"{_OPERATOR_TESTS}/watch/test_resync.py::test_a_denied_namespace_leaves_the_others_alone_and_comes_back",
        ),
    ),
    Mutant(
        name="infinity-is-sent",
        file=f"{_OPERATOR}/kube/transport.py",
        old="json.dumps(body, allow_nan=False, ",
        new="json.dumps(body, ",
        tests=(f"{_OPERATOR_TESTS}/kube/test_transport.py::test_a_number_outside_json_is_never_sent",),
    ),
    Mutant(
        name="a-leader-that-is-cut-off-works-on",
        file=f"{_OPERATOR}/leadership.py",
        old="_STOP_AFTER = 2 / 3",
        new="_STOP_AFTER = 5 / 3",
        tests=(f"{_OPERATOR_TESTS}/test_leadership.py::test_a_disconnected_leader_stops_before_another_begins",),
    ),
    Mutant(
        name="a-lease-counts-as-unchanged-from-before-it-was-seen",
        file=f"{_OPERATOR}/leadership.py",
        old="self._notice(lease, self._now())",
        new="self._notice(lease, asked_at)",
        tests=(
            f"{_OPERATOR_TESTS}/test_leadership.py::test_a_renewal_that_a_slow_answer_shows_counts_from_the_answer_on",
        ),
    ),
    Mutant(
        name="a-leader-that-ends-keeps-the-lease",
        file=f"{_OPERATOR}/leadership.py",
        old='"holderIdentity": "", "leaseDurationSeconds": 1',
        new='"leaseDurationSeconds": self._settings.duration',
        tests=(f"{_OPERATOR_TESTS}/test_leadership.py::test_a_leader_that_ends_releases_the_lease_immediately",),
    ),
    Mutant(
        name="fields-of-list-items-are-not-compared",
        file=f"{_CONTRACT}/served_schema.py",
        old='("items", "additionalProperties")',
        new='("additionalProperties",)',
        tests=(
            f"{_OPERATOR_TESTS}/kube/test_schema_check.py::test_missing_fields_of_the_clusters_definition_are_found",
        ),
    ),
    Mutant(
        name="a-task-that-goes-on-is-canceled-once",
        file=f"{_OPERATOR}/watch/tasks.py",
        old="_ROUNDS = 100",
        new="_ROUNDS = 1",
        tests=(
            f"{_OPERATOR_TESTS}/watch/test_tasks.py::test_a_task_that_ignores_its_cancellation_a_few_times_ends_too",
        ),
    ),
    Mutant(
        name="a-watch-is-never-overdue",
        file=f"{_OPERATOR}/watch/resync.py",
        old="interval / 2",
        new="interval * 20",
        tests=(
            f"{_OPERATOR_TESTS}/watch/test_resync.py::test_a_watch_that_shows_nothing_is_reported_at_the_second_list",
        ),
    ),
    Mutant(
        name="a-failed-key-keeps-its-request",
        file=f"{_OPERATOR}/reconcile/queue.py",
        old="if (request := self._requests.pop(key, None)) is not None:\n            pause",
        new="if (request := self._requests.get(key)) is not None:\n            pause",
        tests=(
            f"{_OPERATOR_TESTS}/reconcile/test_queue.py::test_a_request_during_a_failing_attempt_is_served_by_its_retry_only",
        ),
    ),
    Mutant(
        name="a-request-during-a-failure-is-dropped",
        file=f"{_OPERATOR}/reconcile/queue.py",
        old="pause = min(pause, max(BACKOFF_SECONDS, request.due - now))",
        new="pass",
        tests=(
            f"{_OPERATOR_TESTS}/reconcile/test_queue.py::test_a_request_made_during_an_attempt_that_fails_shortens_a_long_pause",
        ),
    ),
    Mutant(
        name="a-flood-occupies-every-worker",
        file=f"{_OPERATOR}/reconcile/queue.py",
        old="return self.most is None or self._working_in[namespace] < self.most",
        new="return True",
        tests=(
            f"{_OPERATOR_TESTS}/reconcile/test_queue.py::test_a_neighbor_begins_while_everything_of_a_flood_is_stuck",
        ),
    ),
    Mutant(
        name="a-detached-pod-runs-unseen",
        file=f"{_OPERATOR}/reconcile/job.py",
        old="if missing and step.running_pod_name:",
        new="if False:",
        tests=(
            f"{_OPERATOR_TESTS}/reconcile/test_job.py::test_a_detached_running_pod_still_counts_against_the_deadline",
        ),
    ),
    Mutant(
        name="two-pods-write-at-the-same-time",
        file=f"{_DECISIONS}/plan.py",
        old="if child.name != wanted or detached)",
        new="if child.name != wanted)",
        tests=(
            f"{_OPERATOR_TESTS}/reconcile/test_job.py::test_a_detached_pod_and_another_one_of_its_job_never_write_at_the_same_time",
        ),
    ),
    Mutant(
        name="the-deadline-of-the-job-itself-costs-a-retry",
        file=f"{_DECISIONS}/pods/attempts.py",
        old=" or child.expired",
        new="",
        tests=(
            f"{_OPERATOR_TESTS}/decisions/test_limits.py::test_a_job_ended_by_its_deadline_is_followed_by_another_and_costs_no_retry",
        ),
    ),
    Mutant(
        name="an-older-definition-is-not-noticed",
        file=f"{_OPERATOR}/kube/schema_check.py",
        old="                self._note(problem)\n            elif",
        new="                pass\n            elif",
        tests=(f"{_OPERATOR_TESTS}/kube/test_schema_check.py::test_outdated_crd_is_reported_once_and_clears",),
    ),
    Mutant(
        name="new-jobs-stop-the-others",
        file=f"{_OPERATOR}/reconcile/queue.py",
        old="due[0] if self._working_of_the_rest >= self.reserved else due[-1]",
        new="due[0]",
        tests=(
            f"{_OPERATOR_TESTS}/reconcile/test_queue.py::test_new_jobs_come_first_and_some_workers_are_kept_for_the_rest",
        ),
    ),
    Mutant(
        name="a-foreign-claim-is-adopted",
        file=f"{_OPERATOR}/reconcile/actions.py",
        old="if not _has_label(existing, job):",
        new="if False:",
        tests=(
            f"{_OPERATOR_TESTS}/reconcile/test_job.py::test_a_claim_of_the_workspaces_name_is_used_only_if_it_was_created_for_the_job",
        ),
    ),
    Mutant(
        name="a-job-that-nobody-watches-is-the-steps",
        file=f"{_OPERATOR}/reconcile/actions.py",
        old="if not _has_label(found, job):",
        new="if False:",
        tests=(
            f"{_OPERATOR_TESTS}/reconcile/test_job.py::test_creation_retries_back_off_and_the_backoff_resets_after_success",
        ),
    ),
    Mutant(
        name="a-pass-that-changes-nothing-is-followed-at-once",
        file=f"{_OPERATOR}/reconcile/pauses.py",
        old="case AtOnce(changed=True):",
        new="case AtOnce():",
        tests=(
            f"{_OPERATOR_TESTS}/reconcile/test_job.py::test_a_job_whose_first_job_no_watch_shows_is_retried_with_backoff",
        ),
    ),
    Mutant(
        name="a-status-that-is-not-kept-is-written-at-once",
        file=f"{_OPERATOR}/reconcile/job.py",
        old='return bool(written["metadata"]["resourceVersion"] != job.resource_version)',
        new="return True",
        tests=(f"{_OPERATOR_TESTS}/reconcile/test_job.py::test_status_writes_back_off_if_the_api_server_drops_them",),
    ),
    Mutant(
        name="a-deletion-waits-for-a-status-that-is-stored",
        file=f"{_DECISIONS}/plan.py",
        old="store_first=counts_itself and _creates_a_job(actions))",
        new="store_first=counts_itself and bool(actions))",
        tests=(f"{_OPERATOR_TESTS}/reconcile/test_job.py::test_a_step_of_a_job_that_waits_for_a_place_is_stopped",),
    ),
    Mutant(
        name="a-request-is-taken-up-without-a-place",
        file=f"{_OPERATOR}/reconcile/job.py",
        old="if self._needs_another_count(confirmed.job, view.job, others):",
        new="if False:",
        tests=(
            f"{_OPERATOR_TESTS}/reconcile/test_job.py::test_a_request_that_only_a_live_read_shows_waits_for_a_place_too",
        ),
    ),
    Mutant(
        name="the-next-attempt-forgets-the-pod-before",
        file=f"{_DECISIONS}/status.py",
        old="    renew,\n    keep_earlier_pod,\n",
        new="    renew,\n",
        tests=(
            f"{_OPERATOR_TESTS}/reconcile/test_job.py::test_a_retried_job_waits_for_the_detached_pod_of_its_failure",
        ),
    ),
    Mutant(
        name="a-watch-shows-the-end-of-a-hidden-pod",
        file=f"{_OPERATOR}/reconcile/job.py",
        old=" or lacks_earlier_pod(view.job.status.step, view.observed):",
        new=":",
        tests=(
            f"{_OPERATOR_TESTS}/reconcile/test_job.py::test_a_restart_waits_for_its_stopped_pod_although_that_is_detached",
        ),
    ),
    Mutant(
        name="a-detached-pod-runs-free-of-charge",
        file=f"{_DECISIONS}/pods/attempts.py",
        old="return _charge_detached(status, job, observed)",
        new="return status",
        tests=(
            f"{_OPERATOR_TESTS}/reconcile/test_job.py::test_a_retried_job_waits_for_the_detached_pod_of_its_failure",
        ),
    ),
    Mutant(
        name="a-job-that-was-replaced-is-counted-for-ever",
        file=f"{_OPERATOR}/reconcile/job.py",
        old="self.metrics.job_is_gone(key, replaced_by=job.uid)",
        new="pass",
        tests=(f"{_OPERATOR_TESTS}/reconcile/test_job.py::test_a_replaced_job_is_not_counted_with_its_successor",),
    ),
    Mutant(
        name="a-list-that-the-server-prepares-keeps-others-waiting",
        file=f"{_OPERATOR}/kube/transport.py",
        old="                answer = await self._send(*sent, own_turn, answered.append)",
        new="                async with own_turn:\n"
        "                    answer = await self._send(*sent, nullcontext(), answered.append)",
        tests=(
            f"{_OPERATOR_TESTS}/kube/test_transport.py::test_a_request_waits_for_its_turn_to_read_the_answer_and_not_to_be_sent",
        ),
    ),
    Mutant(
        name="an-orphan-is-deleted",
        file=f"{_OPERATOR}/reconcile/job.py",
        old="if job.deleting and controller_uid(body) != job.uid:",
        new="if False:",
        tests=(
            f"{_OPERATOR_TESTS}/reconcile/test_job.py::test_orphaned_children_are_left_alone_after_garbage_collection",
        ),
    ),
    Mutant(
        name="a-pod-without-an-owner-is-of-every-step",
        file=f"{_DECISIONS}/observed/objects.py",
        old="if job_uid and pod.owner_uid == job_uid",
        new="if pod.owner_uid == job_uid",
        tests=(
            f"{_OPERATOR_TESTS}/reconcile/test_job.py::test_a_pod_without_an_owner_does_not_belong_to_a_step_without_a_job",
        ),
    ),
    Mutant(
        name="a-deleted-job-runs-on",
        file=f"{_DECISIONS}/plan.py",
        old="return () if job.orphans else tuple(_running(observed))",
        new="return ()",
        tests=(
            f"{_OPERATOR_TESTS}/reconcile/test_job.py::test_a_job_whose_deletion_a_finalizer_delays_runs_no_further",
        ),
    ),
    Mutant(
        name="a-clean-up-to-come-is-forgotten",
        file=f"{_DECISIONS}/plan.py",
        old=" or cleanup_at(job, status) is not None:",
        new=":",
        tests=(f"{_OPERATOR_TESTS}/reconcile/test_job.py::test_a_finished_job_is_requeued_for_its_clean_up",),
    ),
    Mutant(
        name="an-older-view-replaces-a-newer-one",
        file=f"{_OPERATOR}/watch/store.py",
        old="if version <= entry.version and self._ordered:",
        new="if False:",
        tests=(
            f"{_OPERATOR_TESTS}/watch/test_store.py::test_an_older_event_after_a_write_of_the_operator_changes_nothing",
        ),
    ),
    Mutant(
        name="a-deletion-is-forgotten-at-once",
        file=f"{_OPERATOR}/watch/store.py",
        old="return uid in self._buried and version <= self._buried[uid]",
        new="return False",
        tests=(
            f"{_OPERATOR_TESTS}/watch/test_store.py::test_a_deletion_that_overtakes_the_answer_of_the_creation_is_not_undone",
        ),
    ),
    Mutant(
        name="a-dead-watch-hides-what-it-does-not-show",
        file=f"{_OPERATOR}/watch/store.py",
        old="                    entry.wanted[each.uid] = number\n",
        new="",
        tests=(
            f"{_OPERATOR_TESTS}/watch/test_store.py::test_objects_missed_by_a_dead_watch_are_read_live_until_shown",
        ),
    ),
    Mutant(
        name="what-cannot-be-undone-is-not-confirmed",
        file=f"{_OPERATOR}/reconcile/job.py",
        old="if not view.live and _must_be_confirmed(view, decision):",
        new="if False:",
        tests=(f"{_OPERATOR_TESTS}/reconcile/test_job.py::test_a_job_that_the_store_has_missed_is_not_created_again",),
    ),
    Mutant(
        name="an-attempt-is-counted-without-a-look",
        file=f"{_DECISIONS}/plan.py",
        old="step.attempt, step.counted_pod)",
        new="step.attempt)",
        tests=(
            f"{_OPERATOR_TESTS}/decisions/test_plan.py::test_irreversible_actions_are_distinguished_from_reversible_ones",
        ),
    ),
    Mutant(
        name="a-rejected-job-is-no-reason",
        file=f"{_OPERATOR}/reconcile/actions.py",
        old='except RejectedError as error:\n            sentence = f"the API server rejects Job {name}',
        new='except ValueError as error:\n            sentence = f"the API server rejects Job {name}',
        tests=(
            f"{_OPERATOR_TESTS}/reconcile/test_job.py::test_creation_retries_back_off_and_the_backoff_resets_after_success",
        ),
    ),
    Mutant(
        name="a-rejected-claim-is-no-reason",
        file=f"{_OPERATOR}/reconcile/actions.py",
        old='except RejectedError as error:\n            sentence = f"the API server rejects PersistentVolumeClaim',
        new='except ValueError as error:\n            sentence = f"the API server rejects PersistentVolumeClaim',
        tests=(
            f"{_OPERATOR_TESTS}/reconcile/test_job.py::test_creation_retries_back_off_and_the_backoff_resets_after_success",
        ),
    ),
    Mutant(
        name="a-list-ends-with-its-first-page",
        file=f"{_OPERATOR}/kube/client.py",
        old='metadata.get("continue") or ""',
        new='""',
        tests=(f"{_OPERATOR_TESTS}/kube/test_client.py::test_a_list_is_read_to_its_last_page",),
    ),
    Mutant(
        name="every-reader-has-a-page-of-its-own",
        file=f"{_OPERATOR}/kube/client.py",
        old="_PAGES_AT_A_TIME = 2",
        new="_PAGES_AT_A_TIME = 99",
        tests=(f"{_OPERATOR_TESTS}/kube/test_client.py::test_parallel_lists_hold_one_parsed_page_and_two_in_transfer",),
    ),
    Mutant(
        name="a-page-has-any-length",
        file=f"{_OPERATOR}/kube/client.py",
        old="_BYTES_PER_PAGE if size > 1 else None",
        new="None",
        tests=(f"{_OPERATOR_TESTS}/kube/test_client.py::test_only_pages_of_large_objects_are_requested_in_parts",),
    ),
    Mutant(
        name="an-answer-is-read-whatever-its-length",
        file=f"{_OPERATOR}/kube/transport.py",
        old="if length > most:",
        new="if False:",
        tests=(
            f"{_OPERATOR_TESTS}/kube/test_transport.py::test_an_answer_that_is_longer_than_it_may_be_is_not_read_to_its_end",
        ),
    ),
    Mutant(
        name="any-job-says-what-was-resolved",
        file=f"{_OPERATOR}/kube/listing.py",
        old="if job_name is not None and value.name == child_job_name(job_name, *FIRST_JOB):",
        new="if True:",
        tests=(
            f"{_OPERATOR_TESTS}/watch/test_store.py::test_only_the_first_job_may_state_the_resolved_spec",
            f"{_OPERATOR_TESTS}/kube/test_client.py::test_of_many_jobs_only_the_first_gives_the_resolved_spec",
        ),
    ),
    Mutant(
        name="what-was-resolved-may-have-any-length",
        file=f"{_DECISIONS}/observed/parsing.py",
        old='return text if len(text) <= MAX_RESOLVED else ""',
        new="return text",
        tests=(f"{_OPERATOR_TESTS}/watch/test_store.py::test_annotations_longer_than_any_operator_writes_are_dropped",),
    ),
    Mutant(
        name="a-first-job-shown-before-its-job-has-resolved-nothing",
        file=f"{_OPERATOR}/watch/store.py",
        old="            version = 0\n",
        new="            pass\n",
        tests=(
            f"{_OPERATOR_TESTS}/watch/test_store.py::test_a_first_job_that_is_shown_before_its_job_is_read_once_more",
        ),
    ),
    Mutant(
        name="what-a-list-has-shown-is-lost-if-the-next-fails",
        file=f"{_OPERATOR}/watch/resync.py",
        old="        finally:\n            # Only now",
        new="        except ArithmeticError:\n            raise\n        else:\n            # Only now",
        tests=(
            f"{_OPERATOR_TESTS}/watch/test_resync.py::test_a_job_missing_from_a_list_is_requeued_although_the_next_list_fails",
        ),
    ),
    Mutant(
        name="any-conflict-means-that-the-object-exists",
        file=f"{_OPERATOR}/kube/errors.py",
        old='if reason == "AlreadyExists" else ConflictError',
        new="if reason else AlreadyExistsError",
        tests=(
            f"{_OPERATOR_TESTS}/kube/test_client.py::test_only_a_conflict_with_that_reason_means_that_the_object_exists",
        ),
    ),
    Mutant(
        name="a-watch-shows-names-only",
        file=f"{_OPERATOR}/watch/handlers.py",
        old='metadata["name"], metadata["uid"])',
        new='metadata["name"], "")',
        tests=(
            f"{_OPERATOR_TESTS}/watch/test_handlers.py::test_a_recreated_job_is_stored_although_the_old_ones_deletion_comes_last",
        ),
    ),
    Mutant(
        name="the-series-of-a-job-stay-when-it-has-ended",
        file=f"{_OPERATOR}/metrics/shown.py",
        old="return self.phase in RUNNING",
        new="return True",
        tests=(f"{_OPERATOR_TESTS}/test_metrics.py::test_the_series_of_a_job_end_when_it_no_longer_runs",),
    ),
    Mutant(
        name="a-pod-invents-labels-of-metrics",
        file=f"{_OPERATOR}/metrics/shown.py",
        old="return reason if reason in FAILURE_REASONS else OTHER",
        new="return reason",
        tests=(f"{_OPERATOR_TESTS}/test_metrics.py::test_text_of_a_tenant_makes_no_series",),
    ),
    Mutant(
        name="the-time-in-a-phase-begins-anew-with-each-write",
        file=f"{_DECISIONS}/summary.py",
        old="stored.phase_since if phase == stored.phase else format_time(facts.now)",
        new="format_time(facts.now)",
        tests=(
            f"{_OPERATOR_TESTS}/reconcile/test_job.py::test_a_change_of_phase_stores_its_time_and_measures_the_phase_before",
        ),
    ),
    Mutant(
        name="jobs-of-one-name-are-counted-as-one",
        file=f"{_OPERATOR}/metrics/jobs.py",
        old="        self._jobs.setdefault(key, {})[uid] = job\n",
        new="        self._jobs[key] = {uid: job}\n",
        tests=(
            f"{_OPERATOR_TESTS}/watch/test_handlers.py::test_a_recreated_job_is_stored_although_the_old_ones_deletion_comes_last",
        ),
    ),
    Mutant(
        name="a-running-job-is-continued",
        file=f"{_DECISIONS}/continued.py",
        old="if not is_at_rest(other):",
        new="if False:",
        tests=(
            f"{_OPERATOR_TESTS}/decisions/test_continued.py::test_until_then_it_waits_reports_the_reason_and_is_requeued",
        ),
    ),
    Mutant(
        name="the-next-job-of-a-sweeps-pod-is-created-beside-the-one-before",
        file=f"{_DECISIONS}/sweeps/pods.py",
        old="    allowed = CreateJob | DeleteJob if may_create else DeleteJob\n",
        new="    allowed = CreateJob | DeleteJob\n",
        tests=(
            f"{_OPERATOR_TESTS}/decisions/test_sweep_pods.py::test_the_next_job_is_created_after_the_one_before_is_deleted",
        ),
    ),
    Mutant(
        name="a-job-whose-pod-still-saves-is-continued",
        file=f"{_DECISIONS}/continued.py",
        old="if facts.continued_writer:",
        new="if False:",
        tests=(
            f"{_OPERATOR_TESTS}/decisions/test_continued.py::test_it_waits_for_the_train_pod_of_a_failed_job_to_save_its_checkpoint",
            f"{_OPERATOR_TESTS}/decisions/test_continued.py::test_it_waits_for_the_pod_of_a_sweep_that_trains_a_suspended_cell_on",
        ),
    ),
    Mutant(
        name="losses-are-compared-with-four-decimals",
        file="crds/qlora_api/contract.py",
        old='return float(f"{figure:.9g}")',
        new="return round(figure, 4)",
        tests=(f"{_OPERATOR_TESTS}/decisions/test_halving.py::test_losses_equal_in_four_decimals_are_distinguished",),
    ),
)

TRAINER = (
    Mutant(
        name="train-is-online",
        file=f"{_TRAINER}/core/process.py",
        old='os.environ["HF_HUB_OFFLINE"] = "1"',
        new="pass",
        tests=(
            f"{_TRAINER_TESTS}/core/test_process.py::test_only_a_step_that_reads_from_the_hub_or_publishes_there_is_online",
            f"{_TRAINER_TESTS}/core/test_process.py::test_the_library_of_the_hub_sends_nothing_while_training",
        ),
    ),
    Mutant(
        name="a-small-blob-is-not-checked",
        file=f"{_TRAINER}/stores/registry.py",
        old="if digest_of(content) != blob.digest:",
        new="if False:",
        tests=(
            f"{_TRAINER_TESTS}/stores/test_registry.py::test_a_small_blob_with_another_content_than_its_digest_is_rejected",
        ),
    ),
    Mutant(
        name="a-download-resumes-behind-what-is-sent",
        file=f"{_TRAINER}/stores/registry.py",
        old="0 if offset and answer.status_code != 206 else offset",
        new="offset",
        tests=(
            f"{_TRAINER_TESTS}/stores/test_registry.py::test_a_download_resumes_to_the_same_bytes_with_and_without_ranges",
        ),
    ),
    Mutant(
        name="a-stale-cached-folder-with-a-link-is-filled",
        file=f"{_TRAINER}/core/partial_folders.py",
        old=" and _is_plain(partial)]",
        new="]",
        tests=(
            f"{_TRAINER_TESTS}/steps/test_model_cache.py::test_a_stale_folder_with_a_link_in_it_is_deleted_and_not_written_through",
        ),
    ),
    Mutant(
        name="a-cached-folder-that-was-filled-again-is-set-aside",
        file=f"{_TRAINER}/model/base/cache.py",
        old="(found.st_ino, found.st_mtime_ns)",
        new="(found.st_ino, 0)",
        tests=(f"{_TRAINER_TESTS}/steps/test_model_cache.py::test_a_folder_replaced_by_another_pod_is_not_set_aside",),
    ),
    Mutant(
        name="a-dry-run-is-repeated",
        file=f"{_TRAINER}/model/memory/job_memory.py",
        old="if earlier is None or earlier.digest != digest:",
        new="if earlier is None or earlier.digest:",
        tests=(
            "tests/unit/qlora_trainer/test_job_memory.py::test_a_dry_run_is_not_repeated_unless_something_that_it_depends_on_changes",
        ),
    ),
    Mutant(
        name="a-dry-run-without-a-limit-of-memory",
        file=f"{_TRAINER}/core/sandbox.py",
        old="        _limit_memory(memory_bytes)\n",
        new="",
        tests=(
            "tests/unit/qlora_trainer/test_dry_run_limits.py::test_more_memory_than_allowed_ends_it_with_a_message",
        ),
    ),
    Mutant(
        name="a-larger-micro-batch-without-room",
        file=f"{_CONTRACT}/memory/advice.py",
        old='if verdict(memory, gpu_gib) == "fits" and not is_thin(memory, gpu_gib):',
        new='if verdict(memory, gpu_gib) == "fits":',
        tests=(f"{_API_TESTS}/test_memory.py::test_a_larger_micro_batch_leaves_room",),
    ),
    Mutant(
        name="memory-without-dora",
        file=f"{_TRAINER}/model/memory/fit.py",
        old="use_dora=spec.lora.use_dora,",
        new="",
        tests=(
            "tests/unit/qlora_trainer/test_memory_fit.py::test_every_setting_that_decides_the_memory_reaches_the_estimate",
        ),
    ),
    Mutant(
        name="memory-without-whole-modules",
        file=f"{_TRAINER}/model/memory/fit.py",
        old="whole_modules=frozenset(spec.lora.modules_to_save or ()),",
        new="",
        tests=(
            "tests/unit/qlora_trainer/test_memory_fit.py::test_every_setting_that_decides_the_memory_reaches_the_estimate",
        ),
    ),
    Mutant(
        name="memory-of-one-gpu",
        file=f"{_TRAINER}/model/memory/fit.py",
        old="gpus=spec.resources.gpu_count,",
        new="",
        tests=(
            "tests/unit/qlora_trainer/test_memory_fit.py::test_every_setting_that_decides_the_memory_reaches_the_estimate",
        ),
    ),
    Mutant(
        name="memory-without-sharding",
        file=f"{_TRAINER}/model/memory/fit.py",
        old="sharding=spec.training.sharding,",
        new="",
        tests=(
            "tests/unit/qlora_trainer/test_memory_fit.py::test_every_setting_that_decides_the_memory_reaches_the_estimate",
        ),
    ),
    Mutant(
        name="rslora-is-not-verified",
        file=f"{_TRAINER}/publishing/verify.py",
        old='"use_rslora": lora.use_rslora,',
        new="",
        tests=(
            f"{_TRAINER_TESTS}/publishing/test_verify.py::test_a_configuration_of_another_adapter_is_rejected",
            f"{_TRAINER_TESTS}/publishing/test_verify.py::test_a_configuration_that_leaves_something_out_is_rejected",
        ),
    ),
    Mutant(
        name="missing-tensors-are-a-crash",
        file=f"{_TRAINER}/publishing/verify.py",
        old="path.is_symlink() or not path.is_file()",
        new="path.is_symlink()",
        tests=(
            f"{_TRAINER_TESTS}/publishing/test_verify.py::test_files_deleted_since_the_training_are_an_unsafe_artifact",
        ),
    ),
    Mutant(
        name="a-linked-configuration-is-published",
        file=f"{_TRAINER}/publishing/verify.py",
        old="path.is_symlink() or ",
        new="",
        tests=(
            f"{_TRAINER_TESTS}/publishing/test_verify.py::test_a_linked_configuration_is_rejected_even_if_its_target_is_right",
        ),
    ),
    Mutant(
        name="a-changed-base-is-trained-on",
        file=f"{_TRAINER}/model/base/artifact.py",
        old="    if found != sha256:\n",
        new="    if not found:\n",
        tests=(f"{_TRAINER_TESTS}/steps/test_train.py::test_an_adapter_trained_on_a_changed_base_is_not_kept",),
    ),
    Mutant(
        name="an-original-that-is-in-the-base-stays",
        file=f"{_TRAINER}/model/source/models.py",
        old="            remove(path)\n",
        new="                pass\n",
        tests=(f"{_TRAINER_TESTS}/steps/test_prepare_hub.py::test_one_file_of_the_original_at_a_time_takes_room",),
    ),
    Mutant(
        name="the-last-answer-is-the-first",
        file=f"{_TRAINER}/data/render/chat_template.py",
        old='self.targets[-1:] if train_on == "last"',
        new='self.targets[:1] if train_on == "last"',
        tests=(f"{_TRAINER_TESTS}/data/examples/test_turns.py::test_the_last_answer_alone_is_trained_on",),
    ),
    Mutant(
        name="servers-know-every-end-of-an-answer",
        file=f"{_TRAINER}/data/render/end_of_turn.py",
        old="if ids and ids[0] in known:",
        new="if ids:",
        tests=(
            f"{_TRAINER_TESTS}/data/render/test_template_source.py::test_an_end_of_answers_that_is_another_token_is_named_with_its_id",
        ),
    ),
    Mutant(
        name="a-checkpoint-is-not-read-back",
        file=f"{_TRAINER}/training/checkpoints/checkpoint.py",
        old="saved = read_checkpoint(final)",
        new="saved = Checkpoint(final, step, state)",
        tests=(
            f"{_TRAINER_TESTS}/training/test_checkpoint.py::test_a_checkpoint_that_does_not_read_back_replaces_no_earlier_one",
        ),
    ),
    Mutant(
        name="the-best-adapter-is-not-restored",
        file=f"{_TRAINER}/training/open_run.py",
        old="    progress.best = best_of(checkpoint)\n",
        new="",
        tests=(
            f"{_TRAINER_TESTS}/steps/test_best_adapter.py::test_a_disturbed_run_ends_at_the_same_step_with_the_same_best_adapter",
        ),
    ),
    Mutant(
        name="patience-for-one-evaluation-more",
        file=f"{_TRAINER}/training/progress/evaluations.py",
        old="self.without_improvement >= early_stopping.patience",
        new="self.without_improvement > early_stopping.patience",
        tests=(
            "tests/unit/qlora_trainer/test_evaluations.py::test_a_run_ends_after_so_many_evaluations_without_improvement",
        ),
    ),
    Mutant(
        name="a-creeping-loss-is-never-suspect",
        file=f"{_TRAINER}/training/progress/divergence.py",
        old="loss > self.lowest_loss_level + LOSS_RISE_NATS",
        new="loss > self.loss_level + LOSS_RISE_NATS",
        tests=(f"{_TRAINER_TESTS}/training/test_divergence.py::test_a_slowly_rising_loss_is_checked",),
    ),
    Mutant(
        name="one-limit-that-is-met-opens-the-gate",
        file=f"{_TRAINER}/publishing/gate.py",
        old="passed=all(",
        new="passed=any(",
        tests=("tests/unit/qlora_trainer/test_gate.py::test_every_limit_must_be_met",),
    ),
    Mutant(
        name="an-adapter-that-did-not-pass-is-published",
        file=f"{_TRAINER}/steps/publish.py",
        old="if job.gate is not None and not job.gate.passed:",
        new="if False and job.gate is not None and not job.gate.passed:",
        tests=(
            f"{_TRAINER_TESTS}/steps/test_gate.py::test_an_adapter_that_does_not_pass_stays_in_the_workspace_and_describes_itself",
        ),
    ),
    Mutant(
        name="a-score-of-another-adapter-counts",
        file=f"{_TRAINER}/publishing/gate.py",
        old="if trained.score.adapter_sha256 != trained.adapter_sha256:",
        new="if not trained.score.adapter_sha256:",
        tests=("tests/unit/qlora_trainer/test_gate.py::test_a_score_of_another_adapter_is_rejected",),
    ),
    Mutant(
        name="answers-that-no-adapter-may-finish-are-hoped-for",
        file=f"{_TRAINER}/evaluation/scorable.py",
        old="row.answer[: spec.max_new_tokens]",
        new="row.answer",
        tests=(
            f"{_TRAINER_TESTS}/evaluation/test_scorable.py::test_rows_whose_reference_answer_is_too_long_are_counted",
        ),
    ),
    Mutant(
        name="gradient-norms-may-rise-ninefold-more",
        file=f"{_TRAINER}/training/progress/divergence.py",
        old="NORM_RISE = 100.0",
        new="NORM_RISE = 900.0",
        tests=(
            f"{_TRAINER_TESTS}/training/test_divergence.py::test_a_gradient_norm_orders_of_magnitude_above_its_level_is_checked_too",
        ),
    ),
    Mutant(
        name="a-weight-on-a-mean-gets-the-larger-value",
        file=f"{_TRAINER}/model/nf4/quantization.py",
        old="torch.gt(",
        new="torch.ge(",
        tests=(
            f"{_TRAINER_TESTS}/model/nf4/test_quantization.py::test_every_16_bit_number_gets_the_value_that_bitsandbytes_gives_it",
        ),
    ),
    Mutant(
        name="experts-live-until-the-next-are-dequantized",
        file=f"{_TRAINER}/model/experts/compute.py",
        old="        del dense, matrix\n",
        new="",
        tests=(
            f"{_TRAINER_TESTS}/model/experts/test_experts.py::test_a_dry_run_counts_the_experts_that_are_dequantized_at_a_time",
        ),
    ),
    Mutant(
        name="a-rank-gets-each-weight-whole",
        file=f"{_TRAINER}/training/distributed/sharding.py",
        old='_set_frozen(block, name, weight.to("meta"))',
        new="_set_frozen(block, name, weight)",
        tests=(
            f"{_TRAINER_TESTS}/training/distributed/test_sharding.py::test_a_rank_reads_its_part_of_each_packed_weight",
        ),
    ),
    Mutant(
        name="large-logits-overflow",
        file=f"{_TRAINER}/model/losses/loss.py",
        old="    values -= values.amax(dim=1, keepdim=True)\n",
        new="",
        tests=(
            f"{_TRAINER_TESTS}/model/losses/test_loss.py::test_overflowing_logits_have_the_loss_and_gradient_of_cross_entropy",
        ),
    ),
    Mutant(
        name="a-run-with-an-earlier-adapter-is-compared-with-the-base",
        file=f"{_TRAINER}/training/suspect_run.py",
        old="if run.job.initial_adapter_sha256 is None:\n        try:",
        new="if True:\n        try:",
        tests=(
            f"{_TRAINER_TESTS}/training/test_divergence.py::test_a_run_that_began_with_a_harmful_adapter_does_not_fail_for_that",
        ),
    ),
    Mutant(
        name="the-metrics-of-a-continued-run-begin-with-its-checkpoint",
        file=f"{_TRAINER}/training/continued.py",
        old="min(checkpoint.state.history_bytes, path.stat().st_size)",
        new="0",
        tests=(f"{_TRAINER_TESTS}/steps/test_continues.py::test_it_ends_in_the_bytes_of_an_uninterrupted_run",),
    ),
    Mutant(
        name="the-reference-has-the-adapter",
        file=f"{_TRAINER}/training/reference.py",
        old="    with torch.no_grad(), model.disable_adapter():\n",
        new="    with torch.no_grad():\n",
        tests=(
            f"{_TRAINER_TESTS}/training/test_preference.py::test_a_row_that_is_first_seen_late_has_the_same_reference",
        ),
    ),
    Mutant(
        name="the-reference-is-computed-in-every-epoch",
        file=f"{_TRAINER}/training/reference.py",
        old="        self._missing = bool(self._known[split][rows].isnan().any())\n",
        new="        self._missing = True\n",
        tests=(
            f"{_TRAINER_TESTS}/training/test_preference.py::test_each_row_passes_the_base_once_and_a_resumed_run_ends_in_the_same_bytes",
        ),
    ),
    Mutant(
        name="weights-of-rows-do-not-reach-the-gradient",
        file=f"{_TRAINER}/model/losses/loss.py",
        old="torch.mul(gradient, weights.unsqueeze(1), out=torch.empty_like(gradient))",
        new="gradient",
        tests=(
            f"{_TRAINER_TESTS}/model/losses/test_loss.py::test_the_losses_of_targets_may_count_with_weights_that_depend_on_them",
        ),
    ),
    Mutant(
        name="every-epoch-of-a-mix-is-the-same-draw",
        file=f"{_TRAINER}/data/epochs.py",
        old="(epoch, source)",
        new="(0, source)",
        tests=(
            f"{_TRAINER_TESTS}/data/test_mix.py::test_an_epoch_has_no_row_twice_before_it_has_all_rows_of_the_source",
        ),
    ),
    Mutant(
        name="every-epoch-of-a-mix-trains-on-the-first-ones-rows",
        file=f"{_TRAINER}/training/schedule.py",
        old="begin, sequences = self._of_epoch(epoch)",
        new="begin, sequences = self._of_epoch(0)",
        tests=(f"{_TRAINER_TESTS}/data/test_mix.py::test_every_epoch_has_the_shares_of_all_sources_in_a_new_draw",),
    ),
    Mutant(
        name="rows-that-differ-in-their-targets-are-equal",
        file=f"{_TRAINER}/data/tokenize/chunks.py",
        old="    digest.update(row.is_target.tobytes())\n",
        new="",
        tests=(f"{_TRAINER_TESTS}/data/test_duplicates.py::test_rows_are_equal_if_all_their_tokens_and_targets_are",),
    ),
    Mutant(
        name="an-overlap-is-missed-where-the-rows-are-of-different-sources",
        file=f"{_TRAINER}/data/selection.py",
        old="numpy.isin(first_equal_[training], first_equal_[held_out])",
        new="numpy.isin(training, held_out)",
        tests=(f"{_TRAINER_TESTS}/data/test_duplicates.py::test_the_overlap_names_its_first_rows",),
    ),
    Mutant(
        name="adapters-in-one-pass-have-the-scale-of-the-first",
        file=f"{_TRAINER}/model/kernels/fused_lora.py",
        old="self.scaling[part.adapter]) for part in parts)",
        new="self.scaling[parts[0].adapter]) for part in parts)",
        tests=(
            f"{_TRAINER_TESTS}/model/losses/test_joint.py::test_losses_and_gradients_of_one_pass_are_those_of_each_adapter_alone",
        ),
    ),
    Mutant(
        name="layers-that-only-a-further-job-adapts-have-the-active-adapter-for-all-tokens",
        file=f"{_TRAINER}/model/adapter/attach.py",
        old="    fuse_further_lora(model)\n",
        new="",
        tests=(
            f"{_TRAINER_TESTS}/model/losses/test_joint.py::test_losses_and_gradients_of_one_pass_are_those_of_each_adapter_alone",
        ),
    ),
    Mutant(
        name="a-stop-between-two-jobs-loses-the-steps-of-the-first",
        file=f"{_TRAINER}/training/joint_training.py",
        old="        if interrupted and len(interrupted) < len(training):\n",
        new="        if not training:\n",
        tests=(
            f"{_TRAINER_TESTS}/steps/test_train_together.py::test_a_stop_between_two_of_them_saves_those_that_have_passed_it_too",
        ),
    ),
)

MUTANTS = (*API, *OPERATOR, *TRAINER)
