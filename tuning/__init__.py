"""Search campaigns: which points, who trains them, which of them won."""
