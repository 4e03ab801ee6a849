"""What the tensors of a graph are: where the picture's grid is, which layers are tapped, where the logits are."""
