"""Several methods trained alike, and what can be said of them: jobs, statistics, page."""
