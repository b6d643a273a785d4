"""What the metrics say once an operator stands by."""

from qlora_operator.metrics import Metrics


def test_an_operator_that_stands_by_reports_no_job_and_no_namespace() -> None:
    metrics = Metrics()
    metrics.works(lambda: 3)
    metrics.job_is_in(("team", "job"), "uid", "Training", progresses=False)
    metrics.namespace_is_denied("forgotten", True)

    metrics.works(None)

    page = metrics.page()[0].decode()
    assert 'qlora_jobs{phase="Training"} 0.0' in page
    assert "qlora_jobs_without_progress 0.0" in page
    assert "qlora_operator_queue_depth 0.0" in page
    assert "forgotten" not in page
