"""What belongs together in a model, found in its exported program, and its removal."""
