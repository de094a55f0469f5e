"""What a checkpoint holds in any format: atoms, where their parts lie, and parallel layouts."""
