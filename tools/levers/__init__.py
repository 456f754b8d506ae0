"""Each lever against off, on this machine and model, with a verdict that is kept."""
