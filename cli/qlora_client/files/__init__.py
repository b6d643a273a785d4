"""Files of a job: its adapter, its report, and folders on claims, hubs, buckets and registries."""
