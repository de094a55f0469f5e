"""From files to atoms: find the checkpoint, tell its format, say where each atom lies."""
