"""What a server lets see of itself: traces, metrics, logs. Part of the core."""
