"""Training loops that look at the accuracy, and optimizers for staged quantization."""
