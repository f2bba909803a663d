"""The front: names and files in, what the shelves know and the calculator finds together, out."""
