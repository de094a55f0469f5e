"""What a checkpoint holds, whatever its format: atoms, where their parts lie, and parallel layouts."""
