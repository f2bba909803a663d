"""What fits, what would help, how long it takes: pure functions over plans and jobs."""
