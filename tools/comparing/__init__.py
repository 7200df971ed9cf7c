"""The comparison of two sides of one model: their answers, where these differ, and why."""
