"""Two sides that should say the same: what they say, where they part, and why."""
