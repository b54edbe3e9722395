"""Quantization of a graph that torch.export makes of the model. One file a stage, in the order of prepare."""
