"""One generator family per file; every family has `sample(labels, generator=None)`."""
