"""Private training, its accounting, and the attacks that test it."""
