"""Records of a run while it trains: metrics, sample answers, trackers."""
