"""From atoms to files: the target as data, checked before a byte is written."""
