"""Windows: an answer as text, one file per output format. Pure functions, no streams."""
