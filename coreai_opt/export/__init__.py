"""What ``finalize`` writes: compressed models for torch, Core AI, Core ML and ONNX, one module a target."""
