"""Files of a job: its adapter, its report, and whatever a claim, hub, bucket or registry holds."""
