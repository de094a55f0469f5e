"""Bytes on disk, without torch: zip archives of `torch.save`, their pickles, element types."""
