"""What a run records while it trains: metrics, sample answers, trackers."""
