"""Files people write, read strictly: YAML and JSON with the position of every key."""
