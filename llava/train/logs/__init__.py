"""What a run says of itself: metrics, progress, throughput, trackers, and where it diverged."""
