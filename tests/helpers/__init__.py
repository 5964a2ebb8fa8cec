"""What several tests share: problems to train, networks, oracles, and programs that tests start."""
