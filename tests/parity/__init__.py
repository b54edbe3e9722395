"""Parity with Apple's coreai-opt 0.4.0, which runs as a black box in a process of its own."""
